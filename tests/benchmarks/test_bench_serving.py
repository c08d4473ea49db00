import json
from pathlib import Path

import pytest

from benchmarks import bench_serving
from helpers import all_pairs, write_pairs


@pytest.mark.server
def test_serving_benchmark_prints_what_can_be_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With a tiny model and short times: the ratios are those of the speeds, and every text was answered."""
    pairs = write_pairs(tmp_path / "train.csv", all_pairs())
    sizes = ["--batch_size", "4", "--texts", "8", "--seconds", "0.3", "--rounds", "1", "--threads", "1"]
    bench_serving.main(["--train_set_file", str(pairs), "--model", str(folder), *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = result["texts_per_second"]
    for way in ("rpc", "http"):
        assert result[f"{way}_vs_direct"] == pytest.approx(speed[way] / speed["direct"], abs=0.01)
        assert result["calls"][way] >= 4 and 0 < result["encoding_share"][way] < 1
        assert list(result["latency_ms"][way]) == ["p50", "p90", "p95", "p99"]
