"""Nearest neighbours of unit vectors: an HNSW index and an exact search behind one contract. Imports no Paddle."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np

from runtime import InputError, at_least, cpu_count

ANN_CHOICES = ("hnswlib", "exact")
CORPUS_BLOCK = 16384  # rows and
QUERY_BLOCK = 256  # queries at a time: their similarities take 16 MB
UNIT_TOLERANCE = 1e-2  # a norm after rounding to bfloat16 is off by up to 4e-3
TIE_TOLERANCE = 1e-6  # similarities of one pair of float32 vectors differ by less, whichever way they are summed


def add_index_args(parser: argparse.ArgumentParser) -> None:
    """Options of every script that searches a corpus."""
    parser.add_argument("--ann", choices=ANN_CHOICES, default="hnswlib", help="HNSW index, or exact search")
    parser.add_argument("--hnsw_m", type=at_least(2), default=100, help="links a vector in the HNSW graph")
    parser.add_argument(
        "--hnsw_ef", type=at_least(1), default=100, help="candidates kept while the HNSW graph is built and searched"
    )
    parser.add_argument(
        "--hnsw_max_elements", type=at_least(1), help="vectors to reserve memory for (default: the corpus's)"
    )


def check_index_args(ann: str, corpus_size: int, hnsw_max_elements: int | None = None) -> None:
    """Raises the InputError that `build_index` would, before `corpus_size` documents are encoded for it."""
    if ann != "hnswlib":
        return
    _import_hnswlib()
    if hnsw_max_elements is not None and hnsw_max_elements < corpus_size:
        raise InputError(
            f"--hnsw_max_elements {hnsw_max_elements}: the corpus has {corpus_size} documents; "
            "give at least as many or leave the option out"
        )


def _import_hnswlib() -> ModuleType:
    try:
        import hnswlib
    except ImportError:
        raise InputError(
            "hnswlib isn't installed (it needs a C++ compiler): "
            "install one and run `sh scripts/setup.sh` again, or use `--ann exact`"
        ) from None
    return hnswlib


class VectorIndex(ABC):
    """Unit vectors to search; the number of a row, over all batches added, is its id.

    dim: columns of every vector. Vectors are float32, or are converted to it.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, vectors: np.ndarray) -> None:
        """Adds unit vectors [N, dim], or none of them: InputError for no rows, a wrong shape or a row of another norm.

        Zero rows and those that hold NaN or infinity have another norm as well; the message names the first.
        """
        _check_unit_vectors(vectors, self.dim, "corpus", self._size)
        if not len(vectors):
            raise InputError("the corpus is empty: there is nothing to search")
        self._add(vectors)
        self._size += len(vectors)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The most similar rows of each query, best first.

        queries: unit vectors [Q, dim]. Returns ids, int64 [Q, min(k, N)], and their inner products (cosines), float32
        of the same shape. Raises InputError for k < 1, an empty index and queries that `add` would refuse.
        """
        if k < 1:
            raise InputError(f"can't search for {k} documents: give 1 or more")
        if not len(self):
            raise InputError("the corpus is empty: there is nothing to search")
        _check_unit_vectors(queries, self.dim, "query", 0)
        k = min(k, len(self))
        if not len(queries):
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        return self._search(np.asarray(queries, dtype=np.float32), k)

    @abstractmethod
    def _add(self, vectors: np.ndarray) -> None: ...

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


class ExactIndex(VectorIndex):
    """Compares each query with each vector; equal similarities come in the order of their ids.

    Vectors aren't copied: they may be a memory map, and mustn't change afterwards.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._batches: list[np.ndarray] = []

    def _add(self, vectors: np.ndarray) -> None:
        self._batches.append(vectors)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return _exact_top_k((block for batch in self._batches for block in _blocks(batch)), queries, k)


