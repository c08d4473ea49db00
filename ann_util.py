"""Nearest neighbours of unit vectors: an HNSW index and exact search with one interface. Imports no Paddle."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.cli import number_in_range, positive_int, proportion
from common.cpu import cpu_count, memory_limit
from common.errors import InputError
from common.files import atomic_write
from common.logs import log, progress_bar
from common.vector_dtypes import FLOAT32, to_dtype, to_float32

ANN_CHOICES = ("hnswlib", "exact")
RESCORED = "rescored"  # for scripts with --vector_dtype, see `RescoredIndex`
HNSW_FILE, VECTORS_FILE, ROUNDED_FILE = "hnsw.bin", "vectors.npy", "rounded_vectors.npy"
CORPUS_BLOCK = 8192  # vectors of the corpus that are read or compared at a time
QUERY_BLOCK = 256  # queries compared with such a block at a time: the similarities take 8 MB
HNSW_ELEMENT_BYTES = 64  # of a vector besides itself and its links: its label, a pointer and a mutex
HNSW_BLOCK = 1024  # vectors or queries per call of hnswlib, which takes about a second and delays Ctrl-C
HNSW_GROWTH = 8  # a full index grows by 1/8 or more, since each growth takes time in proportion to all vectors
RESCORED_PER_HIT, MORE_RESCORED = 2, 10  # candidates; with int8 they leave out 1 of 30,000 of float32's top 10
SMALL_BATCH = 1024  # vectors: batches that together have no more are joined, since each costs a matrix product
DEFAULT_TARGET_RECALL = 0.995  # on a sample of the queries; gives 0.99 on all of them
MAX_EF = 1 << 14  # with a larger ef, HNSW is no faster than exact search
UNIT_TOLERANCE = 1e-2  # rounding to bfloat16 changes a norm by up to 4e-3
TIE_TOLERANCE = 1e-6  # the order of summation changes the inner product of two float32 unit vectors by less


class IndexOptions(NamedTuple):
    """Values of the options of `add_index_args`, which have the same names."""

    ann: str = "hnswlib"
    hnsw_m: int = 100
    hnsw_ef: int = 100
    hnsw_max_elements: int | None = None
    target_recall: float | None = None
    vector_dtype: str = FLOAT32  # see `add_vector_dtype_arg`


def add_index_args(parser: argparse._ActionsContainer, ann_choices: Sequence[str] = ANN_CHOICES) -> None:
    """Adds the options of every script that searches a corpus."""
    defaults = IndexOptions()
    add = parser.add_argument
    add("--ann", choices=ann_choices, default=defaults.ann, help="engine: an HNSW index, exact search, ...")
    add("--hnsw_m", type=number_in_range(2), default=defaults.hnsw_m, help="links per vector in the HNSW graph")
    candidates_help = "candidates (ef) kept while building the HNSW graph and, with --target_recall 0, while searching"
    add("--hnsw_ef", type=positive_int, default=defaults.hnsw_ef, help=candidates_help)
    add("--hnsw_max_elements", type=positive_int, help="vectors to reserve memory for (default: the corpus size)")
    target_help = (
        "search with the smallest ef that finds this share of exact search's hits on a sample of the queries; "
        f"0: with --hnsw_ef (default: {DEFAULT_TARGET_RECALL} for a new index, its own for a saved one)"
    )
    add("--target_recall", "--tune_ef", type=proportion, help=target_help)


def report_small_memory(options: IndexOptions, vectors: int, dim: int) -> None:
    """Logs a line if the index of this many vectors won't fit into the memory that this process may use."""
    if options.ann != "hnswlib":  # exact search reads the vectors from the disk
        return
    links = 2 * options.hnsw_m + 1  # of 4 bytes on the lowest level, with their number; upper levels add 1 %
    size, limit = vectors * (4 * dim + 4 * links + HNSW_ELEMENT_BYTES), memory_limit()
    if size > limit:
        problem = f"the HNSW index of {vectors} documents needs {size / 1e9:.1f} GB, and the limit of memory is"
        log(f"{problem} {limit / 1e9:.1f} GB: the system may end this process; use --ann exact, or lower --hnsw_m")


