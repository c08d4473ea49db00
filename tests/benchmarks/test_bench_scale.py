import json

import pytest

from benchmarks import bench_scale


@pytest.mark.process
def test_the_scale_benchmark_measures_both_stages(capsys: pytest.CaptureFixture[str]) -> None:
    """On two small corpora, with shards in int8."""
    assert bench_scale.main(["--documents", "400", "20", "--vector_dtype", "int8"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["sizes"]) == ["20", "400"]
    largest = result["sizes"]["400"]
    assert result["peak_mb_per_million"] == pytest.approx(largest["encode_mb"] * 1e6 / 400, abs=0.1)
    assert largest["vectors_file_mb"] == pytest.approx(400 * 256 / 1e6, abs=0.06)
    assert largest["index_file_mb"] > 400 * 256 * 4 / 1e6 - 0.1
