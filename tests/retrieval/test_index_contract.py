"""One contract for all indexes, checked against a full sort: hnswlib, exact, Milvus embedded and on a real server."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ann_util import ApproximateIndex, IndexOptions, LocalIndex, VectorIndex, build_index, recall_vs_exact
from common.errors import InputError
from helpers import unit_vectors
from retrieval.milvus_collection import CollectionInfo, document_id
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import MilvusServer

DIM = 16
UNIT = np.eye(DIM, dtype=np.float32)
MILVUS = pytest.mark.milvus
ENGINES = [
    "hnswlib",
    "exact",
    pytest.param("embedded", marks=MILVUS),
    pytest.param("server", marks=[MILVUS, pytest.mark.server]),
]


class Engine(NamedTuple):
    """How the tests use an index. The document of row 7 is document_of(7)."""

    build: Callable[[np.ndarray], VectorIndex]  # a complete index of vectors
    reopen: Callable[[VectorIndex], VectorIndex]  # what another process finds of it
    id_of: Callable[[int], int]  # the id of a row

    def rows(self, ids: np.ndarray, count: int) -> np.ndarray:
        """The rows that ids stand for, out of `count`; the opposite of `id_of`."""
        row_of = {self.id_of(row): row for row in range(count)}
        return np.vectorize(row_of.__getitem__, otypes=[np.int64])(ids)


def document_of(row: int) -> str:
    return f"文档 {row}"


def add(index: VectorIndex, vectors: np.ndarray, first_row: int) -> None:
    index.add(vectors, [document_of(first_row + row) for row in range(len(vectors))])


def local_engine(ann: str, folder: Path) -> Engine:
    def reopen(index: LocalIndex) -> LocalIndex:
        index.save(folder)
        return type(index).load(folder, index.settings)

    return Engine(lambda vectors: build_index(IndexOptions(ann, target_recall=0), vectors), reopen, lambda row: row)


def milvus_engine(server: MilvusServer) -> Engine:
    def build(vectors: np.ndarray) -> MilvusIndex:
        alias, documents = f"contract_{uuid.uuid4().hex[:12]}", [document_of(row) for row in range(len(vectors))]
        info = CollectionInfo("m" * 64, "c", "fp32", True, vectors.shape[1])
        index = MilvusIndex.create(server, alias, info, IndexOptions(), len(vectors))
        index.add(vectors, documents)
        index.finish(documents)
        index.publish(alias)
        return index

    def reopen(index: MilvusIndex) -> MilvusIndex:
        return MilvusIndex.open(server, index.name.rpartition("_")[0])

    return Engine(build, reopen, lambda row: document_id(document_of(row)))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        return milvus_engine(MilvusServer(str(folder / "milvus.db")))
    if request.param == "server":
        milvus = request.getfixturevalue("milvus")
        return milvus_engine(MilvusServer(milvus.uri, token_file=str(milvus.token_file)))
    return local_engine(request.param, folder)


VECTORS = np.concatenate([unit_vectors(380, DIM), np.repeat(unit_vectors(30, DIM, seed=1), 4, axis=0)])
QUERIES = unit_vectors(40, DIM, seed=2)


@pytest.fixture(scope="module")
def index(engine: Engine) -> VectorIndex:
    """Of VECTORS, for tests that don't change it."""
    return engine.build(VECTORS)


