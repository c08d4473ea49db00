"""The vectors of a corpus on disk, in shards that a stopped run goes on from. Imports no Paddle."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ann_util import check_unit_vectors
from files import LOCK_FILE, TEMPORARY_SUFFIX, atomic_write, locked, read_json, sha256, write_json
from runtime import InputError

SHARD_ROWS = 8192  # at most what a kill costs: 1 to 3 minutes of a 12-layer ERNIE on 2 cores
DESCRIPTION_FILE = "embeddings.json"
TEMPORARY_PREFIX = ".embeddings."


@contextlib.contextmanager
def temporary_folder(parent: Path, number: int) -> Iterator[None]:
    """Makes `temporary_place(parent, number)` for the block, and removes such folders that killed runs left.

    Its owner has a lock on a file in it. Where the file system has no locks, what is left stays.
    """
    for lock in parent.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}/{LOCK_FILE}"):
        with contextlib.suppress(OSError), locked(lock):
            shutil.rmtree(lock.parent)
    folder = temporary_place(parent, number)
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # if it can't be made, `Embeddings` says so
                folder.mkdir(parents=True)
                held.enter_context(locked(folder / LOCK_FILE))
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_place(parent: Path, number: int) -> Path:
    """The folder of the vectors that a run doesn't keep, for its random number below 2**32."""
    return parent / f"{TEMPORARY_PREFIX}{number:08x}{TEMPORARY_SUFFIX}"


class Description(NamedTuple):
    """What the vectors of a folder are of."""

    model: str  # `Encoder.fingerprint`
    precision: str
    corpus: str  # `Corpus.sha256`
    documents: int
    dimension: int
    shard_rows: int = SHARD_ROWS


class Embeddings:
    """Unit vectors, float32 [N, D], of the documents of a corpus, in a folder.

    A shard is a .npy file and, written after it, a JSON file with its first document, their number and the SHA-256
    of the first; without that it doesn't count. Reads like an array (`shape`, `ndim`, `len` and slices of rows) that
    isn't in memory. Raises InputError if the folder holds other vectors.
    """

    ndim = 2

    def __init__(self, folder: str | Path, description: Description) -> None:
        self.folder, self.description = Path(folder), description
        self.shape = (description.documents, description.dimension)
        self._checked: set[int] = set()  # shards
        file = self.folder / DESCRIPTION_FILE
        if not file.exists():  # several ranks may write it, and the same
            write_json(file, description._asdict())
        saved = read_json(file)
        for name, ours in description._asdict().items():
            if saved.get(name) != ours:
                raise InputError(
                    f"{self.folder}: holds the vectors of another {name} ({saved.get(name)}, not {ours}); "
                    "give another folder, or remove this one to encode anew"
                )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def shards(self) -> list[slice]:
        """The rows of each shard."""
        size = self.description.shard_rows
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def missing(self) -> list[int]:
        """Numbers of the shards that aren't there yet."""
        return [number for number in range(len(self.shards)) if not self._file(number, "json").is_file()]

    def write(self, number: int, vectors: np.ndarray) -> None:
        """Writes a shard, float32 [its rows, D]. Raises InputError for a row that is no unit vector, or a full disk."""
        rows, file = self.shards[number], self._file(number, "npy")
        check_unit_vectors(vectors, self.shape[1], "corpus", rows.start)
        with atomic_write(file, "wb") as opened:
            np.save(opened, vectors)
        content = {"first_document": rows.start, "documents": len(vectors), "sha256": sha256(file)}
        write_json(self._file(number, "json"), content)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """float32 [n, D] of the rows from start to stop. Raises InputError for a shard that isn't as it was written."""
        size = self.description.shard_rows
        start, stop, _ = rows.indices(len(self))
        parts = [
            self._read(number)[max(0, start - number * size) : stop - number * size]
            for number in range(start // size, -(-stop // size))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, self.shape[1]), np.float32), *parts])

    def _read(self, number: int) -> np.ndarray:
        """A shard as a memory map."""
        rows, file = self.shards[number], self._file(number, "npy")
        if number not in self._checked:
            note = read_json(self._file(number, "json"))
            expected = {"first_document": rows.start, "documents": rows.stop - rows.start, "sha256": sha256(file)}
            if note != expected:
                raise InputError(
                    f"{file}: isn't as it was written (see {self._file(number, 'json').name}); "
                    "remove both files and run again, which encodes these documents alone"
                )
            self._checked.add(number)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"embeddings_{number:06d}.{suffix}"
