"""The one way from a corpus and queries to hits, for recall.py and for the evaluation during training.

All ranks encode; rank 0 alone indexes and searches.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ann_util import HnswIndex, IndexOptions, VectorIndex, build_index, recall_vs_exact
from common.distributed import barrier, broadcast_object, encode_on_all_ranks, init_ranks
from common.errors import InputError
from common.logs import is_main_process, log, progress_bar
from data import Corpus, Hit, encode_texts
from encoding.encoder import Encoder
from retrieval.embedding_store import SHARD_ROWS, Embeddings, EmbeddingsMetadata, temporary_folder
from retrieval.saved_index import DocumentIndex, has_index, load_index, locked_index, save_index

Rows = TypeVar("Rows", Sequence[str], np.ndarray)
SAMPLE = 200  # a sample of queries has 200 to 399 of them, or all if there are fewer


class SearchResult(NamedTuple):
    """The hits of a search; row q of both arrays belongs to the q-th query, best first."""

    ids: np.ndarray  # int64 [Q, k], rows of the corpus
    similarities: np.ndarray  # float32 [Q, k], cosines
    recall_vs_exact: float  # share of exact search's hits that the index found, on a sample of the queries


def encode_queries(encoder: Encoder, queries: Sequence[str]) -> np.ndarray:
    """Vectors of the queries, float32 [Q, D], on all ranks; each rank encodes a share."""
    size = encoder.embedding_size
    return encode_on_all_ranks(len(queries), size, lambda share: encoder.encode(queries[share], "queries"))


def pair_cosines(encoder: Encoder, queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """Cosines of each query with the title of the same row, float32 [N], on all ranks; each rank computes a share."""

    def cosines(rows: slice) -> np.ndarray:
        vectors = encoder.encode(queries[rows], "queries") * encoder.encode(titles[rows], "titles")
        return vectors.sum(axis=1, keepdims=True)

    return encode_on_all_ranks(len(queries), 1, cosines)[:, 0]


def encode_corpus(encoder: Encoder, corpus: Corpus, folder: Path) -> Embeddings:
    """The vectors of all documents, on disk. Existing shards are reused; the ranks divide the missing ones.

    Raises InputError if a vector isn't finite, or if the folder holds vectors of another corpus or model.
    """
    what = (encoder.fingerprint, encoder.precision, corpus.sha256, len(corpus), encoder.embedding_size)
    embeddings = Embeddings(folder, EmbeddingsMetadata(*what))
    rank, world_size = init_ranks()
    own_shards = [number for number in embeddings.missing() if number % world_size == rank]
    shards = embeddings.shards
    text_count = sum(shards[number].stop - shards[number].start for number in own_shards)
    with progress_bar(text_count, "corpus", "text") as progress:
        for number in own_shards:
            texts = corpus[shards[number]]
            vectors = encode_texts(encoder.embed, texts, encoder.tokenizer, encoder.batch_size, progress)
            embeddings.write(number, vectors)
    barrier()
    if embeddings.missing():
        raise InputError(f"{folder}: lacks vectors of other processes; all machines must see the same folder")
    return embeddings


@contextlib.contextmanager
def open_or_build_index(
    encoder: Encoder,
    query_vectors: np.ndarray,
    k: int,
    *,
    corpus: Corpus | None,
    options: IndexOptions,
    parent: str | Path,
    added: Corpus | None = None,
    index_dir: str | Path | None = None,
    embedding_dir: str | Path | None = None,
) -> Iterator[DocumentIndex | None]:
    """Yields the index to search on rank 0, None on the others.

    An index in `index_dir` is loaded; `added` or a target recall updates it there. Without one, `corpus` is encoded,
    indexed, and saved to `index_dir` if that is given, which `added` needs. query_vectors, k: the searches to tune `ef`
    for, unit vectors [Q, D]. parent, embedding_dir: see `new_index`. Raises InputError.
    """
    if index_dir and has_index(index_dir):
        if not is_main_process():
            yield None
        elif added or options.target_recall is not None:
            yield update_index(index_dir, encoder, query_vectors, k, corpus=corpus, added=added, options=options)
        else:
            yield load_index(index_dir, encoder.fingerprint, corpus)
        return
    if corpus is None:
        raise InputError("there is neither a saved index nor a corpus to search")
    with new_index(encoder, corpus, options, parent, embedding_dir) as saved:
        if saved:
            new_documents = add_documents(encoder, saved, added) if added else []
            tune(saved.index, encoder, corpus, query_vectors, k)
            if index_dir and has_index(index_dir):
                raise InputError(f"{index_dir}: another run has written it meanwhile; start again to search that")
            saved = save_index(index_dir, saved, new_documents) if index_dir else saved
        yield saved


@contextlib.contextmanager
def new_index(
    encoder: Encoder, corpus: Corpus, options: IndexOptions, parent: str | Path, embedding_dir: str | Path | None = None
) -> Iterator[DocumentIndex | None]:
    """Encodes the corpus on all ranks, and indexes it on rank 0; None on the others.

    The vectors are kept in `embedding_dir`, by default in a temporary folder in `parent` until the block ends.
    """
    with contextlib.ExitStack() as held:
        if not embedding_dir:
            folder = held.enter_context(temporary_folder(Path(parent))) if is_main_process() else None
            embedding_dir = broadcast_object(folder)
        embeddings = encode_corpus(encoder, corpus, Path(embedding_dir))
        if is_main_process():
            yield DocumentIndex(build_index(options, embeddings), corpus, encoder.fingerprint, corpus.sha256)
        else:
            yield None


def update_index(
    index_dir: str | Path,
    encoder: Encoder,
    query_vectors: np.ndarray,
    k: int,
    *,
    corpus: Corpus | None,
    added: Corpus | None,
    options: IndexOptions,
) -> DocumentIndex:
    """Under a lock on the saved index: adds `added`, if given, tunes `ef` for the target recall, if any, and saves it.

    Without a target recall in the options the index keeps its own, and its `ef` doesn't decrease. Raises InputError.
    """
    with locked_index(index_dir):
        saved = load_index(index_dir, encoder.fingerprint, corpus)
        lowest_ef = 0
        if isinstance(saved.index, HnswIndex):
            if options.target_recall is None:  # tuning for a smaller k than the last run's must not lower ef
                lowest_ef = saved.index.ef
            else:
                saved.index.target_recall, saved.index.ef = options.target_recall, options.hnsw_ef
        new_documents = add_documents(encoder, saved, added) if added else []
        tune(saved.index, encoder, saved.documents, query_vectors, k, lowest_ef)
        return save_index(index_dir, saved, new_documents)


def add_documents(encoder: Encoder, saved: DocumentIndex, added: Corpus) -> list[str]:
    """Adds the documents that the index doesn't have, and returns them. Raises InputError if it has all of them."""
    new = dict.fromkeys(added)
    for document in saved.documents:
        new.pop(document, None)
    if not new:
        raise InputError(f"--add_corpus {added.path}: the index has all of its documents already")
    if len(new) < len(added):
        log(f"{added.path}: left out {len(added) - len(new)} documents that the index has")
    documents = list(new)
    for start in range(0, len(documents), SHARD_ROWS):
        saved.index.add(encoder.encode(documents[start : start + SHARD_ROWS], "added"))
    return documents


