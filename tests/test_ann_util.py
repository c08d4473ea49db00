"""The HNSW index and the exact search, beside what retrieval/test_index_contract.py checks of every index."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ann_util
from ann_util import (
    ExactIndex,
    HnswIndex,
    IndexOptions,
    LocalIndex,
    RescoredIndex,
    VectorIndex,
    add_index_args,
    build_index,
    check_index_args,
    recall_vs_exact,
    report_small_memory,
    smallest_ef,
)
from common import logs
from common.cpu import cpu_count
from common.errors import InputError
from common.vector_dtypes import to_dtype, to_float32
from helpers import ROOT, file_size_limit, unit_vectors

DIM = 16


def recall_of(index: VectorIndex, vectors: np.ndarray, queries: np.ndarray, k: int) -> float:
    _, found = index.search(queries, k)
    _, exact = build_index(IndexOptions("exact"), vectors).search(queries, k)
    return recall_vs_exact(found, exact)


@pytest.fixture(params=["hnswlib", "exact"])
def ann(request: pytest.FixtureRequest) -> str:
    return request.param


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_vectors(rows: int, seed: int, dim: int = DIM) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(rows, dim)))


def vectors_with_ties(rows: int, seed: int) -> np.ndarray:
    """Unit vectors of ±1/4 in 16 dimensions: products are exact, and only 17 similarities exist."""
    return np.random.default_rng(seed).choice(np.float32([-0.25, 0.25]), size=(rows, 16))


def full_sort(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The slow, obvious twin: sorts the whole similarity matrix, equal ones by id."""
    similarities = queries @ vectors.T
    ids = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(similarities, ids, axis=1)


def hnsw_index(vectors: np.ndarray, **options: int) -> HnswIndex:
    index = HnswIndex(vectors.shape[1], len(vectors), **options)
    index.add(vectors)
    return index


def test_batches_number_their_rows_on(ann: str) -> None:
    vectors = random_vectors(90, 4)
    index: VectorIndex = ExactIndex(DIM) if ann == "exact" else HnswIndex(DIM, 90)
    for start in range(0, 90, 40):
        index.add(vectors[start : start + 40])
    assert len(index) == 90
    ids, similarities = index.search(vectors, 1)
    np.testing.assert_array_equal(ids[:, 0], np.arange(90))
    np.testing.assert_allclose(similarities, 1, atol=1e-6)


def test_vectors_may_be_a_memory_map_of_another_precision(ann: str, tmp_path: Path) -> None:
    vectors = random_vectors(60, 9)
    np.save(tmp_path / "vectors.npy", vectors.astype(np.float16))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    ids, similarities = build_index(IndexOptions(ann), mapped).search(vectors, 1)
    np.testing.assert_array_equal(ids[:, 0], np.arange(60))
    assert similarities.dtype == np.float32


@pytest.mark.parametrize("vector_dtype", ["float16", "int8"])
def test_an_exact_index_of_less_room_is_that_of_the_rounded_vectors(
    vector_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its vectors come, and after it was saved, which rounds none of them again."""
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 70)
    monkeypatch.setattr(ann_util, "SMALL_BATCH", 20)
    vectors, queries = random_vectors(300, 30), random_vectors(9, 31)
    stored = to_dtype(vectors, vector_dtype)
    expected_ids, expected = full_sort(to_float32(stored), queries, 40)
    index = ExactIndex(DIM, vector_dtype)
    for part in (vectors[:150], stored[150:260], vectors[260:264], stored[264:270], vectors[270:]):
        index.add(part)
    assert [len(batch) for batch in index._batches] == [150, 110, 10, 30]
    assert {batch.dtype.name for batch in index._batches} == {vector_dtype}
    assert np.shares_memory(index._batches[1], stored)
    for _ in range(2):
        ids, similarities = index.search(queries, 40)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(similarities, expected, atol=1e-6)
        index.save(tmp_path)
        np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), stored)
        index = ExactIndex.load(tmp_path, index.settings)
        assert str(index) == f"the exact index in {vector_dtype}"


@pytest.mark.parametrize("vector_dtype", ["float16", "int8"])
def test_a_rescored_index_answers_as_exact_search(
    vector_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the cosines of float32, whatever was added and deleted, in memory and from its folder."""
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 70)
    monkeypatch.setattr(ann_util, "SMALL_BATCH", 20)
    vectors, queries = random_vectors(300, 32), random_vectors(9, 33)
    index: LocalIndex = build_index(IndexOptions("rescored", vector_dtype=vector_dtype), vectors[:200])
    expected = build_index(IndexOptions("exact"), vectors[:200])
    for start in (200, 210, 215, 300):
        for k in (1, 10, 400):
            for found, exact in zip(index.search(queries, k), expected.search(queries, k), strict=True):
                np.testing.assert_allclose(found, exact, atol=1e-6)
        index.save(tmp_path)
        index = RescoredIndex.load(tmp_path, index.settings)
        for one in (index, expected):
            assert one.delete(range(start - 60, start - 20)) == 40 or start < 300
            if start < 300:
                one.add(vectors[start : {200: 210, 210: 215, 215: 300}[start]])
    assert np.load(tmp_path / "rounded_vectors.npy").dtype == vector_dtype
    np.testing.assert_array_equal(np.load(tmp_path / "vectors.npy"), vectors)


