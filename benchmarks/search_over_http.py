"""Search over HTTP beside encoding over HTTP and beside hnswlib in one process: `bench_serving.py --search`.

Two services of the same model run and take turns: `search` has an index, `encode_only` has none. `hnswlib` is this
process, which searches the same file for batches of vectors that are ready.
"""

import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import hnswlib
import numpy as np

from ann_util import HNSW_FILE, HnswIndex, IndexOptions, build_index
from benchmarks.load_generator import (
    TOLERANCE,
    Measured,
    Served,
    Way,
    check_vector,
    measure_batches,
    measure_service,
    speeds,
    take_turns,
)
from benchmarks.service_clients import Service, http_client, read_metrics, running_service, search_client
from common.errors import InputError
from encoding.exported_files import read_card
from retrieval.corpus import Corpus
from retrieval.documents import Documents
from retrieval.saved_index import LocalDocumentIndex, load_index, save_index
from serving.http_routes import DEFAULT_TOP_K

HNSWLIB, ENCODE_ONLY, SEARCH, ONE_CLIENT = "hnswlib", "encode_only", "search", "search_one_client"
DEFAULT_DOCUMENTS = 20_000
OFFSET_BYTES = 8  # in memory of each document's place in the file
LARGE_INDEX = 500_000_000  # bytes
# Of an answer's hits. A text's vector varies within TOLERANCE with the texts of its batch, and a search may then take
# another path through the graph.
SAME_HITS = 0.8
KIB, MB = 1024, 1e6


# ---------------------------------------------------------------------------------------------------------------------
# The index