def sample_of(rows: Rows, *, other: bool = False) -> Rows:
    """Up to twice SAMPLE of the rows, spread evenly; `other` gives different ones of 2 * SAMPLE rows or more."""
    step = max(1, len(rows) // SAMPLE)
    return rows[step // 2 if other else 0 :: step]


def tune(
    index: VectorIndex,
    encoder: Encoder,
    documents: Sequence[str],
    query_vectors: np.ndarray,
    k: int,
    lowest_ef: int = 0,
) -> None:
    """Tunes `ef` for the index's target recall, if it has one, on a sample of the queries, unit vectors [Q, D].

    From 2 * SAMPLE queries on, it isn't the sample on which `search` measures the recall. Without queries, documents
    stand in for them. `ef` doesn't fall below lowest_ef.
    """
    if isinstance(index, HnswIndex) and index.target_recall:
        has_queries = len(query_vectors) > 0
        sample = sample_of(query_vectors, other=True) if has_queries else encoder.encode(sample_of(documents))
        index.tune_ef(sample, k, index.target_recall)
        index.ef = max(index.ef, lowest_ef)


def search(index: VectorIndex, query_vectors: np.ndarray, k: int) -> SearchResult:
    """Searches for all queries, unit vectors [Q, D], and compares a sample with exact search."""
    ids, similarities = index.search(query_vectors, k)
    _, expected = index.search_exactly(sample_of(query_vectors), k)
    return SearchResult(ids, similarities, recall_vs_exact(sample_of(similarities), expected))


def hits_of(result: SearchResult, documents: Sequence[str], queries: Sequence[str]) -> Iterator[Hit]:
    """The hits of all queries in their order, best first."""
    for query, ids, similarities in zip(queries, result.ids, result.similarities, strict=True):
        for row, similarity in zip(ids, similarities, strict=True):
            yield Hit(query, documents[row], float(similarity))
