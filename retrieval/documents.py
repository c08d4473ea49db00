"""The documents of a saved index while they change, and how one is found by its text. Imports no Paddle."""

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from common.logs import progress_bar
from common.texts import rough_key, text_key
from retrieval.corpus import MappedLines

DOCUMENTS_PER_TURN, PAUSE_SECONDS = 64, 1e-4  # 0.6 ms of work, then other threads may run


class Documents(Sequence[str]):
    """The documents of an index by id: those of its file, and those added since. A deleted one is ""."""

    def __init__(self, saved: MappedLines) -> None:
        self.saved = saved
        self._size = len(saved)
        self._changed: dict[int, str] = {}  # by id

    @property
    def path(self) -> str | Path:
        """The file of those that are saved."""
        return self.saved.path

    @property
    def sha256(self) -> str:
        """Hash of the documents that aren't deleted in hex, as of a `Corpus`; takes seconds for a million."""
        digest = hashlib.sha256()
        for document in self:
            if document:
                digest.update(document.encode() + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(self._size)[row]]
        row = range(self._size)[row]  # from the end if negative
        document = self._changed.get(row)
        return self.saved[row] if document is None else document

    def extend(self, documents: Sequence[str]) -> None:
        """Appends documents."""
        self._changed.update(enumerate(documents, self._size))
        self._size += len(documents)

    def delete(self, ids: Iterable[int]) -> None:
        """Makes these documents ""."""
        self._changed.update(dict.fromkeys(ids, ""))


class DocumentFinder:
    """Finds documents by their text; deleted ones ("") aren't found. lowercase: see `text_key`.

    Holds 16 bytes of each document that is there at first: its hash and its id.
    """

    def __init__(self, documents: Sequence[str], lowercase: bool = True) -> None:
        self._lowercase = lowercase
        hashes = np.empty(len(documents), np.int64)
        with progress_bar(len(documents), "documents", "text") as progress:
            for row, document in enumerate(documents):
                hashes[row] = hash(rough_key(document)) if document else 0
                progress.update()
                if row % DOCUMENTS_PER_TURN == 0:
                    time.sleep(PAUSE_SECONDS)  # else each step of a search would wait 5 ms for Python's lock
        self._ids = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._ids]
        self._added: dict[int, list[int]] = {}  # hash -> ids

    def add(self, row: int, document: str) -> None:
        """Makes a new document findable."""
        self._added.setdefault(hash(rough_key(document)), []).append(row)

    def find(self, text: str, documents: Sequence[str]) -> int | None:
        """The id of the document with the same `text_key`, or None. documents: those of now, by id."""
        key_hash = hash(rough_key(text))
        first, end = np.searchsorted(self._hashes, key_hash), np.searchsorted(self._hashes, key_hash, "right")
        key = None
        for row in (*self._ids[first:end].tolist(), *self._added.get(key_hash, ())):
            if documents[row]:
                key = key or text_key(text, self._lowercase)
                if text_key(documents[row], self._lowercase) == key:
                    return row
        return None
