"""A corpus into Milvus by its own bulk import: files that the server reads itself. Imports no Paddle.

For corpora of many millions: nothing passes through the server's message queue. The files are Parquet, written with
pyarrow. pymilvus's BulkWriter would write the same ones, but it can't be imported without the clients of two clouds,
takes five times as long, and holds a file's vectors in memory as Python numbers.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import InputError
from common.files import atomic_write, read_json, sha256, write_json
from common.logs import log, progress_bar
from retrieval.corpus import Corpus
from retrieval.embedding_store import Embeddings
from retrieval.milvus_collection import ID, TEXT, VECTOR, CollectionInfo, check_sizes, document_id
from retrieval.milvus_index import POLL_SECONDS, RANGE_ROWS, MilvusIndex
from retrieval.milvus_server import connect, milvus_errors

FILE_BYTES = 512 << 20  # of vectors: a segment of Milvus 2.3; later versions make larger ones of several files
JOBS = 4  # that the server has at a time
RUNNING, COMPLETED = ("Pending", "Started", "Persisted"), "Completed"  # states of a job, as pymilvus names them
NO_FILE = ("no such file", "key does not exist", "nosuchkey")  # what a disk or a bucket says


class BulkFolder(NamedTuple):
    """Where the files are."""

    path: Path
    server_path: str  # what the server calls it: a folder on its disk, or a prefix in its bucket


@dataclass(frozen=True)
class BulkFile:
    """A Parquet file with some of the documents, and a JSON file, written last, that says it is complete."""

    path: Path
    rows: slice

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def is_complete(self) -> bool:
        """Whether it is as it was written."""
        description = self.path.with_suffix(".json")
        return self.path.is_file() and description.is_file() and read_json(description) == self._description()

    def write(self, ids: np.ndarray, embeddings: Embeddings, corpus: Corpus) -> Iterator[int]:
        """Writes both files part by part, and yields how many documents each part has. Raises InputError if it can't.

        ids: of all documents, int64 [N].
        """
        import pyarrow
        from pyarrow import parquet

        fields = {ID: pyarrow.int64(), TEXT: pyarrow.string(), VECTOR: pyarrow.list_(pyarrow.float32())}
        plain = {"use_dictionary": False, "compression": "none"}  # neither makes vectors smaller
        with (
            atomic_write(self.path, "wb") as file,
            parquet.ParquetWriter(file, pyarrow.schema(fields), **plain) as writer,
        ):
            for start in range(self.rows.start, self.rows.stop, RANGE_ROWS):
                part = slice(start, min(start + RANGE_ROWS, self.rows.stop))
                texts, vectors = corpus[part], np.asarray(embeddings[part], np.float32)
                check_sizes(texts, start)
                ends = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
                lists = pyarrow.ListArray.from_arrays(ends, vectors.ravel())
                writer.write_table(pyarrow.table([ids[part], texts, lists], schema=writer.schema))
                yield len(texts)
        write_json(self.path.with_suffix(".json"), self._description())

    def _description(self) -> dict[str, Any]:
        return {"first_document": self.rows.start, "documents": len(self), "sha256": sha256(self.path)}


def bulk_files(folder: Path, info: CollectionInfo, documents: int) -> list[BulkFile]:
    """The files of a corpus. Their names tell corpora and models apart, so that a folder may hold several."""
    size = max(1, FILE_BYTES // (4 * info.dimension * RANGE_ROWS)) * RANGE_ROWS
    starts = range(0, documents, size)
    return [
        BulkFile(folder / f"{info.fingerprint}_{number:06d}.parquet", slice(start, min(start + size, documents)))
        for number, start in enumerate(starts)
    ]


def import_corpus(index: MilvusIndex, embeddings: Embeddings, corpus: Corpus, folder: BulkFolder) -> None:
    """Writes the documents that the server lacks into files, which it then imports; safe to repeat. Raises InputError.

    After an interruption, complete files aren't written again, and imported ones aren't imported again.
    """
    ids = np.fromiter((document_id(text, index.info.lowercase) for text in corpus), np.int64, len(corpus))
    jobs = ImportJobs(index, folder)
    files = bulk_files(folder.path, index.info, len(corpus))
    if not index.is_new:
        jobs.wait_for_running()
        index.reload()  # else what was imported a moment ago may not be counted
        files = [file for file in files if not _is_there(file, index, ids)]
    with progress_bar(sum(map(len, files)), "milvus files", "vector") as progress:
        for file in files:
            for count in [len(file)] if file.is_complete() else file.write(ids, embeddings, corpus):
                progress.update(count)
    jobs.run(files)
    index.keep_vectors(ids, embeddings)


def _is_there(file: BulkFile, index: MilvusIndex, ids: np.ndarray) -> bool:
    """Whether the collection has the documents of a file. Raises InputError if it has some, as insertion leaves them.

    An import brings all or none, and doesn't replace what is there.
    """
    starts = range(file.rows.start, file.rows.stop, RANGE_ROWS)
    count = sum(index.count(ids[start : min(start + RANGE_ROWS, file.rows.stop)]) for start in starts)
    if 0 < count < len(file):
        remedy = "run this without --milvus_bulk_dir, which sends the others"
        raise InputError(f"{index}: has {count} of the {len(file)} documents of {file.path}; {remedy}")
    return count > 0


class ImportJobs:
    """Import jobs of a collection. They run on the server, whether or not this process goes on."""

    def __init__(self, index: MilvusIndex, folder: BulkFolder) -> None:
        self._server, self._collection, self._folder = index.server, index.name, folder
        # `MilvusClient` has no method for this. Its connection's calls work with 2.3 to 2.6; REST's began with 2.4.
        self._connection: Any = connect(index.server)._get_connection()

    def wait_for_running(self) -> None:
        """Waits for those that an interrupted run has started."""
        if running := self._running():
            log(f"{self._server}: still imports {running} file(s) of an interrupted run; waiting for them")
            while self._running():
                time.sleep(POLL_SECONDS)

    def _running(self) -> int:
        with milvus_errors(self._server, self._collection):
            jobs = self._connection.list_bulk_insert_tasks(0, self._collection, timeout=self._server.call_seconds)
        return sum(job.state_name in RUNNING for job in jobs)

    def run(self, files: Sequence[BulkFile]) -> None:
        """Has the files imported, JOBS at a time. Raises InputError for one that can't be."""
        waiting, running = deque(files), dict[int, BulkFile]()
        with progress_bar(sum(map(len, files)), "milvus import", "vector") as progress:
            while waiting or running:
                while waiting and len(running) < JOBS:
                    file = waiting.popleft()
                    running[self._start(file)] = file
                time.sleep(POLL_SECONDS)
                for job in [job for job, file in running.items() if self._is_done(job, file)]:
                    progress.update(len(running.pop(job)))

    def _start(self, file: BulkFile) -> int:
        """The number of a new job."""
        with milvus_errors(self._server, self._collection):
            path = [self._path(file)]
            # Not tried again if there is no answer: the job might have been started.
            return self._connection.do_bulk_insert(
                self._collection, "", path, timeout=self._server.call_seconds, retry_times=0
            )

    def _path(self, file: BulkFile) -> str:
        return f"{self._folder.server_path.rstrip('/')}/{file.path.name}"

    def _is_done(self, job: int, file: BulkFile) -> bool:
        with milvus_errors(self._server, self._collection):
            state = self._connection.get_bulk_insert_state(job, timeout=self._server.call_seconds)
        if state.state_name == COMPLETED or state.state_name in RUNNING:
            return state.state_name == COMPLETED
        if any(words in state.failed_reason.lower() for words in NO_FILE):
            name = self._folder.path.absolute().name
            copy = f"for a bucket `mc mirror {self._folder.path} ALIAS/BUCKET/{name}`"
            remedy = f"copy the folder to it, {copy}, and run this again with --milvus_bulk_path {name}"
            raise InputError(f"{self._server}: finds no file {self._path(file)}; {remedy}")
        reason = state.failed_reason.partition("\n")[0][:200]
        raise InputError(f"{self._server}: can't import {self._path(file)} ({reason}); look into its log")
