import json
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_search, measure_search
from common.errors import InputError
from retrieval.milvus_server import MilvusServer, connect


def test_vectors_of_the_search_benchmark(tmp_path: Path) -> None:
    """Unit vectors, with copies near the originals; a folder of files is read as one."""
    random = np.random.default_rng(1)
    made = bench_search.made_vectors(300, random)
    more = bench_search.stretched(made, 500, random)
    np.testing.assert_array_equal(more[:300], made)
    np.testing.assert_array_equal(bench_search.stretched(made, 200, random), made[:200])
    np.testing.assert_allclose(np.linalg.norm(more, axis=1), 1, atol=1e-5)
    nearest = (more[300:] @ made.T).max(axis=1)
    assert 0.9 < nearest.mean() < 0.99
    for number, part in enumerate(np.array_split(more, 3)):
        np.save(tmp_path / f"{number}.npy", part)
    np.testing.assert_array_equal(bench_search.read_vectors(str(tmp_path)), more)
    with pytest.raises(InputError, match="no vectors that can be read"):
        bench_search.read_vectors(str(tmp_path / "missing.npy"))
    np.testing.assert_array_equal(bench_search.read_queries(str(tmp_path)), more)
    with pytest.raises(InputError, match=r"--queries .*0\.npy: 167 vectors; give more than the 200"):
        bench_search.read_queries(str(tmp_path / "0.npy"))


def test_engines_of_the_search_benchmark_reach_the_target_recall(tmp_path: Path) -> None:
    """Ours and bare hnswlib; faiss is in the peers' environment."""
    vectors = bench_search.made_vectors(1000, np.random.default_rng(2))
    queries = vectors[: measure_search.TUNED_ON + 50]
    exact = -np.sort(-(queries @ vectors.T), axis=1)[:, :20]
    for name, array in (("vectors", vectors), ("queries", queries), ("exact", exact)):
        np.save(tmp_path / f"{name}.npy", array)
    files = [part for name in ("vectors", "queries", "exact") for part in (f"--{name}", str(tmp_path / f"{name}.npy"))]
    for engine in ("ours", "hnswlib", *measure_search.EXACT):
        assert measure_search.main(["--engine", engine, *files, "--report", str(tmp_path / "report.json")]) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["recall_vs_exact"] >= 0.98 and (report["ef"] or 20) >= 20
        assert (report["ef"] is None) == (engine in measure_search.EXACT)
        assert engine == "exact_int8" or report["recall_vs_exact"] >= 0.99
        assert (
            report["build_seconds"] > 0
            and report["added_bytes"] >= 0
            and len(report["search_seconds"]) == measure_search.REPEATS
        )
        assert ("default_recall" in report) == (engine == "ours")
        assert report.get("default_recall", 1) > 0.98


def test_cosines_of_rows_that_are_there() -> None:
    """Faiss gives -1 for a hit that it didn't find."""
    vectors = np.eye(3, dtype=np.float32)
    found = measure_search.cosines_of(np.array([[2, 0], [1, -1]]), vectors[:2], vectors)
    np.testing.assert_array_equal(found, [[0, 1], [1, -1]])


@pytest.mark.milvus
def test_milvus_is_measured_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_search.uuid, "uuid4", lambda: uuid.UUID(int=0))
    vectors = bench_search.made_vectors(1000, np.random.default_rng(2))
    exact = -np.sort(-(vectors[:50] @ vectors.T), axis=1)[:, :20]
    for name, array in (("vectors", vectors), ("queries", vectors[:50]), ("exact", exact)):
        np.save(tmp_path / f"{name}.npy", array)
    files = [part for name in ("vectors", "queries", "exact") for part in (f"--{name}", str(tmp_path / f"{name}.npy"))]
    uri, report = str(tmp_path / "milvus.db"), str(tmp_path / "report.json")
    assert measure_search.main(["--engine", "milvus", "--milvus", uri, *files, "--report", report]) == 0
    measured = json.loads(Path(report).read_text())
    assert measured["recall_vs_exact"] >= 0.99 and len(measured["search_seconds"]) == measure_search.REPEATS
    assert not connect(MilvusServer(uri)).has_collection(f"bench_search_{12 * '0'}")


def test_ratios_of_the_search_benchmark_are_the_worst(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates are medians over processes; the last line is a JSON object."""
    seconds = {"ours": 2.0, "hnswlib": 1.0, "faiss": 4.0, "faiss_sq8": 3.0}
    seconds |= {**dict.fromkeys(measure_search.EXACT, 6.0), "milvus": 5.0}
    addresses: list[str] = []

    def run_process(command: Sequence[str | Path], report: Path, kind: type) -> dict:
        engine = command[command.index("--engine") + 1]
        if engine == "milvus":
            addresses.append(command[command.index("--milvus") + 1])
        rows = len(np.load(command[command.index("--vectors") + 1]))
        build = seconds[engine] if rows == 1000 else 1.0
        searches = [1.0, seconds[engine], 9.0]
        report = {
            "added_bytes": 3 << 20,
            "build_seconds": build,
            "ef": 60,
            "recall_vs_exact": 0.99,
            "search_seconds": searches,
        }
        return report | {"default_recall": rows / 2000} if engine == "ours" else report

    monkeypatch.setattr(bench_search, "run_process", run_process)
    monkeypatch.setattr(bench_search, "check_benchmarks_python", lambda: None)
    assert bench_search.main(["--rows", "1000", "1500", "--rounds", "1", "--milvus", "http://127.0.0.1:19530"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "queries_per_second" in line and line[0] == " "] == [
        [rows, engine] for rows in ("1000", "1500") for engine in seconds
    ]
    assert addresses == ["http://127.0.0.1:19530"] * 2
    result = json.loads(lines[-1])
    assert result["sizes"]["1000"]["milvus"] == {
        "vectors_per_second": 200,
        "queries_per_second": 200,
        "added_mib": 3,
        "ef": [60],
        "recall_vs_exact": [0.99],
    }
    assert (result["build_vs_hnswlib"], result["query_vs_hnswlib"]) == (0.5, 0.5)
    assert result["recall_vs_exact"] == 0.5
    assert result["sizes"]["1000"]["faiss"]["queries_per_second"] == 250
