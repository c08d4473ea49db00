"""Builds one index over given vectors and searches it: one of ours, of hnswlib, faiss or Milvus, in its own process."""

import argparse
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ann_util import DEFAULT_TARGET_RECALL, RESCORED, HnswIndex, IndexOptions, build_index, recall_vs_exact, smallest_ef
from benchmarks.harness import peak_memory
from common.cli import ArgumentParser, number_in_range, run
from common.cpu import cpu_count
from common.files import write_json
from common.vector_dtypes import INT8, VECTOR_DTYPES
from retrieval.milvus_collection import CollectionInfo
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import MilvusServer, connect

EXACT = {f"exact_{vector_dtype}": IndexOptions("exact", vector_dtype=vector_dtype) for vector_dtype in VECTOR_DTYPES}
EXACT["rescored_int8"] = IndexOptions(RESCORED, vector_dtype=INT8)
FAISS_ENGINES = ("faiss", "faiss_sq8")
ENGINES = ("ours", "hnswlib", *FAISS_ENGINES, *EXACT)
MILVUS = "milvus"
REPEATS = 5  # of the timed search
TUNED_ON = 200  # queries that our default ef is tuned on; it is measured on the others
OPTIONS = IndexOptions()  # all engines get the links and the ef that are our defaults


class Engine(ABC):
    """An index over unit vectors [N, D]."""

    has_ef = True

    @abstractmethod
    def __init__(self, vectors: np.ndarray) -> None: ...

    def set_ef(self, ef: int) -> None:  # noqa: B027 - exact search has none
        """Candidates kept while searching."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the k hits, float32 [Q, k], best first; of rounded vectors in an index of those."""

    def float32_cosines(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the k hits with the vectors before rounding, float32 [Q, k]."""
        return self.search(queries, k)

    def highest_recall(self, queries: np.ndarray, exact: np.ndarray) -> float:
        """The share of exact search's hits (cosines [Q, k]) that rounding the vectors leaves to be found."""
        return 1.0


def cosines_of(ids: np.ndarray, queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The cosine of each query with its rows, float32 [Q, k]; that with a row of -1, which is none, is -1."""
    rows = zip(queries, ids, strict=True)
    return np.stack([np.where(row >= 0, vectors[row] @ query, np.float32(-1)) for query, row in rows])


class Ours(Engine):
    """What recall.py does."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.index: HnswIndex = build_index(OPTIONS, vectors)

    def set_ef(self, ef: int) -> None:
        """Sets the candidates of a search."""
        self.index.ef = ef

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the hits, float32 [Q, k]."""
        return self.index.search(queries, k)[1]

    def default_recall(self, queries: np.ndarray, exact: np.ndarray) -> float:
        """Share of exact search's hits (cosines [Q, k]) that the default setting finds for queries new to it."""
        k = exact.shape[1]
        self.index.tune_ef(queries[:TUNED_ON], k, DEFAULT_TARGET_RECALL)
        return recall_vs_exact(self.search(queries[TUNED_ON:], k), exact[TUNED_ON:])


class Hnswlib(Engine):
    """The library as its README shows it, on all cores."""

    def __init__(self, vectors: np.ndarray) -> None:
        import hnswlib

        self.index = hnswlib.Index(space="ip", dim=vectors.shape[1])
        self.index.init_index(max_elements=len(vectors), M=OPTIONS.hnsw_m, ef_construction=OPTIONS.hnsw_ef)
        self.index.set_num_threads(cpu_count())
        self.index.add_items(vectors)

    def set_ef(self, ef: int) -> None:
        """Sets the candidates of a search."""
        self.index.set_ef(ef)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the hits, float32 [Q, k]."""
        return 1 - self.index.knn_query(queries, k)[1]


class Faiss(Engine):
    """faiss's HNSW with flat storage, on all cores."""

    def __init__(self, vectors: np.ndarray) -> None:
        import faiss

        faiss.omp_set_num_threads(cpu_count())
        self.index = faiss.IndexHNSWFlat(vectors.shape[1], OPTIONS.hnsw_m, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = OPTIONS.hnsw_ef
        self.index.add(vectors)

    def set_ef(self, ef: int) -> None:
        """Sets the candidates of a search."""
        self.index.hnsw.efSearch = ef

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the hits, float32 [Q, k]."""
        return self.index.search(queries, k)[0]


class FaissSq8(Engine):
    """faiss's HNSW over components in 8 bits, with the range of each dimension, on all cores."""

    def __init__(self, vectors: np.ndarray) -> None:
        import faiss

        faiss.omp_set_num_threads(cpu_count())
        bits, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        self.vectors, self.index = vectors, faiss.IndexHNSWSQ(vectors.shape[1], bits, OPTIONS.hnsw_m, metric)
        self.index.hnsw.efConstruction = OPTIONS.hnsw_ef
        self.index.train(vectors)
        self.index.add(vectors)

    def set_ef(self, ef: int) -> None:
        """Sets the candidates of a search."""
        self.index.hnsw.efSearch = ef

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the hits, float32 [Q, k]."""
        return self.index.search(queries, k)[0]

    def float32_cosines(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Those of the given vectors."""
        return cosines_of(self.index.search(queries, k)[1], queries, self.vectors)

    def highest_recall(self, queries: np.ndarray, exact: np.ndarray) -> float:
        """That of comparing each query with each code."""
        import faiss

        ids = faiss.downcast_index(self.index.storage).search(queries, exact.shape[1])[1]
        return recall_vs_exact(cosines_of(ids, queries, self.vectors), exact)


class Exact(Engine):
    """What recall.py does with --ann exact or rescored; vectors in float32 are the given ones, without a copy."""

    has_ef = False

    def __init__(self, vectors: np.ndarray, options: IndexOptions) -> None:
        self.vectors = vectors
        self.index = build_index(options, vectors)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the hits, float32 [Q, k]."""
        return self.index.search(queries, k)[1]

    def float32_cosines(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Those of the given vectors."""
        return cosines_of(self.index.search(queries, k)[0], queries, self.vectors)


class Milvus(Engine):
    """What recall.py --ann milvus does, with a document for each vector. The server builds the index."""

    def __init__(self, vectors: np.ndarray, uri: str) -> None:
        self.server, name = MilvusServer(uri), f"bench_search_{uuid.uuid4().hex[:12]}"
        info = CollectionInfo(name, name, "fp32", True, vectors.shape[1])
        documents = [f"document {row}" for row in range(len(vectors))]
        self.index = MilvusIndex.create(self.server, name, info, OPTIONS, len(vectors))
        self.index.add(vectors, documents)
        self.index.finish(documents)

    def set_ef(self, ef: int) -> None:
        """Sets the candidates of a search."""
        self.index.ef = ef

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Cosines of the hits, float32 [Q, k]."""
        return self.index.search(queries, k)[1]

    def drop(self) -> None:
        """Removes the collection from the server."""
        connect(self.server).drop_collection(self.index.name)


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    make: Callable[[np.ndarray], Engine],
    vectors: np.ndarray,
    queries: np.ndarray,
    exact: np.ndarray,
    target_recall: float,
) -> dict:
    """Seconds of building, and of a search with the smallest ef that finds this share of exact search's hits.

    An index of rounded vectors has to find this share of those that rounding leaves to be found. exact: the cosines of
    exact search's hits [Q, k]. added_bytes: by how much the process's largest resident memory grew meanwhile.
    """
    memory, start = peak_memory(), time.perf_counter()
    engine = make(vectors)
    build_seconds = time.perf_counter() - start
    try:
        measured = measure_searches(engine, queries, exact, target_recall)
    finally:
        if isinstance(engine, Milvus):
            engine.drop()
    return {"build_seconds": build_seconds, "added_bytes": peak_memory() - memory, **measured}


def measure_searches(engine: Engine, queries: np.ndarray, exact: np.ndarray, target_recall: float) -> dict:
    """What `measure` reports of the searches."""
    k = exact.shape[1]

    def found(ef: int) -> float:
        engine.set_ef(ef)
        return recall_vs_exact(engine.float32_cosines(queries, k), exact)

    target_recall *= engine.highest_recall(queries, exact)
    ef = smallest_ef(lambda ef: found(ef) >= target_recall, k) if engine.has_ef else k
    measured = {"ef": ef if engine.has_ef else None, "recall_vs_exact": found(ef)}
    measured["search_seconds"] = [seconds_of(lambda: engine.search(queries, k)) for _ in range(REPEATS)]
    if isinstance(engine, Ours):
        measured["default_recall"] = engine.default_recall(queries, exact)
    return measured


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=(*ENGINES, MILVUS), required=True, help="index to measure")
    parser.add_argument("--milvus", metavar="URI", help="address of a Milvus server, or a folder for an embedded one")
    parser.add_argument("--vectors", required=True, help="unit vectors, float32 [N, D], a .npy file")
    parser.add_argument("--queries", required=True, help="unit vectors, float32 [Q, D], a .npy file")
    parser.add_argument("--exact", required=True, help="cosines of exact search's hits, float32 [Q, k], a .npy file")
    parser.add_argument(
        "--target_recall", type=number_in_range(0.0, float, 1.0), default=0.99, help="share of them to find"
    )
    parser.add_argument("--report", required=True, help="JSON file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and reports."""
    args = build_parser().parse_args(argv)
    engines = {"ours": Ours, "hnswlib": Hnswlib, "faiss": Faiss, "faiss_sq8": FaissSq8}
    engines |= {name: partial(Exact, options=options) for name, options in EXACT.items()}
    engines[MILVUS] = partial(Milvus, uri=args.milvus)
    vectors, queries, exact = (np.load(path) for path in (args.vectors, args.queries, args.exact))
    write_json(Path(args.report), measure(engines[args.engine], vectors, queries, exact, args.target_recall))
    return 0


if __name__ == "__main__":
    run(main)
