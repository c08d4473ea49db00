"""From a corpus and queries to hits, where the corpus is in Milvus: the counterpart of `retrieval.pipeline`.

All ranks encode; only rank 0 sends and searches.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ann_util import DEFAULT_TARGET_RECALL, IndexOptions
from common.errors import InputError
from common.files import make_folder
from common.logs import is_main_process, log
from common.texts import DOCUMENT
from encoding.text_encoder import Encoder
from retrieval.corpus import Corpus
from retrieval.milvus_bulk import import_corpus
from retrieval.milvus_collection import CollectionInfo
from retrieval.milvus_index import RANGE_ROWS, MilvusIndex
from retrieval.milvus_place import MilvusOptions, MilvusPlace
from retrieval.pipeline import encoded_corpus, tune
from retrieval.saved_index import DocumentIndex


@contextlib.contextmanager
def open_or_build_collection(
    encoder: Encoder,
    query_vectors: np.ndarray,
    k: int,
    *,
    place: MilvusPlace,
    new: MilvusOptions | None,
    corpus: Corpus | None,
    options: IndexOptions,
    parent: str | Path,
    added: Corpus | None = None,
    embedding_dir: str | Path | None = None,
) -> Iterator[DocumentIndex | None]:
    """Yields the collection to search on rank 0, and None on the others.

    new: options of a new collection, to which the corpus is sent when it is encoded; None: there is a complete one.
    Other arguments are those of `retrieval.pipeline.open_or_build_index`. Raises InputError.
    """
    if new is None:
        yield update_collection(encoder, query_vectors, k, place, corpus, options, added) if is_main_process() else None
        return
    if corpus is None:
        raise InputError("there is neither a collection nor a corpus to search")
    folder = new.bulk_folder()
    if folder and is_main_process():  # before hours of encoding
        make_folder(folder.path)
    with encoded_corpus(encoder, corpus, parent, embedding_dir, options.vector_dtype) as embeddings:
        if not is_main_process():
            yield None
            return
        lowercase = encoder.tokenizer.lowercases
        info = CollectionInfo(encoder.fingerprint, corpus.sha256, encoder.precision, lowercase, embeddings.shape[1])
        info = replace(info, index_type=new.milvus_index_type, ef=options.hnsw_ef)
        index = MilvusIndex.create(place.server, place.collection, info, options, len(corpus), new.milvus_shards)
        if index.is_tunable:
            index.target_recall = DEFAULT_TARGET_RECALL if options.target_recall is None else options.target_recall
        if folder:
            import_corpus(index, embeddings, corpus, folder)
        else:
            index.add(embeddings, corpus)
        index.finish(corpus)
        if added:
            add_documents(encoder, index, added)
        tune(index, encoder, index.documents, query_vectors, k)
        index.save_settings()
        index.publish(place.collection)
        place.save(index)
        yield _document_index(index)


def update_collection(
    encoder: Encoder,
    query_vectors: np.ndarray,
    k: int,
    place: MilvusPlace,
    corpus: Corpus | None,
    options: IndexOptions,
    added: Corpus | None,
) -> DocumentIndex:
    """The complete collection; adds documents to it, and tunes it if a target recall is given. Raises InputError."""
    found = place.open()
    place.check(found, encoder.fingerprint, corpus, encoder.precision)
    if added:
        add_documents(encoder, found, added)
    if options.target_recall is not None and found.is_tunable:
        found.target_recall, found.ef = options.target_recall, options.hnsw_ef
        tune(found, encoder, found.documents, query_vectors, k)
        found.save_settings()
    place.save(found)
    return _document_index(found)


def _document_index(index: MilvusIndex) -> DocumentIndex:
    return DocumentIndex(index, index.documents, index.info.model, index.info.corpus, index.info.precision)


def add_documents(encoder: Encoder, index: MilvusIndex, added: Corpus) -> None:
    """Encodes and adds the documents that the collection lacks. Raises InputError if it lacks none."""
    count = 0
    for start in range(0, len(added), RANGE_ROWS):
        texts = added[start : start + RANGE_ROWS]
        new = [text for text, is_new in zip(texts, index.assign_ids(texts).is_new, strict=True) if is_new]
        if new:
            index.add(encoder.encode(new, "added", DOCUMENT), new)
        count += len(new)
    if not count:
        raise InputError(f"--add_corpus {added.path}: the collection has all of its documents already")
    if count < len(added):
        log(f"{added.path}: left out {len(added) - count} documents that the collection has")
