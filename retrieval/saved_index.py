"""A saved index: a folder with the index, its documents, and fingerprints of model and corpus. Imports no Paddle.

`retrieval.live_index` changes one while it is searched, and keeps the changes in a journal in the folder.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from ann_util import HNSW_BLOCK, RESCORED, ExactIndex, HnswIndex, LocalIndex, RescoredIndex, VectorIndex
from common.errors import InputError
from common.files import (
    atomic_folder,
    atomic_write,
    clear_leftovers,
    locked,
    read_json,
    resolve_interrupted_replace,
    sha256,
    write_json,
)
from common.logs import log
from common.manifest import MANIFEST_FILE, check_manifest, write_manifest
from retrieval.corpus import Corpus, SavedDocuments
from retrieval.documents import Documents
from retrieval.journal import Change, JournalState, journal_state, read_journal
from retrieval.lexical_index import DEFAULT_FUSION, FUSION_FILE, Fusion, LexicalIndex

INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.txt"
INDEX_CLASSES: dict[str, type[LocalIndex]] = {"hnswlib": HnswIndex, "exact": ExactIndex, RESCORED: RescoredIndex}
VERSION_LENGTH = 12  # hexadecimal digits
REMEDY = "remove the folder and build the index again"
READ_ATTEMPTS = 5  # of an index that others replace meanwhile
MISSING_SECONDS = 0.2  # between moving a folder away and another one into its place, at most
POLL_SECONDS = 0.01  # between checks whether it is there


@dataclass(frozen=True)
class DocumentIndex:
    """An index, and its documents by id."""

    index: VectorIndex
    documents: Sequence[str] | Mapping[int, str]
    model: str  # `Encoder.fingerprint` of its vectors
    corpus: str  # `Corpus.sha256` of the corpus that it was built from, without the documents that were added later
    precision: str | None = None  # of the encoder; None: not recorded, as in version 2.0.0
    lexical: LexicalIndex | None = None  # of the same documents
    fusion: Fusion = DEFAULT_FUSION  # of the hits of both


@dataclass(frozen=True)
class LocalDocumentIndex(DocumentIndex):
    """An index in this process; its documents in the order of their ids, of which a deleted one is ""."""

    index: LocalIndex
    documents: Documents


def has_index(folder: str | Path) -> bool:
    """Whether the folder exists, or its previous version if its replacement was interrupted."""
    return resolve_interrupted_replace(folder).exists()


def save_index(
    folder: str | Path,
    saved: LocalDocumentIndex,
    new_documents: Sequence[str] = (),
    lock: contextlib.ExitStack | None = None,
) -> LocalDocumentIndex:
    """Writes an index to a folder, which is replaced as a whole, and returns it with the documents of that folder.

    new_documents: those added to the index after `saved.documents`. Their words are indexed together with the others',
    if the index has words. lock: what `locked_index` gave, if the folder is locked; it then holds the new folder, which
    is locked before it is in place. Raises InputError if the folder can't be written.
    """
    saved = replace(saved, lexical=_current_words(saved, new_documents))
    with contextlib.ExitStack() as new_lock:
        with atomic_folder(folder) as temporary:
            _write_index(temporary, saved, new_documents)
            if lock is not None:
                new_lock.enter_context(locked(temporary / MANIFEST_FILE))
        if lock is not None:
            lock.close()
            lock.push(new_lock.pop_all())
    return replace(saved, documents=Documents(SavedDocuments(Path(folder) / DOCUMENTS_FILE)))


def _current_words(saved: LocalDocumentIndex, new_documents: Sequence[str]) -> LexicalIndex | None:
    """The words of all documents, if the index has words; indexed anew if documents were added or deleted."""
    size = len(saved.documents) + len(new_documents)
    if saved.lexical is None or (len(saved.lexical) == size and not saved.lexical.has_changes):
        return saved.lexical
    return LexicalIndex.build(chain(saved.documents, new_documents), size)


def _write_index(folder: Path, saved: LocalDocumentIndex, new_documents: Iterable[str]) -> None:
    """Writes the files of an index into an empty folder."""
    saved.index.save(folder)
    with atomic_write(folder / DOCUMENTS_FILE) as file:
        file.writelines(document + "\n" for document in chain(saved.documents, new_documents))
    content = {
        "ann": next(ann for ann, index_class in INDEX_CLASSES.items() if type(saved.index) is index_class),
        **saved.index.settings,
        "model": saved.model,
        "corpus": saved.corpus,
        "precision": saved.precision,
    }
    if saved.lexical is not None:
        saved.lexical.save(folder)
        content["lexical"] = {"method": "bm25", **saved.lexical.settings}
    write_json(folder / INDEX_FILE, content)
    write_manifest(folder)
    if saved.lexical is not None:
        saved.fusion.save(folder)


def has_lexical_index(folder: str | Path) -> bool:
    """Whether the index in the folder has the words of its documents. Raises InputError if it can't be told."""
    return bool(read_json(_index_folder(folder) / INDEX_FILE).get("lexical"))


