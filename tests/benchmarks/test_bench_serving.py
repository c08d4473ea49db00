import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ann_util import IndexOptions, build_index
from benchmarks import bench_serving, search_over_http
from benchmarks.load_generator import Measured, Way, check_vector, measure_service, summary
from benchmarks.service_clients import Client
from common.errors import InputError
from encoding.exported_files import ModelCard
from helpers import all_pairs, unit_vectors, write_pairs
from retrieval.saved_index import DocumentIndex, load_index

SIZES = ["--batch_size", "4", "--texts", "8", "--seconds", "0.3", "--rounds", "1", "--threads", "1"]
TITLES = ["甲", "乙", "丙"]


@pytest.fixture
def index_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that the benchmark has made for a model with vectors of 16."""
    monkeypatch.setattr(search_over_http, "read_card", lambda _: ModelCard("model", 16, 32))
    search_over_http.make_index(tmp_path / "index", Path("output"), TITLES, 500, 4)
    return tmp_path / "index"


@pytest.mark.server
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8", marks=pytest.mark.openvino)])
def test_serving_benchmark_prints_what_can_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, precision: str
) -> None:
    """With a tiny model and short times: the ratios are those of the speeds, and every text was answered."""
    pairs = write_pairs(tmp_path / "train.csv", all_pairs())
    texts = ["--texts", "60"]  # enough to calibrate on
    bench_serving.main(
        ["--train_set_file", str(pairs), "--model", str(folder), *SIZES, *texts, "--precision", precision]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = result["texts_per_second"]
    for way in ("rpc", "http"):
        assert result[f"{way}_vs_direct"] == pytest.approx(speed[way] / speed["direct"], abs=0.01)
        assert result["calls"][way] >= 4 and 0 < result["encoding_share"][way] < 1
        assert list(result["latency_ms"][way]) == ["p50", "p90", "p95", "p99"]


@pytest.mark.server
def test_search_benchmark_keeps_its_index(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A second run searches the index of the first one; the ratios are those of the speeds."""
    pairs, index_dir = write_pairs(tmp_path / "train.csv", all_pairs()), tmp_path / "kept" / "index"
    command = [
        "--search",
        "--train_set_file",
        str(pairs),
        "--model",
        str(folder),
        *SIZES,
        "--index_dir",
        str(index_dir),
    ]
    bench_serving.main([*command, "--search_documents", "300", "--hnsw_m", "4"])
    manifest = (index_dir / "manifest.json").stat()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = result["texts_per_second"]
    assert result["search_vs_encode_only"] == pytest.approx(speed["search"] / speed["encode_only"], abs=0.01)
    assert result["search_vs_hnswlib"] == pytest.approx(speed["search"] / speed["hnswlib"], abs=0.01)
    assert (result["documents"], result["hnsw_m"], result["ef"]) == (300, 4, 100)
    assert 0 < result["ready_seconds"] < result["first_search_seconds"]
    assert result["searching_share"].keys() == {"search", "search_one_client"}
    assert result["memory_mb"]["encode_only"] > 10
    bench_serving.main(command)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["documents"] == 300
    assert (index_dir / "manifest.json").stat() == manifest
    with pytest.raises(InputError, match="has 300 documents, not --search_documents 20; leave one of the two"):
        bench_serving.main([*command, "--search_documents", "20"])


def test_the_cpp_server_does_not_search() -> None:
    with pytest.raises(InputError, match="leave --serving_bin out"):
        bench_serving.main(["--search", "--serving_bin", "serving"])