def test_a_rescored_index_looks_among_the_candidates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there are as many as hits, they are those of the rounded vectors."""
    vectors, queries = random_vectors(3000, 34), random_vectors(20, 35)
    index = build_index(IndexOptions("rescored", vector_dtype="int8"), vectors)
    exact = full_sort(vectors, queries, 50)[0]
    np.testing.assert_array_equal(index.search(queries, 50)[0], exact)
    np.testing.assert_array_equal(index.search_exactly(queries, 50)[0], exact)
    monkeypatch.setattr(ann_util, "RESCORED_PER_HIT", 1)
    monkeypatch.setattr(ann_util, "MORE_RESCORED", 0)
    ids = index.search(queries, 50)[0]
    rounded = full_sort(to_float32(to_dtype(vectors, "int8")), queries, 50)[0]
    assert not np.array_equal(ids, exact)
    np.testing.assert_array_equal(np.sort(ids), np.sort(rounded))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 60, 300])
def test_exact_equals_a_full_sort_with_ties_whatever_the_blocks(
    block: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", block)
    monkeypatch.setattr(ann_util, "QUERY_BLOCK", 4)
    vectors, queries = vectors_with_ties(300, 10), vectors_with_ties(10, 11)
    vectors[100:150] = vectors[20]
    ids, similarities = build_index(IndexOptions("exact"), vectors).search(queries, k)
    expected_ids, expected = full_sort(vectors, queries, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(similarities, expected)


def test_exact_equals_a_full_sort_where_each_block_is_better_than_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 16)
    angles = np.linspace(3, 0, 200)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    ids, _ = build_index(IndexOptions("exact"), vectors).search(np.float32([[1, 0]]), 20)
    np.testing.assert_array_equal(ids[0], np.arange(199, 179, -1))


def test_hnsw_loses_little_on_clusters() -> None:
    rng = np.random.default_rng(12)
    centres = random_vectors(60, 13, dim=64)
    vectors = unit(centres[rng.integers(0, 60, 4000)] + 0.1 * rng.normal(size=(4000, 64)))
    queries = unit(centres[rng.integers(0, 60, 200)] + 0.1 * rng.normal(size=(200, 64)))
    assert recall_of(build_index(IndexOptions("hnswlib"), vectors), vectors, queries, 50) >= 0.99


def test_hnsw_answers_k_however_small_ef() -> None:
    vectors = random_vectors(400, 14)
    ids, _ = hnsw_index(vectors, ef=1).search(vectors[:5], 100)
    assert all(len(set(row)) == 100 for row in ids.tolist())


def test_hnsw_answers_exactly_where_its_graph_is_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 300)
    vectors = np.repeat(random_vectors(5, 15), 400, axis=0)
    index = hnsw_index(vectors, m=2)
    queries, everything = vectors[::100], len(vectors)
    with pytest.raises(RuntimeError, match="contiguous"):
        index._knn_query(queries, everything)
    ids, similarities = index.search(queries, everything)
    np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(everything), (len(queries), 1)))
    np.testing.assert_allclose(similarities, full_sort(vectors, queries, everything)[1], atol=1e-6)


def test_long_work_shows_progress(ann: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(logs, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(ann_util, "HNSW_BLOCK", 8)
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 8)
    build_index(IndexOptions(ann), random_vectors(20, 18)).search(random_vectors(10, 19), 3)
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    expected = {
        "hnswlib": [
            "index: 40% 8/20",
            "index: 80% 16/20",
            "index: 100% 20/20",
            "search: 80% 8/10",
            "search: 100% 10/10",
        ],
        "exact": ["exact search: 40% 8/20", "exact search: 80% 16/20", "exact search: 100% 20/20"],
    }
    assert [line.split(" [")[0] for line in lines] == expected[ann]


def test_hnsw_answers_by_blocks_like_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = hnsw_index(random_vectors(200, 20)), random_vectors(30, 21)
    expected = index.search(queries, 5)
    monkeypatch.setattr(ann_util, "HNSW_BLOCK", 7)
    for found, at_once in zip(index.search(queries, 5), expected, strict=True):
        np.testing.assert_array_equal(found, at_once)


def test_hnsw_answers_one_by_one_like_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = random_vectors(200, 16), random_vectors(10, 17)
    index = hnsw_index(vectors)
    expected = index.search(queries, 20)
    knn_query = index._knn_query

    def fails_for_the_batch_and_the_third(batch: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if len(batch) > 1 or (batch == queries[2]).all():
            raise RuntimeError("Cannot return the results in a contiguous 2D array")
        return knn_query(batch, k)

    monkeypatch.setattr(index, "_knn_query", fails_for_the_batch_and_the_third)
    ids, similarities = index.search(queries, 20)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(similarities, expected[1], atol=1e-6)


def test_hnsw_uses_the_cores_of_the_machine_or_the_threads_asked_for() -> None:
    vectors = random_vectors(500, 18)
    one, all_cores = hnsw_index(vectors, threads=1), hnsw_index(vectors)
    assert (one._index.num_threads, all_cores._index.num_threads) == (1, cpu_count())
    np.testing.assert_array_equal(one.search(vectors, 5)[0], all_cores.search(vectors, 5)[0])


@pytest.mark.parametrize("make", [lambda: ExactIndex(DIM), lambda: HnswIndex(DIM, 9)], ids=["exact", "hnswlib"])
def test_names_the_row_of_a_later_batch_and_adds_nothing_of_it(make: Callable[[], VectorIndex]) -> None:
    index = make()
    with pytest.raises(InputError, match="corpus is empty"):
        index.search(random_vectors(1, 0), 1)
    index.add(random_vectors(3, 0))
    bad = random_vectors(3, 1)
    bad[1] = 0
    with pytest.raises(InputError, match="corpus vector 4 "):
        index.add(bad)
    with pytest.raises(InputError, match=r"\[rows, 16\]"):
        index.add(random_vectors(3, 1, dim=8))
    assert len(index) == 3
    assert index.search(random_vectors(1, 0), 9)[0].shape == (1, 3)


def test_names_the_row_whatever_the_blocks(ann: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 4)
    vectors = random_vectors(12, 2)
    vectors[[9, 11]] = np.nan
    with pytest.raises(InputError, match="corpus vector 9 "):
        build_index(IndexOptions(ann), vectors)


def test_hnsw_options_reach_hnswlib() -> None:
    index = build_index(IndexOptions("hnswlib", hnsw_m=7, hnsw_ef=9), random_vectors(5, 3))._index
    assert (index.M, index.ef_construction, index.ef, index.max_elements) == (7, 9, 9, 5)


def test_max_elements_reserves_more_and_never_less() -> None:
    vectors = random_vectors(20, 19)
    assert build_index(IndexOptions("hnswlib", hnsw_max_elements=50), vectors).max_elements == 50
    assert build_index(IndexOptions("hnswlib"), vectors).max_elements == 20
    with pytest.raises(InputError, match=r"--hnsw_max_elements 19: the corpus has 20 documents; give at least as many"):
        build_index(IndexOptions("hnswlib", hnsw_max_elements=19), vectors)
    build_index(IndexOptions("exact", hnsw_max_elements=19), vectors)


def test_a_saved_index_answers_as_before_and_takes_more(ann: str, tmp_path: Path) -> None:
    """Also exactly, and with the vectors that are added afterwards."""
    vectors, more, queries = random_vectors(300, 30), random_vectors(200, 31), random_vectors(20, 32)
    index = build_index(IndexOptions(ann), vectors)
    index.save(tmp_path)
    loaded = type(index).load(tmp_path, index.settings)
    for method in ("search", "search_exactly"):
        for ours, theirs in zip(getattr(loaded, method)(queries, 9), getattr(index, method)(queries, 9), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    loaded.add(more)
    assert len(loaded) == 500
    expected = ExactIndex(DIM)
    expected.add(np.concatenate([vectors, more]))
    np.testing.assert_array_equal(loaded.search_exactly(queries, 9)[0], expected.search(queries, 9)[0])
    assert recall_vs_exact(loaded.search(queries, 9)[1], expected.search(queries, 9)[1]) > 0.99


def live_full_sort(vectors: np.ndarray, live: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The twin of an index with deleted rows: sorts the others."""
    rows, similarities = full_sort(vectors[live], queries, min(k, len(live)))
    return live[rows], similarities