def full_sort(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The slow, obvious twin: sorts the whole similarity matrix."""
    similarities = queries @ vectors.T
    rows = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(similarities, rows, axis=1)


def test_finds_what_a_full_sort_finds(engine: Engine, index: VectorIndex) -> None:
    expected_rows, expected = full_sort(VECTORS[:380], QUERIES, 10)
    first = engine.build(VECTORS[:380])
    for each in (first, engine.reopen(first)):
        for ids, similarities in (each.search(QUERIES, 10), each.search_exactly(QUERIES, 10)):
            assert (ids.dtype, similarities.dtype) == (np.int64, np.float32)
            np.testing.assert_array_equal(engine.rows(ids, 380), expected_rows)
            np.testing.assert_allclose(similarities, expected, atol=1e-6)


def test_similarities_descend_and_belong_to_their_ids(engine: Engine, index: VectorIndex) -> None:
    ids, similarities = index.search(QUERIES, 50)
    rows = engine.rows(ids, 500)
    assert (np.diff(similarities, axis=1) <= 0).all() and all(len(set(row)) == 50 for row in rows.tolist())
    np.testing.assert_allclose(similarities, np.einsum("qd,qkd->qk", QUERIES, VECTORS[rows]), atol=1e-6)


def test_equal_documents_are_all_found(engine: Engine, index: VectorIndex) -> None:
    ids, similarities = index.search(VECTORS[380::4], 4)
    np.testing.assert_array_equal(np.sort(engine.rows(ids, 500), axis=1), np.arange(380, 500).reshape(30, 4))
    np.testing.assert_allclose(similarities, 1, atol=1e-6)


def test_k_above_the_corpus_gives_every_document(engine: Engine, index: VectorIndex) -> None:
    for ids, similarities in (index.search(QUERIES[:3], 900), index.search_exactly(QUERIES[:3], 900)):
        assert ids.shape == similarities.shape == (3, 500)
        np.testing.assert_array_equal(np.sort(engine.rows(ids, 500), axis=1), np.tile(np.arange(500), (3, 1)))


def test_no_queries_no_answers(index: VectorIndex) -> None:
    ids, similarities = index.search(np.empty((0, DIM), np.float32), 4)
    assert ids.shape == similarities.shape == (0, 4)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.eye(3, dtype=np.float32), 5, r"query vectors have the shape \(3, 3\), where \[rows, 16\]"),
        (UNIT[0], 5, r"shape \(16,\)"),
        (np.stack([UNIT[0], UNIT[0] * np.nan]), 5, "query vector 1 .* norm nan"),
        (UNIT[:1] * 0, 5, "query vector 0 .* norm 0 "),
        (UNIT[:1], 0, "0 documents"),
    ],
)
def test_refuses_bad_queries(index: VectorIndex, queries: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        index.search(queries, k)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (UNIT[0], r"\(16,\)"),
        (np.eye(3, dtype=np.float32), r"\(3, 3\), where \[rows, 16\]"),
        (np.empty((0, DIM), np.float32), "corpus is empty"),
        (np.stack([UNIT[0], UNIT[0] * np.nan]), "corpus vector .* norm nan"),
        (np.stack([UNIT[0], np.full(DIM, np.inf, np.float32)]), "corpus vector .* norm inf"),
        (np.stack([UNIT[0], UNIT[0] + UNIT[1]]), "corpus vector .* norm 1.414 "),
    ],
)
def test_refuses_a_corpus_that_is_not_rows_of_unit_vectors(
    index: VectorIndex, vectors: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        add(index, vectors, 500)
    assert "\n" not in str(error.value)
    assert index.live_count == 500


def test_sample_ids_are_live_and_distinct(engine: Engine, index: VectorIndex) -> None:
    assert sorted(index.sample_ids(900)) == sorted(engine.id_of(row) for row in range(500))
    some = index.sample_ids(7)
    assert 0 < len(set(some)) == len(some) <= 7 and all(index.is_live(each) for each in some)
    assert not index.is_live(-1) and not index.is_live(1 << 62)


def test_finds_the_target_share_when_tuned(index: VectorIndex) -> None:
    if isinstance(index, ApproximateIndex):  # the exact index finds all without
        index.tune_ef(QUERIES, 10, 0.99)
    assert recall_vs_exact(index.search(QUERIES, 10)[1], index.search_exactly(QUERIES, 10)[1]) >= 0.99


def test_documents_are_added_and_deleted(engine: Engine) -> None:
    """Whoever looks finds what was added last, and never what was deleted, by either search."""
    vectors = unit_vectors(320, DIM, seed=3)
    index = engine.build(vectors[:300])
    add(index, vectors[300:], 300)
    gone = [3, 5, 299, 300]
    ids = [engine.id_of(row) for row in gone]
    assert index.delete([*ids, ids[0], engine.id_of(400)]) == 4
    assert index.delete(ids) == 0
    live = np.setdiff1d(np.arange(320), gone)
    for each in (index, engine.reopen(index)):
        assert each.live_count == 316
        assert [each.is_live(engine.id_of(row)) for row in (3, 4, 300, 301)] == [False, True, False, True]
        for found in (each.search(vectors, 316)[0], each.search_exactly(vectors[:9], 316)[0]):
            np.testing.assert_array_equal(np.sort(engine.rows(found, 320), axis=1), np.tile(live, (len(found), 1)))
        np.testing.assert_array_equal(engine.rows(each.search(vectors[live], 1)[0], 320)[:, 0], live)


def test_one_document_that_is_deleted_and_added_again(engine: Engine) -> None:
    vectors = unit_vectors(1, DIM, seed=4)
    index = engine.build(vectors)
    assert engine.rows(index.search(-vectors, 10)[0], 1).tolist() == [[0]]
    np.testing.assert_allclose(index.search(-vectors, 10)[1], [[-1]], atol=1e-6)
    index.delete([engine.id_of(0)])
    with pytest.raises(InputError, match="corpus is empty"):
        index.search(vectors, 3)
    add(index, vectors, 1)
    for each in (index, engine.reopen(index)):
        ids, similarities = each.search(vectors, 3)
        assert engine.rows(ids, 2).tolist() == [[1]] and similarities.shape == (1, 1)