def save_fusion(folder: str | Path, fusion: Fusion) -> None:
    """Keeps a fusion in a saved index. Raises InputError if another run is changing it, or if it can't be written."""
    with locked_index(folder):
        fusion.save(_index_folder(folder))


def index_version(folder: str | Path) -> str:
    """A name for what a saved index holds, the same for the same content; "" if there is none."""
    folder = resolve_interrupted_replace(folder)
    try:
        return _version(_files_hash(folder), journal_state(folder))
    except InputError:
        return ""


def _version(files_hash: str, journal: JournalState) -> str:
    return hashlib.sha256((files_hash + journal.sha256).encode()).hexdigest()[:VERSION_LENGTH]


def _files_hash(folder: Path) -> str:
    """A hash of all files but the journal. Raises InputError if there is no manifest."""
    fusion = folder / FUSION_FILE  # the manifest has the hashes of the others
    return sha256(folder / MANIFEST_FILE) + (sha256(fusion) if fusion.exists() else "")


def _index_folder(folder: str | Path) -> Path:
    """The folder, or its previous version, see `has_index`. Raises InputError if it isn't a saved index.

    One that is missing is waited for: another index may be about to be moved there.
    """
    end = time.monotonic() + MISSING_SECONDS
    while True:
        path = resolve_interrupted_replace(folder)
        missing = next((name for name in (MANIFEST_FILE, INDEX_FILE) if not (path / name).is_file()), None)
        if missing is None:
            return path
        if time.monotonic() > end:
            raise InputError(f"{path}: isn't a saved index, it has no {missing}; give another --index_dir")
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def locked_index(folder: str | Path) -> Iterator[contextlib.ExitStack]:
    """Keeps other runs from changing a saved index, and removes what killed ones left beside it.

    Yields the lock for `save_index`. Raises InputError if another run is changing the index.
    """
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(_index_folder(folder) / MANIFEST_FILE))
        except BlockingIOError:
            raise InputError(f"{folder}: another run is changing it; run this again when it has finished") from None
        except OSError as error:
            raise InputError(f"{folder}: can't be locked against other runs ({error.strerror})") from None
        path = Path(os.path.realpath(folder))
        clear_leftovers(path.parent, path.name)
        yield lock


def apply_change(document_index: LocalDocumentIndex, change: Change) -> None:
    """Adds to a loaded index and deletes from it what a change says. Raises InputError as `VectorIndex.add` does."""
    index, lexical, documents = document_index.index, document_index.lexical, document_index.documents
    if change.documents:  # first the document, so that after an interruption each hit has one
        documents.extend(change.documents)
        index.add(change.vectors)
        if lexical is not None:
            lexical.add(change.documents)
    index.delete(change.deleted)
    if lexical is not None:
        lexical.delete(change.deleted)
    documents.delete(change.deleted)


