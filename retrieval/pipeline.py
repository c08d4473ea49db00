"""From a corpus and queries to hits, for recall.py and for the evaluation during training.

All ranks encode; only rank 0 indexes and searches.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from ann_util import (
    RESCORED,
    ApproximateIndex,
    HnswIndex,
    IndexOptions,
    VectorIndex,
    build_index,
    recall_vs_exact,
    report_small_memory,
)
from common.distributed import barrier, broadcast_object, encode_on_all_ranks, init_ranks
from common.errors import InputError
from common.logs import is_main_process, log, progress_bar
from common.texts import DOCUMENT, QUERY, TextSet
from common.vector_dtypes import FLOAT32, VECTOR_DTYPES
from data import encode_texts
from encoding.text_encoder import Encoder
from retrieval.corpus import Corpus
from retrieval.documents import Documents
from retrieval.embedding_store import SHARD_ROWS, Embeddings, EmbeddingsMetadata, stored_vector_dtype, temporary_folder
from retrieval.lexical_index import Fusion, LexicalIndex
from retrieval.saved_index import LocalDocumentIndex, has_index, has_lexical_index, load_index, locked_index, save_index

Rows = TypeVar("Rows", Sequence[str], np.ndarray)
SAMPLE = 200  # a sample has 200 to 399 rows, or all if there are fewer than 400


def encode_queries(encoder: Encoder, queries: Sequence[str]) -> np.ndarray:
    """Vectors of the queries, float32 [Q, D], on all ranks; each rank encodes a part."""
    size = encoder.embedding_size
    return encode_on_all_ranks(len(queries), size, lambda rows: encoder.encode(queries[rows], "queries", QUERY))


def pair_cosines(encoder: Encoder, queries: Sequence[str], titles: Sequence[str]) -> np.ndarray:
    """The cosine of each query with the title in the same row, float32 [N], on all ranks; each rank computes a part."""

    def cosines(rows: slice) -> np.ndarray:
        query_vectors = encoder.encode(queries[rows], "queries", QUERY)
        return (query_vectors * encoder.encode(titles[rows], "titles", DOCUMENT)).sum(axis=1, keepdims=True)

    return encode_on_all_ranks(len(queries), 1, cosines)[:, 0]


def encode_corpus(
    encoder: Encoder, corpus: Corpus | Documents, folder: Path, vector_dtype: str = FLOAT32
) -> Embeddings:
    """The vectors of all documents, on disk. Existing shards are reused; the ranks divide the missing ones.

    vector_dtype: one of VECTOR_DTYPES; a folder with more exact vectors keeps their type. Raises InputError for a
    vector whose norm isn't 1, and if the folder has other or less exact vectors or isn't shared by all ranks.
    """
    dim, stored = encoder.embedding_size, stored_vector_dtype(folder)
    if stored in VECTOR_DTYPES[: VECTOR_DTYPES.index(vector_dtype)]:
        log(f"{folder}: keeps its vectors in {stored}, which is more exact than --vector_dtype {vector_dtype}")
        vector_dtype = stored
    metadata = EmbeddingsMetadata(encoder.fingerprint, encoder.precision, corpus.sha256, len(corpus), dim)
    embeddings = Embeddings(folder, metadata._replace(vector_dtype=vector_dtype))
    rank, world_size = init_ranks()
    own_shards = [number for number in embeddings.missing() if number % world_size == rank]
    shards = embeddings.shards
    text_count = sum(shards[number].stop - shards[number].start for number in own_shards)
    with progress_bar(text_count, "corpus", "text") as progress:
        for number in own_shards:
            texts = encoder.tokenizer.prefixed(corpus[shards[number]], DOCUMENT)
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
    words: Fusion | None = None,
) -> Iterator[LocalDocumentIndex | None]:
    """Yields the index to search on rank 0, and None on the others.

    A saved index in index_dir is loaded; `added`, a target recall, or `words` if it has none, updates it there.
    Otherwise `corpus` is encoded and indexed, and the index is saved if index_dir is given, which `added` requires.
    query_vectors, float32 [Q, D], and k: the searches to tune `ef` for. words: the index gets the words of its
    documents, with this fusion unless it has them. parent, embedding_dir: see `new_index`. Raises InputError.
    """
    if index_dir and has_index(index_dir):
        if not is_main_process():
            yield None
        elif added or options.target_recall is not None or (words and not has_lexical_index(index_dir)):
            search = encoder, query_vectors, k
            yield update_index(index_dir, *search, corpus=corpus, added=added, options=options, words=words)
        else:
            yield load_index(index_dir, encoder.fingerprint, corpus, encoder.precision)
        return
    if corpus is None:
        raise InputError("there is neither a saved index nor a corpus to search")
    with new_index(encoder, corpus, options, parent, embedding_dir) as new:
        if new:
            new_documents = add_documents(encoder, new, added) if added else []
            tune(new.index, encoder, corpus, query_vectors, k)
            new = with_words(new, new_documents, words) if words else new
            if index_dir and has_index(index_dir):
                raise InputError(f"{index_dir}: another run has written it meanwhile; start again to search that")
            new = save_index(index_dir, new, new_documents) if index_dir else new
        yield new


@contextlib.contextmanager
def new_index(
    encoder: Encoder, corpus: Corpus, options: IndexOptions, parent: str | Path, embedding_dir: str | Path | None = None
) -> Iterator[LocalDocumentIndex | None]:
    """Encodes the corpus on all ranks, see `encoded_corpus`; yields its index on rank 0, and None on the others."""
    if is_main_process():
        report_small_memory(options, len(corpus), encoder.embedding_size)
    vector_dtype = FLOAT32 if options.ann == RESCORED else options.vector_dtype
    with encoded_corpus(encoder, corpus, parent, embedding_dir, vector_dtype) as embeddings:
        if is_main_process():
            index = build_index(options, embeddings)
            about = encoder.fingerprint, corpus.sha256, encoder.precision
            yield LocalDocumentIndex(index, Documents(corpus), *about)
        else:
            yield None


@contextlib.contextmanager
def encoded_corpus(
    encoder: Encoder,
    corpus: Corpus,
    parent: str | Path,
    embedding_dir: str | Path | None = None,
    vector_dtype: str = FLOAT32,
) -> Iterator[Embeddings]:
    """The vectors of the corpus, which all ranks encode.

    They are kept in embedding_dir or, without it, in a temporary folder in `parent` until the block ends.
    vector_dtype: see `encode_corpus`.
    """
    with contextlib.ExitStack() as stack:
        if not embedding_dir:
            folder = stack.enter_context(temporary_folder(Path(parent))) if is_main_process() else None
            embedding_dir = broadcast_object(folder)
        yield encode_corpus(encoder, corpus, Path(embedding_dir), vector_dtype)


def update_index(
    index_dir: str | Path,
    encoder: Encoder,
    query_vectors: np.ndarray,
    k: int,
    *,
    corpus: Corpus | None,
    added: Corpus | None,
    options: IndexOptions,
    words: Fusion | None = None,
) -> LocalDocumentIndex:
    """Locks and loads the saved index, adds documents to it, tunes it for its target recall, if any, and saves it.

    Without a target recall in the options the index keeps its own, and its `ef` doesn't decrease. words: see
    `open_or_build_index`. Raises InputError.
    """
    with locked_index(index_dir) as lock:
        saved = load_index(index_dir, encoder.fingerprint, corpus, encoder.precision)
        lowest_ef = 0
        if isinstance(saved.index, HnswIndex):
            if options.target_recall is None:  # tuning for a smaller k than the last run's must not lower ef
                lowest_ef = saved.index.ef
            else:
                saved.index.target_recall = options.target_recall
                saved.index.ef = options.hnsw_ef  # stays if the target recall is 0
        new_documents = add_documents(encoder, saved, added) if added else []
        tune(saved.index, encoder, saved.documents, query_vectors, k, lowest_ef)
        if words and saved.lexical is None:
            saved = with_words(saved, new_documents, words)
        return save_index(index_dir, saved, new_documents, lock)


def with_words(saved: LocalDocumentIndex, new_documents: Sequence[str], fusion: Fusion) -> LocalDocumentIndex:
    """The index with the words of its documents and of the new ones after them."""
    documents = chain(saved.documents, new_documents)
    lexical = LexicalIndex.build(documents, len(saved.documents) + len(new_documents))
    return replace(saved, lexical=lexical, fusion=fusion)


def add_documents(encoder: Encoder, document_index: LocalDocumentIndex, added: Corpus) -> list[str]:
    """Adds the documents that the index lacks; returns them for `save_index`. Raises InputError if it lacks none."""
    missing = TextSet(added, encoder.tokenizer.lowercases)
    for document in filter(None, document_index.documents):  # without deleted ones
        missing.discard(document)
    if not missing:
        raise InputError(f"--add_corpus {added.path}: the index has all of its documents already")
    if len(missing) < len(added):
        log(f"{added.path}: left out {len(added) - len(missing)} documents that the index has")
    new_documents = list(missing)
    for start in range(0, len(new_documents), SHARD_ROWS):
        document_index.index.add(encoder.encode(new_documents[start : start + SHARD_ROWS], "added", DOCUMENT))
    return new_documents


def sample_of(rows: Rows, *, other: bool = False) -> Rows:
    """Evenly spaced rows, see SAMPLE. other: of 2 * SAMPLE rows or more, a second sample without rows of the first."""
    step = max(1, len(rows) // SAMPLE)
    return rows[step // 2 if other else 0 :: step]


def tune(
    index: VectorIndex,
    encoder: Encoder,
    documents: Sequence[str] | Mapping[int, str],
    query_vectors: np.ndarray,
    k: int,
    lowest_ef: int = 0,
) -> None:
    """Tunes `ef` of an HNSW index for its target recall, if it has one, on a sample of the queries.

    From 2 * SAMPLE queries on, it isn't the sample on which `search` measures the recall. Without queries it is a
    sample of the documents. query_vectors: float32 [Q, D]; `ef` doesn't fall below lowest_ef.
    """
    if not (isinstance(index, ApproximateIndex) and index.target_recall):
        return
    if len(query_vectors):
        sample = sample_of(query_vectors, other=True)
    else:
        ids = index.sample_ids(2 * SAMPLE)  # of which an index's new documents aren't among `documents` yet
        known = ids if isinstance(documents, Mapping) else [row for row in ids if row < len(documents)]
        sample = encoder.encode([documents[row] for row in known], role=QUERY)
    if len(sample) and index.live_count:  # else all documents are deleted
        index.tune_ef(sample, k, index.target_recall)
        index.ef = max(index.ef, lowest_ef)


def measure_recall(index: VectorIndex, query_vectors: np.ndarray, k: int) -> float | None:
    """The share of exact search's k best that the index finds, on a sample of the queries, float32 [Q, D], Q > 0.

    None if exact search would take hours.
    """
    if not index.searches_exactly:
        return None
    sample = sample_of(query_vectors)
    return recall_vs_exact(index.search(sample, k)[1], index.search_exactly(sample, k)[1])