@pytest.mark.parametrize("count", [1, 150, 290, 299])
def test_deleted_rows_are_never_found(ann: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either search, before and after saving. Their ids aren't used again; fewer rows than asked for may be left."""
    monkeypatch.setattr(ann_util, "CORPUS_BLOCK", 64)
    vectors, queries = random_vectors(320, 60), random_vectors(40, 61)
    index = build_index(IndexOptions(ann, hnsw_ef=300, target_recall=0), vectors[:300])
    deleted = np.random.default_rng(count).choice(300, count, replace=False)
    assert index.delete([*deleted.tolist(), deleted[0], -1, 300]) == count
    assert index.delete(deleted) == 0
    for size in (300, 320):
        index.save(tmp_path)
        loaded = type(index).load(tmp_path, index.settings)
        live = np.setdiff1d(np.arange(size), deleted)
        expected = live_full_sort(vectors, live, queries, 12)
        for each in (index, loaded):
            assert (len(each), each.live_count, each.live_ids().tolist()) == (size, size - count, live.tolist())
            for found in (each.search(queries, 12), each.search_exactly(queries, 12)):
                np.testing.assert_array_equal(found[0], expected[0])
                np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
            assert recall_vs_exact(each.search(queries, 12)[1], each.search_exactly(queries, 12)[1]) == 1
        if size == 300:
            index = loaded
            index.add(vectors[300:])


def test_an_index_of_deleted_rows_is_empty(ann: str, tmp_path: Path) -> None:
    """And takes more."""
    vectors = random_vectors(6, 62)
    index = build_index(IndexOptions(ann), vectors[:5])
    assert index.delete(range(5)) == 5
    index.save(tmp_path)
    for each in (index, type(index).load(tmp_path, index.settings)):
        with pytest.raises(InputError, match="corpus is empty"):
            each.search(vectors, 3)
        each.add(vectors[5:])
        ids, similarities = each.search(vectors[5:], 3)
        assert (ids.tolist(), similarities.shape) == ([[5]], (1, 1))


def test_an_index_without_deleted_rows_is_saved_as_by_earlier_versions(ann: str) -> None:
    index = build_index(IndexOptions(ann), random_vectors(5, 63))
    assert "deleted" not in index.settings
    index.delete([3])
    assert index.settings["deleted"] == [3]


def test_ef_is_tuned_for_the_rows_that_are_left() -> None:
    """More neighbours are asked for than there are."""
    vectors = random_vectors(40, 64)
    index = build_index(IndexOptions(), vectors)
    index.delete(range(35))
    index.tune_ef(vectors, 10, 0.995)
    assert index.ef == 5
    assert sorted(index.search(vectors[:1], 10)[0][0]) == [35, 36, 37, 38, 39]


def test_small_batches_are_joined_and_large_ones_are_not() -> None:
    """Of many batches each would cost a matrix product in every search."""
    vectors = random_vectors(2600, 65)
    index = ExactIndex(DIM)
    for start, end in [(0, 1200), *((row, row + 1) for row in range(1200, 2550)), (2550, 2600)]:
        index.add(vectors[start:end])
    assert len(index._batches) == 3 and index._batches[0].base is vectors
    np.testing.assert_array_equal(np.concatenate([block for _, block in index._live_blocks()]), vectors)


def test_a_full_hnsw_index_grows_by_more_than_it_must() -> None:
    index = build_index(IndexOptions(), random_vectors(80, 66))
    sizes = []
    for seed in range(12):
        index.add(random_vectors(1, seed))
        sizes.append(index.max_elements)
    assert sizes == [90] * 10 + [101] * 2


@pytest.mark.parametrize("limit", [0, 5_000, 100_000])
def test_a_full_disk_is_an_input_error(ann: str, tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands in for it; hnswlib itself reports nothing."""
    index = build_index(IndexOptions(ann), random_vectors(2000, 35))
    with file_size_limit(limit), pytest.raises(InputError, match=f"^{tmp_path}/.*: can't be written"):
        index.save(tmp_path)


@pytest.mark.parametrize(("rows", "m", "reserved"), [(1, 2, 1), (50, 7, 80), (1500, 100, 1500), (1500, 300, 2000)])
def test_a_saved_hnsw_index_has_the_size_that_it_should(tmp_path: Path, rows: int, m: int, reserved: int) -> None:
    """Also if it reserved more, after it was loaded, and after it has grown: `save` checks the file's size."""
    index = build_index(IndexOptions(hnsw_m=m, hnsw_max_elements=reserved), random_vectors(rows, 36))
    index.save(tmp_path)
    loaded = HnswIndex.load(tmp_path, index.settings)
    loaded.save(tmp_path)
    loaded.add(random_vectors(30, 37))
    loaded.save(tmp_path)


def test_an_index_grows_beyond_what_it_reserved() -> None:
    index = HnswIndex(DIM, 3)
    for seed in range(3):
        index.add(random_vectors(3, seed))
    assert (len(index), index.max_elements) == (9, 9)


def test_tuned_ef_is_the_smallest_that_is_enough() -> None:
    vectors, queries = random_vectors(3000, 33, dim=64), random_vectors(50, 34, dim=64)
    index = build_index(IndexOptions(hnsw_m=4, hnsw_ef=20), vectors)
    expected = index.search_exactly(queries, 10)[1]

    def found(ef: int) -> float:
        index.ef = ef
        return recall_vs_exact(index.search(queries, 10)[1], expected)

    index.tune_ef(queries, 10, 0.9)
    tuned = index.ef
    assert 10 < tuned < 3000
    assert found(tuned - 1) < 0.9 <= found(tuned)
    index.tune_ef(queries, 10, 0.01)
    assert index.ef == 10


@pytest.mark.parametrize(("lowest", "expected"), [(1, 16384), (100, 16384), (16384, 16384), (20000, 20000)])
def test_ef_has_an_upper_bound(lowest: int, expected: int) -> None:
    """No `ef` is enough, for example if k documents have no links to the rest."""
    tried = []
    assert smallest_ef(lambda ef: bool(tried.append(ef)), lowest) == expected
    assert max(tried) == expected


@pytest.mark.parametrize("option", ["hnsw_m", "hnsw_ef", "hnsw_max_elements"])
def test_options_beyond_memory_are_one_line(option: str) -> None:
    with pytest.raises(InputError, match="no memory for an HNSW index"):
        build_index(IndexOptions("hnswlib", **{option: 10**20}), random_vectors(3, 20))


def test_without_hnswlib_says_what_to_do_and_searches_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hnswlib", None)
    vectors = random_vectors(5, 21)
    for attempt in (lambda: build_index(IndexOptions("hnswlib"), vectors), lambda: check_index_args(IndexOptions(), 5)):
        with pytest.raises(InputError, match=r"C\+\+ compiler.*scripts/setup.sh.*--ann exact") as error:
            attempt()
        assert "\n" not in str(error.value)
    check_index_args(IndexOptions("exact"), 5)
    assert build_index(IndexOptions("exact"), vectors).search(vectors, 1)[0].ravel().tolist() == [0, 1, 2, 3, 4]


def test_options_and_their_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_index_args(parser)
    assert IndexOptions(**vars(parser.parse_args([]))) == IndexOptions("hnswlib", 100, 100, None, None)


@pytest.mark.parametrize("name", ["--target_recall", "--tune_ef"])
def test_the_target_recall_keeps_its_old_name_as_an_alias(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_index_args(parser)
    assert IndexOptions(**vars(parser.parse_args([name, "0.9"]))) == IndexOptions(target_recall=0.9)


@pytest.mark.parametrize(("asked", "expected"), [(None, 0.995), (0.9, 0.9), (0.0, 0.0)])
def test_a_new_index_has_a_target_recall_unless_it_is_exact(asked: float | None, expected: float) -> None:
    vectors = random_vectors(5, 3)
    assert build_index(IndexOptions(target_recall=asked), vectors).target_recall == expected
    assert build_index(IndexOptions("exact", target_recall=asked), vectors).target_recall == 0


@pytest.mark.parametrize("name", ["target_recall", "share"])
def test_a_saved_target_recall_is_read_under_version_1_s_name_too(tmp_path: Path, name: str) -> None:
    index = build_index(IndexOptions(target_recall=0.9), random_vectors(5, 3))
    index.save(tmp_path)
    settings = dict(index.settings)
    assert settings.pop("target_recall") == 0.9
    assert HnswIndex.load(tmp_path, {**settings, name: 0.9}).target_recall == 0.9


@pytest.mark.parametrize(
    ("option", "value"),
    [("--hnsw_m", "1"), ("--hnsw_ef", "0"), ("--hnsw_max_elements", "0"), ("--target_recall", "1"), ("--ann", "faiss")],
)
def test_refuses_options_out_of_range(option: str, value: str, capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_index_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([option, value])
    assert option in capsys.readouterr().err


def test_recall_vs_exact_counts_what_the_index_misses() -> None:
    vectors = vectors_with_ties(200, 22)
    assert recall_of(build_index(IndexOptions("exact"), vectors), vectors, vectors[:20], 10) == 1

    class EveryOther(ExactIndex):
        """Has the best answer, then every other one."""

        def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            ids, similarities = super()._search(queries, 2 * k)
            return ids[:, ::2], similarities[:, ::2]

    vectors, queries = random_vectors(200, 23), random_vectors(20, 24)
    index = EveryOther(DIM)
    index.add(vectors)
    assert recall_of(index, vectors, queries, 10) == 0.5


def test_recall_vs_exact_takes_any_of_several_equal_documents() -> None:
    vectors = np.repeat(random_vectors(20, 25), 10, axis=0)

    class LastOfEqual(ExactIndex):
        """Answers with the higher ids where ExactIndex has the lower ones."""

        def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            ids, similarities = super()._search(queries, 10)
            return ids[:, -k:], similarities[:, -k:]

    index = LastOfEqual(DIM)
    index.add(vectors)
    assert not np.isin(
        index.search(vectors[:1], 3)[0], build_index(IndexOptions("exact"), vectors).search(vectors[:1], 3)[0]
    ).any()
    assert recall_of(index, vectors, vectors, 3) == 1


@pytest.mark.process
def test_imports_no_hnswlib() -> None:
    """Exact search works without it."""
    code = "import sys, ann_util; sys.exit('hnswlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ).returncode == 0


@pytest.mark.parametrize(("norm", "is_fine"), [(0.996, True), (1.004, True), (0.98, False), (1.02, False)])
def test_norms_may_be_rounded_but_not_wrong(norm: float, is_fine: bool) -> None:
    """bfloat16 has eight bits."""
    vectors = np.eye(4, dtype=np.float32) * np.float32([[1], [1], [norm], [1]])
    index = ExactIndex(4)
    if is_fine:
        index.add(vectors)
    else:
        with pytest.raises(InputError, match="corpus vector 2 "):
            index.add(vectors)
    assert len(index) == 4 * is_fine


def test_ef_is_enough_when_it_is_tuned() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((count, 32)).astype(np.float32) for count in (3000, 100))
    vectors, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, queries))
    index = HnswIndex(32, len(vectors), m=4, ef_construction=20, threads=1)
    index.add(vectors)
    exact = index.search_exactly(queries, 10)[1]
    for target in np.linspace(0.3, 0.95, 14):
        index.tune_ef(queries, 10, target)
        assert recall_vs_exact(index.search(queries, 10)[1], exact) >= target
        index.ef -= 1
        assert index.ef < 10 or recall_vs_exact(index.search(queries, 10)[1], exact) < target


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (IndexOptions(), "the HNSW index of 10000000 documents needs 18.9 GB, and the limit of memory is 8.0 GB"),
        (IndexOptions(hnsw_m=5), None),
        (IndexOptions(ann="exact"), None),
    ],
)
def test_an_index_that_memory_will_not_hold_is_announced(
    options: IndexOptions, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ann_util, "memory_limit", lambda: 8e9 if said else 12e9)
    report_small_memory(options, 10_000_000, 256)
    err = capsys.readouterr().err
    assert err == (f"{said}: the system may end this process; use --ann exact, or lower --hnsw_m\n" if said else "")


@pytest.mark.parametrize(("share", "is_announced"), [(1.15, False), (1.0, True)])
def test_the_announced_size_is_that_of_the_index(
    share: float, is_announced: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In memory it is a little more than its file: a mutex and a pointer for each vector."""
    file_size = build_index(IndexOptions(), unit_vectors(1000, 64))._index.index_file_size()
    monkeypatch.setattr(ann_util, "memory_limit", lambda: share * file_size)
    report_small_memory(IndexOptions(), 1000, 64)
    assert ("needs 0.0 GB" in capsys.readouterr().err) is is_announced