def make_index(folder: Path, model_dir: Path, titles: Sequence[str], documents: int, hnsw_m: int) -> None:
    """Saves an index of random unit vectors, whose documents are numbered titles. Raises InputError."""
    card = read_card(model_dir)
    with tempfile.TemporaryDirectory() as name:
        corpus_file = Path(name) / "documents.txt"
        corpus_file.write_text("".join(f"{titles[row % len(titles)]} {row}\n" for row in range(documents)), "utf-8")
        corpus = Corpus(corpus_file)
        vectors = np.random.default_rng(0).standard_normal((documents, card.embedding_size), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        index = build_index(IndexOptions(hnsw_m=hnsw_m), vectors)
        save_index(folder, LocalDocumentIndex(index, Documents(corpus), card.fingerprint, corpus.sha256, "fp32"))


def open_index(folder: Path, model_dir: Path, documents: int | None) -> LocalDocumentIndex:
    """The saved index in a folder. Raises InputError for one of another model or kind, or of another size if given."""
    saved = load_index(folder, read_card(model_dir).fingerprint)
    if not isinstance(saved.index, HnswIndex) or saved.lexical is not None:
        raise InputError(f"--index_dir {folder}: isn't an hnswlib index of vectors alone; give another folder")
    if documents not in (None, len(saved.index)):
        problem = f"has {len(saved.index)} documents, not --search_documents {documents}"
        raise InputError(f"--index_dir {folder}: {problem}; leave one of the two options out")
    return saved


def load_hnswlib(folder: Path, index: HnswIndex) -> hnswlib.Index:
    """The same index, read and set up as hnswlib's README shows it."""
    bare = hnswlib.Index(space="ip", dim=index.dim)
    bare.load_index(str(folder / HNSW_FILE))
    bare.set_ef(index.ef)
    return bare


# ---------------------------------------------------------------------------------------------------------------------
# Right answers


class Expected(NamedTuple):
    """The hits of each text, found in this process."""

    ids: np.ndarray  # int64 [N, k]
    scores: np.ndarray  # cosines, float32 [N, k]
    documents: Mapping[int, str]  # by id


def expected_hits(saved: LocalDocumentIndex, vectors: np.ndarray) -> Expected:
    """The best hits of vectors [N, D], as many as the service returns by default."""
    ids, scores = saved.index.search(vectors, DEFAULT_TOP_K)
    return Expected(ids, scores, {row: saved.documents[row] for row in np.unique(ids).tolist()})


def check_hits(
    texts: Sequence[str], expected: Expected, row: int, answer: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Raises AssertionError unless the answer to a text has its hits with their cosines and documents."""
    (hits,) = answer
    scores = dict(zip(expected.ids[row].tolist(), expected.scores[row].tolist(), strict=True))
    right = sum(
        hit["id"] in scores
        and abs(hit["score"] - scores[hit["id"]]) <= TOLERANCE
        and hit["document"] == expected.documents[hit["id"]]
        for hit in hits
    )
    if len(hits) != len(scores) or right < SAME_HITS * len(scores):
        raise AssertionError(f"{texts[row]}: {right} of {len(hits)} hits are those of a search in one process")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def anonymous_memory(pid: int) -> int:
    """Resident bytes of a process and those that it started, without the pages of mapped files, such as documents."""
    parents, sizes = {}, {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):  # it has ended
            fields = dict(re.findall(r"^(PPid|RssAnon):\s*(\d+)", status.read_text("utf-8"), re.MULTILINE))
            process = int(status.parent.name)
            parents[process], sizes[process] = int(fields["PPid"]), int(fields.get("RssAnon", 0)) * KIB
    family = [pid]
    for process in family:  # grows meanwhile
        family += [child for child, parent in parents.items() if parent == process]
    return sum(sizes[process] for process in family)


def memory_figures(search: Service, encode_only: Service, folder: Path, documents: int) -> dict[str, Any]:
    """What the index adds to the service's memory, divided by its size: its file's, and the places of its documents.

    The quotient is left out for an index that is small beside what the services differ in anyway.
    """
    of_search, of_encode_only = (anonymous_memory(service.process.pid) for service in (search, encode_only))
    index_bytes = (folder / HNSW_FILE).stat().st_size + OFFSET_BYTES * documents
    quotient = {"memory_vs_index": round((of_search - of_encode_only) / index_bytes, 3)}
    return {
        **(quotient if index_bytes > LARGE_INDEX else {}),
        "memory_mb": {
            SEARCH: round(of_search / MB, 1),
            ENCODE_ONLY: round(of_encode_only / MB, 1),
            "index": round(index_bytes / MB, 1),
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


def measure_search(
    served: Served, folder: Path, documents: int | None, rounds: int, seconds: float
) -> tuple[dict[str, list[Measured]], dict[str, Any]]:
    """(what each way did, ratios and figures of the index). Raises InputError, and AssertionError for a wrong answer.

    folder: of a saved index; documents: how many it must have, if given; seconds: of each way in each round.
    """
    saved = open_index(folder, served.model_dir, documents)
    documents, expected = len(saved.index), expected_hits(saved, served.vectors)
    bare = load_hnswlib(folder, saved.index)
    del saved
    with ExitStack() as stack:
        encode_only = stack.enter_context(running_service(served.model_dir, *served.options))
        start = time.perf_counter()
        search = stack.enter_context(running_service(served.model_dir, *served.options, "--index_dir", str(folder)))
        ready_seconds = time.perf_counter() - start
        with search_client(search) as client:
            check_hits(served.texts, expected, 0, client(served.texts[:1]))
        first_search_seconds = time.perf_counter() - start
        measured = take_turns(ways_to_measure(served, expected, bare, search, encode_only, seconds), rounds)
        memory = memory_figures(search, encode_only, folder, documents)
    speed = speeds(measured)
    figures = {
        "search_vs_encode_only": round(speed[SEARCH] / speed[ENCODE_ONLY], 3),
        "search_vs_hnswlib": round(speed[SEARCH] / speed[HNSWLIB], 4),
        "ready_seconds": round(ready_seconds, 2),
        "first_search_seconds": round(first_search_seconds, 2),
        **memory,
        "documents": documents,
        "hnsw_m": bare.M,
        "ef": bare.ef,
    }
    return measured, figures


def ways_to_measure(
    served: Served, expected: Expected, bare: hnswlib.Index, search: Service, encode_only: Service, seconds: float
) -> dict[str, Callable[[], Measured]]:
    """What measures each way for a round."""
    texts, vectors, clients = served.texts, served.vectors, served.clients
    check_encoded, check_found = partial(check_vector, texts, vectors), partial(check_hits, texts, expected)
    encode_way = Way(partial(http_client, encode_only), check_encoded, partial(read_metrics, encode_only))
    search_way = Way(partial(search_client, search), check_found, partial(read_metrics, search))
    batches = cycle([vectors[start : start + clients] for start in range(0, len(vectors), clients)])
    return {
        HNSWLIB: partial(measure_batches, partial(bare.knn_query, k=DEFAULT_TOP_K), batches, seconds),
        ENCODE_ONLY: partial(measure_service, encode_way, texts, clients, seconds),
        SEARCH: partial(measure_service, search_way, texts, clients, seconds),
        ONE_CLIENT: partial(measure_service, search_way, texts, 1, seconds),
    }
