"""A corpus: the documents of a file. Imports no Paddle."""

import hashlib
import mmap
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from common.columns import ColumnCheck
from common.errors import InputError
from common.files import open_for_reading
from common.lines import MAX_LINE_BYTES, LineDecoder, read_lines
from common.logs import log
from common.texts import TextSet, rough_key
from data import parse_text

NEWLINE = ord("\n")
SCANNED_BYTES = 1 << 24  # at a time


class MappedLines(Sequence[str]):
    """Lines of a file, which is mapped, not held in memory. Raises InputError on access if the file has changed."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._file = path, open_for_reading(path)
        self._state = self._current_state()
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._state[0] else b""
        self._offsets = np.empty(0, np.int64)  # of the first byte of each line

    def _current_state(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if self._current_state() != self._state:  # reading beyond the end of a truncated file kills the process
            raise InputError(f"{self.path}: was changed while it was in use; start again")
        if isinstance(row, slice):
            return [self._read(offset) for offset in self._offsets[row]]
        return self._read(self._offsets[row])

    def _read(self, offset: np.int64) -> str:
        start = int(offset)
        end = self._bytes.find(b"\n", start)
        return self._bytes[start : len(self._bytes) if end < 0 else end].decode("utf-8")


class SavedDocuments(MappedLines):
    """The documents that a saved index wrote, one per line; a deleted one is an empty line, and "".

    The lines aren't checked, which takes seconds for a million: the manifest of the index tells that they are as they
    were written.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        size, ends = self._state[0], []
        for start in range(0, size, SCANNED_BYTES):
            block = np.frombuffer(self._bytes[start : start + SCANNED_BYTES], np.uint8)
            ends.append(np.flatnonzero(block == NEWLINE) + start)
        starts = np.concatenate([[0], *(block_ends + 1 for block_ends in ends)]).astype(np.int64)
        self._offsets = starts[starts < size]


class Corpus(MappedLines):
    """The documents of a file, one per line; the id of a document is its row.

    distinct: leaves out documents whose `text_key` another one has. sha256: hash of the documents in hex, with repeated
    ones; it doesn't depend on BOM, line ends and skipped lines. Raises InputError as `read_lines` does.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        skip_bad_lines: bool = False,
        distinct: bool = False,
        lowercase: bool = True,
        check: ColumnCheck | None = None,
    ) -> None:
        super().__init__(path)
        digest, hashes = hashlib.sha256(), array("q")

        def good_lines() -> Iterator[int]:
            for line in read_lines(path, parse_text, skip_bad_lines, check=check):
                if line.row is not None:
                    digest.update(line.row.encode() + b"\n")
                    if distinct:
                        hashes.append(hash(rough_key(line.row)))
                    yield line.offset

        self._offsets = np.fromiter(good_lines(), dtype=np.int64)
        self.sha256 = digest.hexdigest()
        repeated = self._repeated(np.frombuffer(hashes, np.int64), lowercase)
        if repeated:
            log(f"{path}: left out {len(repeated)} line(s) of {len(self)} that repeat another one")
            self._offsets = np.delete(self._offsets, repeated)

    def _repeated(self, hashes: np.ndarray, lowercase: bool) -> list[int]:
        """The rows that repeat an earlier one. hashes: int64, one per row; only rows with equal ones are compared."""
        hashes_in_order = np.sort(hashes)
        repeated_hashes = hashes_in_order[1:][hashes_in_order[1:] == hashes_in_order[:-1]]
        seen = TextSet(lowercase=lowercase)
        return [row for row in np.flatnonzero(np.isin(hashes, repeated_hashes)).tolist() if not seen.add(self[row])]

    def _read(self, offset: np.int64) -> str:
        return parse_text(super()._read(offset))


def parse_document(text: str) -> str:
    """A document from elsewhere, as `Corpus` reads it from a line. Raises ValueError if a line can't hold it."""
    if "\n" in text:
        raise ValueError("has more than one line")
    line = text.encode("utf-8", "surrogatepass") + b"\n"
    return parse_text(LineDecoder().decode(line if len(line) <= MAX_LINE_BYTES else None))


def parse_documents(texts: Sequence[str]) -> list[str]:
    """Documents from elsewhere, see `parse_document`. Raises InputError for one that a line can't hold."""
    documents = []
    for row, text in enumerate(texts):
        try:
            documents.append(parse_document(text))
        except ValueError as error:
            raise InputError(f"document {row} (counted from 0): {error}") from None
    return documents


def read_corpus(
    path: str | Path, *, skip_bad_lines: bool = False, check_columns: bool = True, lowercase: bool = True
) -> Corpus:
    """The distinct documents of a file; logs how many lines repeat another.

    lowercase: whether documents that differ in case alone are the same, as for a tokenizer that lowercases. Other
    options and errors as for `pair_lines`.
    """
    check = ColumnCheck(["document"]) if check_columns else None
    return Corpus(path, skip_bad_lines=skip_bad_lines, distinct=True, lowercase=lowercase, check=check)
