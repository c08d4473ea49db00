"""The journal of a saved index: what was added and deleted since its files were written. Imports no Paddle.

A file in the folder of the index, which its manifest doesn't list: a line that names the format, a line with the
SHA-256 of the manifest that it belongs to, and a record per change. A record is the length of its body, a CRC-32 of
the body, a CRC-32 of these two, and the body: a line of JSON, and vectors in float32.

A record whose end is missing was torn by a kill or a full disk before it was acknowledged, and doesn't count. Anything
else that isn't as it was written is refused.
"""

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from common.files import flush_to_disk, open_for_reading, sha256
from common.logs import progress_bar
from common.manifest import MANIFEST_FILE

JOURNAL_FILE = "journal.bin"
FORMAT = b"semantic index journal 1\n"
LENGTH_AND_CRC, HEADER_CRC = Struct("<QI"), Struct("<I")
HEADER_BYTES = LENGTH_AND_CRC.size + HEADER_CRC.size
VECTOR_TYPE = np.dtype("<f4")


class Change(NamedTuple):
    """What one call adds to an index or deletes from it."""

    documents: list[str]
    vectors: np.ndarray  # of the documents, float32 [N, dim]
    deleted: list[int]  # ids

    def to_bytes(self) -> bytes:
        """The body of a record."""
        line = json.dumps({"documents": self.documents, "deleted": self.deleted}, ensure_ascii=False)
        return line.encode() + b"\n" + np.ascontiguousarray(self.vectors, VECTOR_TYPE).tobytes()

    @classmethod
    def from_bytes(cls, body: bytes, dim: int) -> "Change":
        """Reads what `to_bytes` wrote. Raises ValueError, KeyError or TypeError if it is anything else."""
        line, _, vectors = body.partition(b"\n")
        content = json.loads(line)
        documents, deleted = list(content["documents"]), list(content["deleted"])
        if not (all(type(text) is str for text in documents) and all(type(row) is int for row in deleted)):
            raise TypeError("documents are strings, and ids are numbers")
        return cls(documents, np.frombuffer(vectors, VECTOR_TYPE).reshape(len(documents), dim), deleted)


class JournalState(NamedTuple):
    """What a journal holds at a moment; later changes are appended."""

    end: int  # of the last whole record, in bytes; that of the head if there is none, 0 if the head is torn or missing
    sha256: str  # of the records' bodies, in hex


def journal_state(folder: Path) -> JournalState:
    """What the journal of a saved index holds. Raises InputError as `read_journal` does."""
    path, digest, end = folder / JOURNAL_FILE, hashlib.sha256(), 0
    if path.exists():
        head = _head(folder)
        with open_for_reading(path) as file:
            if _has_head(file, path, head):
                end = len(head)
                for body, record_end in _records(file, path):
                    digest.update(body)
                    end = record_end
    return JournalState(end, digest.hexdigest())


def read_journal(folder: Path, dim: int, end: int) -> Iterator[Change]:
    """The changes in the journal of a saved index, up to this `JournalState.end`. dim: length of a vector.

    Raises InputError if the journal can't be read, belongs to another index, or isn't as it was written.
    """
    path = folder / JOURNAL_FILE
    if not end:
        return
    head = _head(folder)
    with open_for_reading(path) as file, progress_bar(end, "journal", "B", unit_scale=True) as progress:
        records = _records(file, path) if _has_head(file, path, head) else ()
        for number, (body, record_end) in enumerate(records, 1):
            if record_end > end:
                return
            try:
                yield Change.from_bytes(body, dim)
            except (ValueError, KeyError, TypeError) as error:
                raise _damage(path, number, f"can't be understood ({error})") from None
            progress.update(record_end - progress.n)


def _head(folder: Path) -> bytes:
    """How the journal of an index begins."""
    return FORMAT + sha256(folder / MANIFEST_FILE).encode() + b"\n"


def _has_head(file: io.BufferedReader, path: Path, head: bytes) -> bool:
    """Reads the head; False if it is torn, since the journal was being created. Raises InputError for another one."""
    start = file.read(len(head))
    if not start.startswith(FORMAT[: len(start)]):
        raise InputError(f"{path}: isn't a journal that this version reads; restore it, or remove it")
    if not head.startswith(start):
        problem = "belongs to another index, or the index has been replaced since"
        raise InputError(f"{path}: {problem}; restore the folder, or remove the journal to go on without its changes")
    return start == head


def _records(file: io.BufferedReader, path: Path) -> Iterator[tuple[bytes, int]]:
    """The body of each whole record, and where the record ends. Raises InputError for one that isn't as written."""
    number = 0
    while len(header := file.read(HEADER_BYTES)) == HEADER_BYTES:
        number += 1
        length, body_crc = LENGTH_AND_CRC.unpack_from(header)
        if HEADER_CRC.unpack_from(header, LENGTH_AND_CRC.size) != (zlib.crc32(header[: LENGTH_AND_CRC.size]),):
            raise _damage(path, number, "isn't as it was written")
        if os.fstat(file.fileno()).st_size - file.tell() < length:
            return
        body = file.read(length)
        if len(body) < length:  # its writer has just cut it off: the disk is full
            return
        if zlib.crc32(body) != body_crc:
            raise _damage(path, number, "isn't as it was written")
        yield body, file.tell()


def _damage(path: Path, number: int, problem: str) -> InputError:
    remedy = "restore the folder from a backup, or remove the journal to go on without its changes"
    return InputError(f"{path}: record {number} {problem}; {remedy}")


class Journal:
    """The journal of a saved index, open for appending; only for the holder of the index's lock.

    Creates it if needed, and cuts off a torn record. Raises InputError as `read_journal` does, and if it can't be
    written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE
        head = _head(folder)
        try:
            self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._not_written(error) from None
        try:
            self.size = journal_state(folder).end
            self._cut()
            if not self.size:
                self._append(head)
                flush_to_disk(folder)  # the name of the file
        except OSError as error:
            self.close()
            raise self._not_written(error) from None
        except BaseException:
            self.close()
            raise
        self._empty_size = len(head)

    @property
    def has_changes(self) -> bool:
        """Whether there is a record."""
        return self.size > self._empty_size

    @property
    def is_in_place(self) -> bool:
        """Whether the file is still in the folder: another index may have taken its place, for example."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except OSError:
            return False

    def check_in_place(self) -> None:
        """Raises InputError if the file is no longer in the folder."""
        if not self.is_in_place:
            raise InputError(f"{self._path.parent}: was replaced while it was in use; open it again")

    def append(self, change: Change) -> None:
        """Appends a record, which is on disk afterwards. Raises InputError if it can't, and leaves nothing of it."""
        self.check_in_place()
        body = change.to_bytes()
        start = LENGTH_AND_CRC.pack(len(body), zlib.crc32(body))
        try:
            self._append(start + HEADER_CRC.pack(zlib.crc32(start)) + body)
        except OSError as error:
            raise self._not_written(error) from None

    def _append(self, content: bytes) -> None:
        self._cut()
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:  # also Ctrl-C
            self._cut()
            raise
        self.size += len(content)

    def _cut(self) -> None:
        """Removes what follows the whole records: what a kill left, or an earlier call that couldn't remove it."""
        if os.fstat(self._file.fileno()).st_size > self.size:
            os.ftruncate(self._file.fileno(), self.size)
            os.fsync(self._file.fileno())

    def _not_written(self, error: OSError) -> InputError:
        return InputError(f"{self._path}: can't be written ({error.strerror or error})")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