def load_index(
    folder: str | Path, model: str | None = None, corpus: Corpus | None = None, precision: str | None = None
) -> LocalDocumentIndex:
    """Reads a saved index with the changes in its journal. Needs no lock: what isn't acknowledged yet may be missing.

    model, corpus: the encoder's fingerprint and the documents; if given, an index of others raises InputError.
    precision: the encoder's; one of another precision is logged. Raises InputError if a file is missing or has changed.
    """
    return load_with_version(folder, model, corpus, precision)[1]


def load_with_version(
    folder: str | Path, model: str | None = None, corpus: Corpus | None = None, precision: str | None = None
) -> tuple[str, LocalDocumentIndex]:
    """`load_index`, and the `index_version` of what was read."""
    version, saved = _read_unreplaced(folder)
    if model is not None and saved.model != model:
        remedy = "give the model that it was built with, or another --index_dir"
        raise InputError(f"{folder}: its vectors come from another model or --max_seq_length; {remedy}")
    if precision and saved.precision and saved.precision != precision:
        log(f"--precision {precision}: the vectors of {folder} were computed in {saved.precision}")
    if corpus is not None and corpus.sha256 != saved.corpus and corpus.sha256 != saved.documents.sha256:
        remedy = "add documents with --add_corpus, leave --corpus_file out, or give another --index_dir"
        raise InputError(f"{folder}: was built from another corpus, or the corpus file has changed since; {remedy}")
    return version, saved


def _read_unreplaced(folder: str | Path) -> tuple[str, LocalDocumentIndex]:
    """Reads a saved index; again, if it was replaced meanwhile, so that its files and its journal fit each other."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        path, files_hash = _index_folder(folder), ""
        try:
            files_hash = _files_hash(path)
            journal = journal_state(path)
            saved = _read_index(path, journal)
            if _is_still(path, files_hash):
                return _version(files_hash, journal), saved
        except (InputError, OSError):
            if attempt == READ_ATTEMPTS or _is_still(path, files_hash):
                raise
    raise InputError(f"{folder}: is replaced again and again; try again later")


def _is_still(folder: Path, files_hash: str) -> bool:
    """Whether the folder has the files with this hash."""
    try:
        return _files_hash(folder) == files_hash
    except InputError:
        return False


def _read_index(folder: Path, journal: JournalState) -> LocalDocumentIndex:
    check_manifest(folder, remedy=REMEDY)
    content = read_json(folder / INDEX_FILE)
    try:
        index = INDEX_CLASSES[content["ann"]].load(folder, content)
        documents = Documents(SavedDocuments(folder / DOCUMENTS_FILE))
        words = content.get("lexical")
        lexical = LexicalIndex.load(folder, words) if words else None
        about = content["model"], content["corpus"], content.get("precision")
        saved = LocalDocumentIndex(index, documents, *about, lexical, Fusion.load(folder))
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX_FILE}: isn't the description of an index (see {error}); {REMEDY}") from None
    if len(documents) != len(index):
        raise InputError(f"{folder}: has {len(documents)} documents and {len(index)} vectors; {REMEDY}")
    if lexical is not None and len(lexical) != len(documents):
        raise InputError(f"{folder}: has {len(documents)} documents and the words of {len(lexical)}; {REMEDY}")
    for change in _joined(read_journal(folder, index.dim, journal.end)):
        apply_change(saved, change)
    return saved


def _joined(changes: Iterable[Change]) -> Iterator[Change]:
    """The changes, with additions in a row joined, because hnswlib uses several threads for many vectors only."""
    parts: list[Change] = []
    for change in changes:
        parts.append(change)
        if change.deleted or sum(len(part.documents) for part in parts) >= HNSW_BLOCK:
            yield _join(parts)
            parts = []
    if parts:
        yield _join(parts)


def _join(parts: Sequence[Change]) -> Change:
    """Additions, of which the last may also delete, as one change."""
    documents = [document for part in parts for document in part.documents]
    return Change(documents, np.concatenate([part.vectors for part in parts]), parts[-1].deleted)