class HnswIndex(VectorIndex):
    """hnswlib's graph index (Malkov and Yashunin 2016, arXiv:1603.09320): finds nearly all of what is nearest, fast.

    max_elements: vectors that it can hold; m: links a vector; ef_construction, ef: candidates kept while building and
    searching (searching keeps k if that is more); threads: by default one a core. With more than one thread
    the graph differs a little from build to build. Raises InputError if hnswlib is missing or can't reserve the memory.
    """

    def __init__(
        self,
        dim: int,
        max_elements: int,
        m: int = 100,
        ef_construction: int = 100,
        ef: int = 100,
        threads: int | None = None,
    ) -> None:
        super().__init__(dim)
        self.max_elements = max_elements
        self._index = _import_hnswlib().Index(space="ip", dim=dim)
        try:
            self._index.init_index(max_elements=max_elements, M=m, ef_construction=ef_construction)
            self._index.set_ef(ef)
        except (RuntimeError, MemoryError, ValueError, TypeError):  # the last two: more than 64 bits hold
            raise InputError(
                f"no memory for an HNSW index of {max_elements} vectors with {m} links each and ef {ef_construction}: "
                "lower --hnsw_max_elements, --hnsw_m or --hnsw_ef"
            ) from None
        self._index.set_num_threads(threads or cpu_count())

    def _add(self, vectors: np.ndarray) -> None:
        if len(self) + len(vectors) > self.max_elements:
            raise InputError(f"the index holds {self.max_elements} vectors, not {len(self) + len(vectors)}")
        for block in _blocks(vectors):
            self._index.add_items(block)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._knn_query(queries, k)
        except RuntimeError:
            return self._search_one_by_one(queries, k)

    def _knn_query(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, distances = self._index.knn_query(queries, k)
        return ids.astype(np.int64), 1 - distances  # the distance of its space "ip" is 1 - inner product

    def _search_one_by_one(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Answers exactly where the graph gives fewer than k rows, for which hnswlib fails the whole batch.

        It happens where parts of the graph have no link to each other, as with many equal vectors; a larger ef
        doesn't help.
        """
        ids, similarities = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        unanswered = []
        for row in range(len(queries)):
            try:
                ids[row], similarities[row] = self._knn_query(queries[row : row + 1], k)
            except RuntimeError:
                unanswered.append(row)
        starts = range(0, len(self), CORPUS_BLOCK)
        rows = (np.arange(start, min(start + CORPUS_BLOCK, len(self))) for start in starts)
        corpus = (self._index.get_items(block, return_type="numpy") for block in rows)
        ids[unanswered], similarities[unanswered] = _exact_top_k(corpus, queries[unanswered], k)
        return ids, similarities


def build_index(
    ann: str, vectors: np.ndarray, *, hnsw_m: int = 100, hnsw_ef: int = 100, hnsw_max_elements: int | None = None
) -> VectorIndex:
    """The index that the options of `add_index_args` name, over unit vectors [N, D]. Raises InputError."""
    if vectors.ndim != 2:
        raise InputError(f"the corpus vectors have the shape {vectors.shape}, where [rows, columns] is needed")
    rows, dim = vectors.shape
    check_index_args(ann, rows, hnsw_max_elements)
    if ann == "exact":
        index = ExactIndex(dim)
    else:
        index = HnswIndex(dim, hnsw_max_elements or max(1, rows), hnsw_m, ef_construction=hnsw_ef, ef=hnsw_ef)
    index.add(vectors)
    return index


def overlap(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of exact search's hits that an index found, 0 to 1; both are similarities [Q, k], best first.

    An answer counts if it is as similar as the exact k-th: which of several equal documents it is doesn't matter.
    """
    return float(np.mean(found >= exact[:, -1:] - TIE_TOLERANCE))


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Float32 blocks of up to CORPUS_BLOCK rows."""
    for start in range(0, len(vectors), CORPUS_BLOCK):
        yield np.asarray(vectors[start : start + CORPUS_BLOCK], dtype=np.float32)


def _check_unit_vectors(vectors: np.ndarray, dim: int, name: str, first_row: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise InputError(f"the {name} vectors have the shape {vectors.shape}, where [rows, {dim}] is needed")
    for block in _blocks(vectors):
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))  # "not <=", since NaN is neither
        if len(bad):
            row = bad[0]
            raise InputError(
                f"{name} vector {first_row + row} (counted from 0) has norm {norms[row]:.4g} instead of 1: "
                "look at its text and at the weights of the model"
            )
        first_row += len(block)


def _exact_top_k(blocks: Iterable[np.ndarray], queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [Q, k] and similarities [Q, k] of the k best rows of all `blocks`, which hold at least k."""
    ids = np.zeros((len(queries), k), np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    first_id = 0
    for block in blocks:
        for start in range(0, len(queries), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            scores = queries[part] @ block.T
            ids[part], similarities[part] = _merge(ids[part], similarities[part], scores, first_id)
        first_id += len(block)
    return ids, similarities


def _merge(
    ids: np.ndarray, similarities: np.ndarray, scores: np.ndarray, first_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of the k so far (ids and similarities [Q, k]) and a block (scores [Q, B]) whose ids are all higher."""
    q, k = ids.shape
    # What a score must reach: more than the worst so far or, where more than k do so, the k-th best of the block.
    floor = np.nextafter(similarities[:, -1], np.float32(np.inf))
    crowded = np.count_nonzero(scores >= floor[:, None], axis=1) > k
    if crowded.any():
        floor[crowded] = np.partition(scores[crowded], -k, axis=1)[:, -k]
    block_rows, columns = np.nonzero(scores >= floor[:, None])
    rows = np.concatenate([np.repeat(np.arange(q), k), block_rows])
    similarities = np.concatenate([similarities.ravel(), scores[block_rows, columns]])
    ids = np.concatenate([ids.ravel(), first_id + columns])
    order = np.lexsort((ids, -similarities, rows))
    firsts = np.searchsorted(rows[order], np.arange(q))
    best = order[firsts[:, None] + np.arange(k)]
    return ids[best], similarities[best]