def test_figures_are_medians_over_rounds() -> None:
    """Ways that a service doesn't count have no shares."""
    rounds = {
        "here": [Measured(texts, 2.0, [0.5]) for texts in (10, 40, 20)],
        "served": [Measured(30, 3.0, [0.1, 0.3], 15, 1.5, searching) for searching in (0.3, 0.6, 2.0)],
    }
    figures = summary(rounds)
    assert figures["texts_per_second"] == {"here": 10, "served": 10}
    assert figures["latency_ms"]["served"]["p50"] == 200
    assert figures["texts_per_batch"] == {"served": 2}
    assert (figures["encoding_share"], figures["searching_share"]) == ({"served": 0.5}, {"served": 0.2})
    assert figures["calls"] == {"here": 3, "served": 6}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_wrong_answer_ends_the_measurement(precision: str, is_wrong: bool) -> None:
    """A vector in int8 only has to be near."""
    texts, vectors = ["甲", "乙"], unit_vectors(2, 8)
    wrong = {"fp32": (0.0, 1e-4), "int8": (1e-2, 0.5)}[precision][is_wrong]

    @contextlib.contextmanager
    def connect() -> Iterator[Client]:
        def parse(text: bytes) -> np.ndarray:
            row = texts.index(text.decode())
            answer = vectors[row : row + 1] + np.float32(wrong * row)
            return answer / np.linalg.norm(answer)

        yield Client(lambda texts: texts[0].encode(), lambda request: request, parse)

    def check(row: int, answer: np.ndarray) -> None:
        check_vector(texts, vectors, row, answer, precision=precision)

    if not is_wrong:
        assert measure_service(Way(connect, check, None), texts, 2, 0.05).texts >= 2
        return
    with pytest.raises(AssertionError, match="乙: a wrong vector"):
        measure_service(Way(connect, check, None), texts, 2, 0.05)


def test_bare_hnswlib_finds_what_the_index_finds(index_dir: Path) -> None:
    """The documents of the index are numbered titles."""
    saved = search_over_http.open_index(index_dir, Path("output"), 500)
    assert saved.documents[:4] == ["甲 0", "乙 1", "丙 2", "甲 3"] and len(saved.documents) == 500
    queries = unit_vectors(20, 16, seed=1)
    bare = search_over_http.load_hnswlib(index_dir, saved.index)
    assert (bare.M, bare.ef) == (4, 100)
    ids, distances = bare.knn_query(queries, 10)
    found = search_over_http.expected_hits(saved, queries)
    np.testing.assert_array_equal(ids, found.ids)
    np.testing.assert_allclose(1 - distances, found.scores, atol=1e-6)


def test_an_index_that_is_not_searched_by_hnswlib_is_refused(index_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = load_index(index_dir)
    exact = DocumentIndex(build_index(IndexOptions("exact"), unit_vectors(500, 16)), saved.documents, "model", "")
    monkeypatch.setattr(search_over_http, "load_index", lambda *_: exact)
    with pytest.raises(InputError, match="isn't an hnswlib index of vectors alone; give another folder"):
        search_over_http.open_index(index_dir, Path("output"), None)


def answers(found: search_over_http.Expected) -> Sequence[list[dict[str, Any]]]:
    """The hits that a service returns for each query."""
    return [
        [
            {"id": row, "score": round(score, 6), "document": found.documents[row]}
            for row, score in zip(ids, scores, strict=True)
        ]
        for ids, scores in zip(found.ids.tolist(), found.scores.tolist(), strict=True)
    ]


def test_wrong_hits_are_found(index_dir: Path) -> None:
    """Other ids, cosines, documents, fewer hits, and the hits of another text; one hit may differ."""
    saved = search_over_http.open_index(index_dir, Path("output"), None)
    expected = search_over_http.expected_hits(saved, unit_vectors(5, 16, seed=1))
    texts = [f"问{row}" for row in range(5)]
    for row, hits in enumerate(answers(expected)):
        search_over_http.check_hits(texts, expected, row, [hits])
        search_over_http.check_hits(texts, expected, row, [[{**hits[0], "id": 499}, *hits[1:]]])
        for wrong in (
            [{**hit, "id": hit["id"] + 1000} for hit in hits],
            [{**hit, "score": hit["score"] + 1e-4} for hit in hits],
            [{**hit, "document": "x"} for hit in hits],
            hits[:-1],
            [],
            answers(expected)[(row + 1) % 5],
        ):
            with pytest.raises(AssertionError, match=f"问{row}: "):
                search_over_http.check_hits(texts, expected, row, [wrong])


@pytest.mark.process
def test_memory_counts_processes_but_not_mapped_files(tmp_path: Path) -> None:
    """A process maps and reads a file of 100 MB, and its child holds 60 MB."""
    (tmp_path / "file").write_bytes(bytes(100 << 20))
    child = "held = bytearray(b'x') * (60 << 20); print('ready', flush=True); input()"
    code = (
        "import mmap, subprocess, sys\n"
        f"file = open({str(tmp_path / 'file')!r}, 'rb')\n"
        "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
        "mapped.find(b'x')\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert 60 <= search_over_http.anonymous_memory(process.pid) / 2**20 < 100
        process.communicate(b"\n")
