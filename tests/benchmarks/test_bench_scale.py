import json

import pytest

from benchmarks import bench_scale


@pytest.mark.process
def test_the_scale_benchmark_measures_both_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """On two small corpora."""
    assert bench_scale.main(["--documents", "60", "20"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["sizes"]) == ["20", "60"]
    largest = result["sizes"]["60"]
    assert result["peak_mb_per_million"] == pytest.approx(largest["encode_mb"] * 1e6 / 60, abs=0.1)
    assert largest["index_file_mb"] > 60 * 256 * 4 / 1e6 - 0.1