def check_index_args(options: IndexOptions, corpus_size: int) -> None:
    """Raises InputError if `build_index` would refuse the options for this many vectors; for use before encoding.

    Logs options that have no effect on this kind of index.
    """
    if options.ann != "hnswlib":
        defaults = IndexOptions(options.ann, vector_dtype=options.vector_dtype)._asdict()
        unused = [name for name, value in defaults.items() if getattr(options, name) != value]
        if unused:
            log(f"--ann {options.ann}: {', '.join(f'--{name}' for name in unused)} have no effect on it")
        return
    _import_hnswlib()
    if options.hnsw_max_elements is not None and options.hnsw_max_elements < corpus_size:
        problem = f"--hnsw_max_elements {options.hnsw_max_elements}: the corpus has {corpus_size} documents"
        raise InputError(f"{problem}; give at least as many or leave the option out")


def _import_hnswlib() -> ModuleType:
    try:
        import hnswlib
    except ImportError:
        remedy = "install one and run `sh scripts/setup.sh` again, or use `--ann exact`"
        raise InputError(f"hnswlib isn't installed (it needs a C++ compiler): {remedy}") from None
    return hnswlib


class VectorIndex(ABC):
    """Unit vectors to search, in float32, each with an id.

    Searches may run at the same time, but not beside `add` or `delete`. dim: length of a vector. target_recall: the
    share of exact search's hits that `retrieval.pipeline` tunes an approximate index for; 0: it isn't tuned.
    """

    target_recall = 0.0

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    @abstractmethod
    def live_count(self) -> int:
        """The number of vectors that aren't deleted."""

    @property
    def searches_exactly(self) -> bool:
        """Whether `search_exactly` takes minutes at most."""
        return True

    @abstractmethod
    def is_live(self, row: int) -> bool:
        """Whether the vector with this id is there and isn't deleted."""

    @abstractmethod
    def sample_ids(self, count: int) -> list[int]:
        """Some ids of vectors that aren't deleted, or all if there are no more than `count`, in order."""

    def add(self, vectors: Any, documents: Sequence[str] = ()) -> None:
        """Adds unit vectors [N, dim], an array or `Embeddings`. documents: their texts, for an index that keeps them.

        Raises InputError, and adds nothing, for no rows, a wrong shape, or a row whose norm isn't 1, such as zeros, NaN
        or infinity; the message names the first such row.
        """
        check_unit_vectors(vectors, self.dim, "corpus", self._next_row)
        if not len(vectors):
            raise InputError("the corpus is empty: there is nothing to search")
        self._add(vectors, documents)

    @abstractmethod
    def delete(self, ids: Iterable[int]) -> int:
        """Deletes the vectors with these ids; returns how many of them were there and not deleted before."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The most similar vectors of each query, best first.

        queries: unit vectors [Q, dim]. Returns ids, int64 [Q, min(k, live_count)], and their inner products (cosines),
        float32 of the same shape. Raises InputError for k < 1, an index without rows or with deleted ones only, and
        queries of a wrong shape or norm.
        """
        if k < 1:
            raise InputError(f"can't search for {k} documents: give 1 or more")
        k = min(k, self.live_count)
        if not k:
            raise InputError("the corpus is empty: there is nothing to search")
        check_unit_vectors(queries, self.dim, "query", 0)
        if not len(queries):
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        return self._search(np.asarray(queries, dtype=np.float32), k)

    def search_exactly(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Compares each query with each vector; arguments and result as for `search`, but without its checks."""
        count = self.live_count
        with progress_bar(count, "exact search", "vector") as progress:
            return _exact_top_k(self._live_blocks(), np.asarray(queries, dtype=np.float32), min(k, count), progress)

    @property
    def _next_row(self) -> int:
        """The number of the next vector, for messages."""
        return 0

    @abstractmethod
    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids, int64 [B], and vectors, float32 [B, dim], of the vectors that aren't deleted; B <= CORPUS_BLOCK."""

    @abstractmethod
    def _add(self, vectors: np.ndarray, documents: Sequence[str]) -> None: ...

    @abstractmethod
    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


class ApproximateIndex(VectorIndex):
    """An index that compares a query with some of the vectors; the larger its `ef`, the more of them."""

    ef: int  # candidates kept while searching

    def tune_ef(self, queries: np.ndarray, k: int, target_recall: float) -> None:
        """Sets the smallest `ef` with which `search` finds this share of exact search's k best, see `smallest_ef`.

        queries: unit vectors [Q, dim], a sample of the expected ones.
        """
        _, expected = self.search_exactly(queries, k)

        def is_enough(ef: int) -> bool:
            self.ef = ef
            return recall_vs_exact(self.search(queries, k)[1], expected) >= target_recall

        self.ef = smallest_ef(is_enough, min(k, self.live_count))


class LocalIndex(VectorIndex):
    """An index in this process, which can be saved; the id of a vector is its row number over all calls of `add`.

    Deleted rows keep their ids, which aren't used again, but are never found; `len` counts them, too.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._is_live = np.zeros(0, bool)  # by id: whether the row isn't deleted

    def __len__(self) -> int:
        return len(self._is_live)

    @property
    def live_count(self) -> int:
        """The number of rows that aren't deleted."""
        return int(np.count_nonzero(self._is_live))

    def live_ids(self) -> np.ndarray:
        """The ids of the rows that aren't deleted, int64, in order."""
        return np.flatnonzero(self._is_live)

    def is_live(self, row: int) -> bool:
        """Whether a row is there and isn't deleted."""
        return 0 <= row < len(self) and bool(self._is_live[row])

    def sample_ids(self, count: int) -> list[int]:
        """Evenly spaced ids."""
        ids = self.live_ids()
        return ids[:: max(1, -(-len(ids) // count))].tolist()

    @property
    def _next_row(self) -> int:
        return len(self)

    def add(self, vectors: Any, documents: Sequence[str] = ()) -> None:
        """`VectorIndex.add`; the documents aren't kept."""
        super().add(vectors, documents)
        self._is_live = np.concatenate([self._is_live, np.ones(len(vectors), bool)])

    def delete(self, ids: Iterable[int]) -> int:
        """`VectorIndex.delete`."""
        found = [row for row in dict.fromkeys(ids) if self.is_live(row)]
        self._delete(found)
        self._is_live[found] = False
        return len(found)

    @abstractmethod
    def _delete(self, ids: Sequence[int]) -> None: ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the index into an existing folder. Raises InputError if it can't."""

    @property
    def settings(self) -> dict[str, Any]:
        """What `load` needs in addition to the files, as JSON values."""
        deleted = np.flatnonzero(~self._is_live).tolist()
        return {"dimension": self.dim, "documents": len(self), **({"deleted": deleted} if deleted else {})}

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "LocalIndex":
        """Reads what `save` wrote. Check the files' hashes first: a damaged file can crash the process."""


class ExactIndex(LocalIndex):
    """Compares each query with each vector; equal similarities are ordered by id.

    vector_dtype: what the vectors are kept in, one of VECTOR_DTYPES. Vectors of that type, and with float32 those of
    any type, are kept without a copy, unless they are few: they may be a memory map, and must not change afterwards.
    """

    def __init__(self, dim: int, vector_dtype: str = FLOAT32) -> None:
        super().__init__(dim)
        self.vector_dtype = vector_dtype
        self._batches: list[np.ndarray] = []

    def __str__(self) -> str:
        return "the exact index" if self.vector_dtype == FLOAT32 else f"the exact index in {self.vector_dtype}"

    def _add(self, vectors: np.ndarray, documents: Sequence[str]) -> None:
        parts = [vectors]
        if self._batches and len(self._batches[-1]) + len(vectors) <= SMALL_BATCH:
            parts = [self._batches.pop(), vectors]
        elif self.vector_dtype in (FLOAT32, vectors.dtype):
            self._batches.append(vectors)
            return
        blocks = (to_dtype(block, self.vector_dtype) for part in parts for block in _blocks(part, CORPUS_BLOCK))
        self._batches.append(np.concatenate(list(blocks)))

    def _delete(self, ids: Sequence[int]) -> None:
        """Nothing to do: `_live_blocks` leaves the rows out."""

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.search_exactly(queries, k)

    def _blocks(self) -> Iterator[np.ndarray]:
        return (block for batch in self._batches for block in _blocks(batch, CORPUS_BLOCK))

    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for block in self._blocks():
            rows = np.flatnonzero(self._is_live[start : start + len(block)])
            yield start + rows, block if len(rows) == len(block) else block[rows]
            start += len(block)

    def inner_products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Those of each query with its rows, float32 [Q, k]; reads no other rows of a memory map in float32.

        queries: float32 [Q, dim]; rows: ids, int64 [Q, k].
        """
        products, start = np.empty(rows.shape, np.float32), 0
        for block in self._blocks():
            places = np.nonzero((rows >= start) & (rows < start + len(block)))
            products[places] = np.einsum("nd,nd->n", queries[places[0]], block[rows[places] - start])
            start += len(block)
        return products

    def save(self, folder: Path, name: str = VECTORS_FILE) -> None:
        """Writes the vectors as a .npy file."""
        with atomic_write(folder / name, "wb") as file:
            descr = np.dtype(self.vector_dtype).str
            header = {"descr": descr, "fortran_order": False, "shape": (len(self), self.dim)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in self._blocks():
                file.write(np.ascontiguousarray(to_dtype(block, self.vector_dtype)))

    @property
    def settings(self) -> dict[str, Any]:
        """Includes the type of the vectors."""
        return {**super().settings, "vector_dtype": self.vector_dtype}

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any], name: str = VECTORS_FILE) -> "ExactIndex":
        """Maps the vectors into memory."""
        index = cls(settings["dimension"], settings.get("vector_dtype", FLOAT32))  # version 2.0.0 had no other
        index.add(np.load(folder / name, mmap_mode="r", allow_pickle=False))
        index.delete(settings.get("deleted", ()))
        return index


class RescoredIndex(LocalIndex):
    """Finds candidates with rounded vectors, and chooses the best of them with those in float32.

    Both are kept. A search reads all of the rounded ones, a quarter of the bytes in int8, and the candidates' rows of
    the others, which stay on the disk if they are a memory map. vector_dtype: what the vectors are rounded to.
    """

    def __init__(self, dim: int, vector_dtype: str) -> None:
        super().__init__(dim)
        self._rounded, self._exact = ExactIndex(dim, vector_dtype), ExactIndex(dim)

    def __str__(self) -> str:
        return f"the index in {self._rounded.vector_dtype}, rescored in {FLOAT32},"

    def add(self, vectors: Any, documents: Sequence[str] = ()) -> None:
        """`VectorIndex.add`; the documents aren't kept."""
        super().add(vectors, documents)
        self._share_is_live()

    def _share_is_live(self) -> None:
        """Both parts leave out what is deleted, which changes the array in place."""
        self._rounded._is_live = self._exact._is_live = self._is_live

    def _add(self, vectors: np.ndarray, documents: Sequence[str]) -> None:
        self._rounded._add(vectors, documents)
        self._exact._add(vectors, documents)

    def _delete(self, ids: Sequence[int]) -> None:
        """Nothing to do: the parts leave the rows out."""

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, _ = self._rounded.search_exactly(queries, RESCORED_PER_HIT * k + MORE_RESCORED)
        similarities = self._exact.inner_products(queries, ids)
        order = np.lexsort((ids, -similarities))[:, :k]
        return np.take_along_axis(ids, order, axis=1), np.take_along_axis(similarities, order, axis=1)

    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self._exact._live_blocks()

    def save(self, folder: Path) -> None:
        """Writes a .npy file of each type."""
        self._rounded.save(folder, ROUNDED_FILE)
        self._exact.save(folder)

    @property
    def settings(self) -> dict[str, Any]:
        """Includes the type of the rounded vectors."""
        return {**super().settings, "vector_dtype": self._rounded.vector_dtype}

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "RescoredIndex":
        """Maps both files into memory."""
        index = cls(settings["dimension"], settings["vector_dtype"])
        index._rounded = ExactIndex.load(folder, settings, ROUNDED_FILE)
        index._exact = ExactIndex.load(folder, {**settings, "vector_dtype": FLOAT32})
        index._is_live = index._exact._is_live
        index._share_is_live()
        return index


class HnswIndex(LocalIndex, ApproximateIndex):
    """hnswlib's graph index: fast, finds nearly all nearest neighbours (Malkov and Yashunin 2016, arXiv:1603.09320).

    max_elements: vectors to reserve memory for, grows as needed; m: links per vector; ef_construction, ef: candidates
    kept while building and searching (at least k); threads: by default one per core. With several threads the graph
    varies slightly from build to build. Raises InputError if hnswlib is missing or the memory can't be reserved.
    """

    def __init__(
        self,
        dim: int,
        max_elements: int = 1,
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
            self.ef = ef
        except (RuntimeError, MemoryError, ValueError, TypeError):  # the last two: a number of more than 64 bits
            index = f"an HNSW index of {max_elements} vectors with {m} links each and ef {ef_construction}"
            remedy = "lower --hnsw_max_elements, --hnsw_m or --hnsw_ef"
            raise InputError(f"no memory for {index}: {remedy}") from None
        self._index.set_num_threads(threads or cpu_count())

    def __str__(self) -> str:
        return f"the hnswlib index (ef {self.ef})"

    @property
    def ef(self) -> int:
        """Candidates kept while searching."""
        return self._index.ef

    @ef.setter
    def ef(self, ef: int) -> None:
        self._index.set_ef(ef)

    def save(self, folder: Path) -> None:
        """Writes hnswlib's file."""
        file = folder / HNSW_FILE
        try:
            self._index.save_index(str(file))
        except RuntimeError as error:
            raise InputError(f"{file}: can't be written ({error})") from None
        written, size = file.stat().st_size, self._index.index_file_size()
        if written != size:  # hnswlib doesn't report a failed write
            raise InputError(f"{file}: can't be written (the disk took {written} of {size} bytes)")

    @property
    def settings(self) -> dict[str, Any]:
        """Includes `ef`, which hnswlib's file lacks."""
        return {**super().settings, "ef": self.ef, "target_recall": self.target_recall}

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "HnswIndex":
        """Reads hnswlib's file."""
        size = settings["documents"]
        index = cls(settings["dimension"], max_elements=1)
        index._index = _import_hnswlib().Index(space="ip", dim=index.dim)  # load_index warns on one that has a graph
        index._index.set_num_threads(cpu_count())
        try:
            index._index.load_index(str(folder / HNSW_FILE), max_elements=size)
        except (RuntimeError, MemoryError) as error:
            raise InputError(f"{folder / HNSW_FILE}: can't be loaded ({error}); build the index anew") from None
        index.ef = settings["ef"]  # load_index sets it to 10
        index.target_recall = settings.get("target_recall", settings.get("share", 0.0))  # version 1 called it share
        index.max_elements = size
        index._is_live = np.ones(size, bool)
        index._is_live[settings.get("deleted", [])] = False  # hnswlib's file has its own marks
        return index

    def _add(self, vectors: np.ndarray, documents: Sequence[str]) -> None:
        size = len(self) + len(vectors)
        if size > self.max_elements:
            reserved = max(size, self.max_elements + self.max_elements // HNSW_GROWTH)
            try:
                self._index.resize_index(reserved)
            except (RuntimeError, MemoryError):
                raise InputError(f"no memory for an HNSW index of {size} vectors") from None
            self.max_elements = reserved
        for block in _with_progress(_blocks(vectors, HNSW_BLOCK), len(vectors), "index", "vector"):
            self._index.add_items(block)

    def _delete(self, ids: Sequence[int]) -> None:
        for row in ids:
            self._index.mark_deleted(row)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = _with_progress(_blocks(queries, HNSW_BLOCK), len(queries), "search", "query")
        ids, similarities = zip(*(self._search_block(block, k) for block in blocks), strict=True)
        return np.concatenate(ids), np.concatenate(similarities)

    def _search_block(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._knn_query(queries, k)
        except RuntimeError:
            return self._search_one_by_one(queries, k)

    def _knn_query(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, distances = self._index.knn_query(queries, k)
        return ids.astype(np.int64), 1 - distances  # the distance of hnswlib's space "ip" is 1 - inner product

    def _search_one_by_one(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries the graph one by one, and searches exactly where it finds fewer than k vectors.

        One such query makes hnswlib fail for its whole batch. Parts of the graph that aren't connected are the cause,
        for example with many equal vectors, and deleted rows around the query; a larger ef doesn't help.
        """
        ids, similarities = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        unanswered = []
        for row in range(len(queries)):
            try:
                ids[row], similarities[row] = self._knn_query(queries[row : row + 1], k)
            except RuntimeError:
                unanswered.append(row)
        ids[unanswered], similarities[unanswered] = self.search_exactly(queries[unanswered], k)
        return ids, similarities

    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        ids = self.live_ids()
        for start in range(0, len(ids), CORPUS_BLOCK):
            rows = ids[start : start + CORPUS_BLOCK]
            yield rows, self._index.get_items(rows, return_type="numpy")


def build_index(options: IndexOptions, vectors: Any) -> LocalIndex:
    """The index that the options describe, of unit vectors [N, D], an array or `Embeddings`. Raises InputError."""
    if vectors.ndim != 2:
        raise InputError(f"the corpus vectors have the shape {vectors.shape}, where [rows, columns] is needed")
    rows, dim = vectors.shape
    check_index_args(options, rows)
    if options.ann == "exact":
        index: LocalIndex = ExactIndex(dim, options.vector_dtype)
    elif options.ann == RESCORED:
        index = RescoredIndex(dim, options.vector_dtype)
    else:
        ef = options.hnsw_ef
        index = HnswIndex(dim, options.hnsw_max_elements or max(1, rows), options.hnsw_m, ef_construction=ef, ef=ef)
        index.target_recall = DEFAULT_TARGET_RECALL if options.target_recall is None else options.target_recall
    index.add(vectors)
    return index


def smallest_ef(is_enough: Callable[[int], bool], lowest: int) -> int:
    """The smallest `ef` >= lowest for which `is_enough` holds; if there is none, max(lowest, MAX_EF).

    If `is_enough` holds for an ef, it must hold for every larger one.
    """
    low = high = lowest
    while not is_enough(high) and high < MAX_EF:
        low, high = high, min(2 * high, MAX_EF)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return high


def recall_vs_exact(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of exact search's hits that an index found, from 0 to 1; both are similarities [Q, k], best first.

    A hit counts if it is as similar as the exact k-th hit: which of several equal documents it is doesn't matter.
    """
    return float(np.mean(found >= exact[:, -1:] - TIE_TOLERANCE))


def _blocks(vectors: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Blocks of up to `rows` vectors, in float32."""
    for start in range(0, len(vectors), rows):
        yield to_float32(vectors[start : start + rows])


def _with_progress(blocks: Iterable[np.ndarray], rows: int, desc: str, unit: str) -> Iterator[np.ndarray]:
    """The blocks, with a progress bar over all their rows."""
    with progress_bar(rows, desc, unit) as progress:
        for block in blocks:
            yield block
            progress.update(len(block))


def check_unit_vectors(vectors: np.ndarray, dim: int, name: str, first_row: int) -> None:
    """Raises InputError for a shape other than [rows, dim], and for a row that isn't finite or whose norm isn't 1.

    name: "corpus" or "query", and first_row: the number of the first vector, are for the message.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise InputError(f"the {name} vectors have the shape {vectors.shape}, where [rows, {dim}] is needed")
    for block in _blocks(vectors, CORPUS_BLOCK):
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))  # "not <=" is true for NaN
        if len(bad):
            row = bad[0]
            problem = f"{name} vector {first_row + row} (counted from 0) has norm {norms[row]:.4g} instead of 1"
            raise InputError(f"{problem}: look at its text and at the weights of the model")
        first_row += len(block)


def _exact_top_k(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], queries: np.ndarray, k: int, progress: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [Q, k] and similarities [Q, k] of the k best rows of all `blocks`, which together have at least k rows.

    blocks: ids [B] and vectors [B, dim], as of `VectorIndex._live_blocks`.
    """
    ids = np.zeros((len(queries), k), np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    for block_ids, block in blocks:
        for start in range(0, len(queries), QUERY_BLOCK):
            part = slice(start, start + QUERY_BLOCK)
            scores = queries[part] @ block.T
            ids[part], similarities[part] = _merge(ids[part], similarities[part], scores, block_ids)
        progress.update(len(block))
    return ids, similarities


def _merge(
    ids: np.ndarray, similarities: np.ndarray, scores: np.ndarray, block_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of the k so far (ids, similarities [Q, k]) and of a block with larger ids [B] (scores [Q, B])."""
    query_count, k = ids.shape
    # A score must be above the worst so far (of equal ones the smaller id counts) and among the block's k best.
    lowest = np.nextafter(similarities[:, -1], np.float32(np.inf))
    has_too_many = np.count_nonzero(scores >= lowest[:, None], axis=1) > k
    if has_too_many.any():
        lowest[has_too_many] = np.partition(scores[has_too_many], -k, axis=1)[:, -k]
    queries, columns = np.nonzero(scores >= lowest[:, None])
    similarities = np.concatenate([similarities.ravel(), scores[queries, columns]])
    ids = np.concatenate([ids.ravel(), block_ids[columns]])
    queries = np.concatenate([np.repeat(np.arange(query_count), k), queries])
    order = np.lexsort((ids, -similarities, queries))
    firsts = np.searchsorted(queries[order], np.arange(query_count))
    best = order[firsts[:, None] + np.arange(k)]
    return ids[best], similarities[best]
