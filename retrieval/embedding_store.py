"""The vectors of a corpus on disk, in shards, so that an interrupted run can be resumed. Imports no Paddle."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ann_util import check_unit_vectors
from common.errors import InputError
from common.files import (
    LOCK_FILE,
    TEMPORARY_SUFFIX,
    locked,
    make_folder,
    read_json,
    sha256,
    write_json,
    write_or_compare,
)
from common.vector_dtypes import FLOAT32, to_dtype, to_float32
from data import write_vectors

SHARD_ROWS = 8192  # documents per shard, which a kill can cost: 1 to 3 minutes with a 12-layer ERNIE on 2 cores
METADATA_FILE = "embeddings.json"
TEMPORARY_PREFIX = ".embeddings."


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` for vectors that a run doesn't keep; first removes those that killed runs left there.

    A run locks a file in its folder, so an unlocked one was left by a killed run. On a file system without locks such
    folders stay. Raises InputError if files can't be written in `parent`.
    """
    make_folder(parent)
    for lock_file in parent.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}/{LOCK_FILE}"):
        with contextlib.suppress(OSError), locked(lock_file):
            shutil.rmtree(lock_file.parent)
    folder = Path(tempfile.mkdtemp(TEMPORARY_SUFFIX, TEMPORARY_PREFIX, parent))
    try:
        with contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError):
                lock.enter_context(locked(folder / LOCK_FILE))
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class EmbeddingsMetadata(NamedTuple):
    """Which model, precision and corpus the vectors in a folder belong to."""

    model: str  # `Encoder.fingerprint`
    precision: str
    corpus: str  # `Corpus.sha256`
    documents: int
    dimension: int
    shard_rows: int = SHARD_ROWS
    vector_dtype: str = FLOAT32  # one of VECTOR_DTYPES


def stored_vector_dtype(folder: Path) -> str | None:
    """The type of the vectors that a folder holds; None if it holds none yet. Raises InputError."""
    file = folder / METADATA_FILE
    return read_json(file).get("vector_dtype", FLOAT32) if file.exists() else None


class Embeddings:
    """The unit vectors of a corpus in a folder, [N, D]; read like an array, by slices of rows, which are float32.

    A shard is a .npy file, and a JSON file with the number of its first document, the count of its documents and the
    SHA-256 of the .npy file. The JSON file is written last: a shard without it counts as missing. Raises InputError if
    the folder holds the vectors of another model, precision or corpus, or another type of vectors.
    """

    ndim = 2

    def __init__(self, folder: str | Path, metadata: EmbeddingsMetadata) -> None:
        self.folder, self.metadata = Path(folder), metadata
        self.shape = (metadata.documents, metadata.dimension)
        self._checked: set[int] = set()  # numbers of the shards whose hash has been compared
        self.dtype = np.dtype(metadata.vector_dtype)  # on disk
        file, defaults = self.folder / METADATA_FILE, {"vector_dtype": FLOAT32}
        if difference := write_or_compare(file, metadata._asdict(), defaults):
            remedy = "give another folder, or remove this one to encode anew"
            raise InputError(f"{self.folder}: holds the vectors of another {difference}; {remedy}")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def shards(self) -> list[slice]:
        """The rows of each shard."""
        size = self.metadata.shard_rows
        return [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def missing(self) -> list[int]:
        """Numbers of the shards that haven't been written yet."""
        return [number for number in range(len(self.shards)) if not self._file(number, "json").is_file()]

    def write(self, number: int, vectors: np.ndarray) -> None:
        """Writes a shard, float32 [n, D]. Raises InputError for a vector whose norm isn't 1, or on a full disk."""
        rows, file = self.shards[number], self._file(number, "npy")
        check_unit_vectors(vectors, self.shape[1], "corpus", rows.start)
        write_vectors(file, to_dtype(vectors, self.metadata.vector_dtype))
        content = {"first_document": rows.start, "documents": len(vectors), "sha256": sha256(file)}
        write_json(self._file(number, "json"), content)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows from start to stop, without a step, float32 [n, D]. Raises InputError for a shard that has changed."""
        size = self.metadata.shard_rows
        start, stop, _ = rows.indices(len(self))
        parts = [
            to_float32(self._read(number)[max(0, start - number * size) : stop - number * size])
            for number in range(start // size, -(-stop // size))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, self.shape[1]), np.float32), *parts])

    def inner_products(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Those of each query with its rows, float32 [Q, k]. queries: float32 [Q, D]; rows: int64 [Q, k].

        Raises InputError as an access does.
        """
        numbers, products = rows // self.metadata.shard_rows, np.empty(rows.shape, np.float32)
        for number in np.unique(numbers).tolist():  # one shard in memory at a time
            places = np.nonzero(numbers == number)
            vectors = to_float32(self._read(number)[rows[places] - number * self.metadata.shard_rows])
            products[places] = np.einsum("nd,nd->n", queries[places[0]], vectors)
        return products

    def _read(self, number: int) -> np.ndarray:
        """A shard as a memory map; compares its hash the first time."""
        rows, file = self.shards[number], self._file(number, "npy")
        if number not in self._checked:
            saved = read_json(self._file(number, "json"))
            expected = {"first_document": rows.start, "documents": rows.stop - rows.start, "sha256": sha256(file)}
            if saved != expected:
                remedy = "remove both files and run again, which encodes these documents alone"
                raise InputError(f"{file}: isn't as it was written (see {file.stem}.json); {remedy}")
            self._checked.add(number)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def _file(self, number: int, suffix: str) -> Path:
        return self.folder / f"embeddings_{number:06d}.{suffix}"
