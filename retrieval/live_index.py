"""A saved index that is changed while it is searched, and whose changes survive a kill. Imports no Paddle."""

import contextlib
import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ann_util import check_unit_vectors
from common.errors import InputError
from common.logs import log
from common.read_write_lock import ReadWriteLock
from common.texts import TextSet
from retrieval.corpus import Corpus, parse_documents
from retrieval.documents import DocumentFinder
from retrieval.journal import JOURNAL_FILE, Change, Journal
from retrieval.saved_index import LocalDocumentIndex, apply_change, load_index, locked_index, save_index

ROWS_PER_TURN = 64  # documents that are indexed while searches wait
SMALL_JOURNAL = 1 << 20  # bytes; a journal up to this size is left as it is while the index is open
JOURNAL_SHARE = 0.01  # of the folder's bytes; a larger journal makes loading slow, for its vectors are indexed again


class Added(NamedTuple):
    """What became of documents that were to be added, a value per document."""

    ids: list[int]
    is_new: list[bool]  # False: the index had a document with the same `text_key`, whose id it is


class LiveIndex:
    """Opens a saved index that takes and deletes documents while other threads search it.

    A change is on disk, in the journal of the folder, before its call returns: a kill at any moment loses nothing that
    was acknowledged. Of what was under way, a call is there as a whole or not at all. It can be there without having
    returned, if the kill came between the last byte and the return; a caller who repeats it does no harm, because
    documents aren't added twice. Any thread may call any method; changes wait for each other. Ids aren't used again.

    `compact` and `close` write the changes into the files of the index. Until then a deleted text is on disk, and its
    vector is until the index is built anew.

    lowercase: whether the model's tokenizer lowercases, see `text_key`. Other arguments are those of `load_index`.
    Raises InputError as that does, if another run is changing the index, and if its folder can't be written.
    """

    def __init__(
        self,
        folder: str | Path,
        model: str | None = None,
        corpus: Corpus | None = None,
        precision: str | None = None,
        *,
        lowercase: bool = True,
    ) -> None:
        self.folder = folder
        self._lowercase = lowercase
        self._changing = threading.Lock()  # held by the thread that changes the index or its folder
        self._threads = ReadWriteLock()  # searches read
        self.changes = 0  # parts of changes that searches have seen; stays the same within a block of `reading`
        self._refusal: str | None = None  # why the index takes no changes
        self._built_finder: DocumentFinder | None = None
        self._building_finder = threading.Lock()
        with contextlib.ExitStack() as resources:
            self._lock = resources.enter_context(locked_index(folder))
            self._document_index = load_index(folder, model, corpus, precision)
            self._journal = Journal(Path(folder))
            resources.callback(lambda: self._journal.close())
            self._journal_limit = self._largest_journal()
            self._compact_if_due()
            self._resources = resources.pop_all()

    def __enter__(self) -> "LiveIndex":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Closes the index; after an error without compacting it."""
        self.close(compact=error is None)

    @contextlib.contextmanager
    def reading(self) -> Iterator[LocalDocumentIndex]:
        """The index and its documents, which don't change within the block. A thread's blocks mustn't be nested."""
        with self._threads.reading():
            yield self._document_index

    @property
    def _finder(self) -> DocumentFinder:
        """Built when it is needed: an index that is only searched opens faster."""
        with self._building_finder:
            if self._built_finder is None:
                self._built_finder = DocumentFinder(self._document_index.documents, self._lowercase)
            return self._built_finder

    def find(self, texts: Iterable[str]) -> list[int | None]:
        """The id of the document with the same `text_key` as each text, or None if there is none.

        The first call, also by `add`, reads all documents.
        """
        finder = self._finder  # not within `reading`: while it is built, a waiting change would keep searches out
        with self._threads.reading():
            return [finder.find(text, self._document_index.documents) for text in texts]

    def add(self, texts: Sequence[str], vectors: np.ndarray) -> Added:
        """Adds documents, except those that the index has already.

        vectors: those of the texts, unit vectors [N, dim]. Raises InputError, and adds nothing, for a text that can't
        be a line of a file, vectors of a wrong shape or norm, and if the disk is full.
        """
        vectors = np.asarray(vectors, np.float32)
        check_unit_vectors(vectors, self._document_index.index.dim, "document", 0)
        if len(texts) != len(vectors):
            raise InputError(f"there are {len(texts)} documents and {len(vectors)} vectors")
        documents = parse_documents(texts)
        with self._changing:
            added = self._assign_ids(documents)
            rows = np.flatnonzero(added.is_new)
            if len(rows):
                self._make(Change([documents[row] for row in rows], vectors[rows], []))
        return added

    def _assign_ids(self, documents: Sequence[str]) -> Added:
        """The ids that the documents have or get."""
        first_id = len(self._document_index.documents)
        new = TextSet(lowercase=self._lowercase)
        new_ids: dict[str, int] = {}
        added = Added([], [])
        for document, known in zip(documents, self.find(documents), strict=True):
            is_new = known is None and new.add(document)
            if is_new:
                new_ids[document] = first_id + len(new_ids)
            added.ids.append(known if known is not None else new_ids[str(new.find(document))])
            added.is_new.append(is_new)
        return added

    def delete(self, ids: Iterable[int]) -> int:
        """Deletes documents; returns how many of the ids had one. Raises InputError if the disk is full."""
        index = self._document_index.index
        with self._changing:
            found = [row for row in dict.fromkeys(map(operator.index, ids)) if index.is_live(row)]
            if found:
                self._make(Change([], np.empty((0, index.dim), np.float32), found))
        return len(found)

    @property
    def is_in_place(self) -> bool:
        """Whether the folder still holds this index, and not another one that was moved there."""
        return self._journal.is_in_place

    def _make(self, change: Change) -> None:
        """Writes a change to the journal, then to the index in memory."""
        self._check_usable()
        self._refusal = "a change was interrupted"  # the index may lack some of what the journal has
        try:
            self._journal.append(change)
        except InputError:
            self._refusal = None
            raise
        for part in _parts(change):
            with self._threads.writing():
                first_id = len(self._document_index.documents)
                apply_change(self._document_index, part)
                self.changes += 1
                for row, document in enumerate(part.documents, first_id):
                    self._finder.add(row, document)
        self._refusal = None
        self._compact_if_due()

    def _check_usable(self) -> None:
        if self._refusal:
            raise InputError(f"{self.folder}: {self._refusal}; open it again")

    def compact(self) -> None:
        """Writes the index with all changes to its folder, which is replaced as a whole; searches go on meanwhile.

        A kill leaves the old folder with its journal, or the new one. Raises InputError if it can't be written.
        """
        with self._changing:
            self._check_usable()
            self._compact()

    def _compact(self) -> None:
        self._journal.check_in_place()
        saved = save_index(self.folder, self._document_index, lock=self._lock)
        old_journal, self._journal = self._journal, Journal(Path(self.folder))
        old_journal.close()
        self._journal_limit = self._largest_journal()
        with self._threads.writing():
            self._document_index = saved

    def _compact_if_due(self) -> None:
        """Compacts the index if its journal has become too large; if that fails, once more when it has doubled."""
        if self._journal.size > self._journal_limit:
            try:
                self._compact()
            except InputError as error:
                self._journal_limit = 2 * self._journal.size
                log(f"{error}; the changes are in {JOURNAL_FILE}")

    def _largest_journal(self) -> int:
        """In bytes."""
        sizes = (file.stat().st_size for file in Path(self.folder).iterdir() if file.name != JOURNAL_FILE)
        return max(SMALL_JOURNAL, int(JOURNAL_SHARE * sum(sizes)))

    def close(self, compact: bool = True) -> None:
        """Lets others change the index. It can still be searched.

        compact: see `compact`; if it can't be written, that is logged, and the changes stay in the journal.
        """
        with self._changing:
            try:
                if compact and not self._refusal and self._journal.has_changes:
                    self._compact()
            except InputError as error:
                log(f"{error}; the changes are in {JOURNAL_FILE}")
            finally:
                self._refusal = "it was closed"
                self._resources.close()


def _parts(change: Change) -> Iterator[Change]:
    """A change in parts of ROWS_PER_TURN documents; deletions are fast, and are one part."""
    for start in range(0, len(change.documents), ROWS_PER_TURN):
        part = slice(start, start + ROWS_PER_TURN)
        yield Change(change.documents[part], change.vectors[part], [])
    if change.deleted:
        yield Change([], change.vectors[:0], change.deleted)
