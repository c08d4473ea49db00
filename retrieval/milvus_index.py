"""A corpus in Milvus: vectors and documents that any number of machines search. Imports no Paddle.

A corpus is in a collection of its own, of which properties say whose vectors it has. An alias names the collection that
is searched: it is moved to a new one when that is complete, so that nobody searches half a corpus.
"""

import contextlib
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from ann_util import CORPUS_BLOCK, ApproximateIndex, IndexOptions
from common.errors import InputError
from common.logs import log, progress_bar
from retrieval.live_index import Added
from retrieval.milvus_collection import (
    DEFAULT_COLLECTION,
    EMBEDDED_TYPES,
    ID,
    MAX_TEXT_BYTES,
    PROPERTY,
    TEXT,
    VECTOR,
    WIDTH_NAMES,
    CollectionInfo,
    alias_target,
    build_parameters,
    check_sizes,
    document_id,
)
from retrieval.milvus_server import (
    LACKS_TYPE,
    CollectionMissing,
    MilvusServer,
    MilvusUnavailable,
    connect,
    milvus_errors,
)

MAX_K = 16_384  # hits that Milvus returns for a query
RANGE_ROWS = 8_192  # documents that are checked and sent together
BATCH_BYTES = 4 << 20  # of a request; a message queue takes 5 MiB by default, a server 64 MiB
IN_FLIGHT = 4  # requests at a time
QUERY_ROWS = 256  # queries in a request
ANSWER_HITS = 1 << 16  # in an answer, of which a server sends up to 64 MiB
PAGE_ROWS = 1024  # vectors in an answer, of which a server sends up to 64 MiB
CACHED_DOCUMENTS = 1 << 18
POLL_SECONDS = 0.5
STALLED_SECONDS = 3600.0  # without a segment that was indexed
COUNT_SECONDS = 2.0
MAX_STREAMED = 2_000_000  # vectors; reading them from a server takes minutes


class _IndexState(NamedTuple):
    """How far Milvus is with an index."""

    total: int  # rows
    indexed: int
    has_failed: bool


class MilvusIndex(ApproximateIndex):
    """The vectors and documents of a collection. The id of a vector is the `document_id` of its document.

    Searches see this client's own changes at once, and those of others within seconds: a search that follows a change
    asks for the consistency level "Strong", all others for "Bounded".
    """

    def __init__(self, server: MilvusServer, name: str, client: Any, info: CollectionInfo) -> None:
        super().__init__(info.dimension)
        self.server, self.name, self.info = server, name, info
        self._client = client
        self.is_new = False  # whether the collection was empty before, and isn't finished yet
        self._last_change: object = object()  # of this object, and the one that a read has waited for
        self._seen_change: object = None
        self._known_count = (0, -math.inf)  # documents, and when they were counted
        # Ids and vectors of a new collection that were added here, for `search_exactly`.
        self._local: list[tuple[np.ndarray, Any]] | None = None
        self.documents = MilvusDocuments(self)

    def __str__(self) -> str:
        width = WIDTH_NAMES.get(self.info.index_type)
        return f"the Milvus collection {self.name} ({self.info.index_type}{f', {width} {self.ef}' if width else ''})"

    @classmethod
    def open(cls, server: MilvusServer, alias: str = DEFAULT_COLLECTION) -> "MilvusIndex":
        """The complete collection that an alias names. Raises InputError, CollectionMissing if there is none."""
        client = connect(server)
        name = alias_target(server, client, alias)
        if name is None:
            problem = f"{server}: has no complete collection {alias}"
            raise CollectionMissing(f"{problem}; build it with recall.py --ann milvus --corpus_file")
        index = cls._of(server, name, client)
        index._patiently(client.load_collection)
        return index

    def refresh(self, alias: str) -> bool:
        """Whether the alias still names this collection; then reads how it is searched, which others may have changed.

        Raises InputError.
        """
        if alias_target(self.server, self._client, alias) != self.name:
            return False
        self.info = self._of(self.server, self.name, self._client).info
        return True

    def disconnect(self) -> None:
        """Ends the connection, which all of this process to this server share; the next `open` makes a new one."""
        self._client.close()

    @classmethod
    def _of(cls, server: MilvusServer, name: str, client: Any) -> "MilvusIndex":
        """An existing collection. Raises InputError if it isn't one of ours."""
        with milvus_errors(server, name):
            properties = client.describe_collection(name, timeout=server.call_seconds).get("properties", {})
        try:
            return cls(server, name, client, CollectionInfo(**json.loads(properties[PROPERTY])))
        except (KeyError, TypeError, ValueError):
            problem = f"{server}: the collection {name} wasn't built by recall.py"
            raise InputError(f"{problem}; give another --milvus_collection") from None

    @classmethod
    def create(
        cls, server: MilvusServer, alias: str, info: CollectionInfo, options: IndexOptions, rows: int, shards: int = 1
    ) -> "MilvusIndex":
        """A collection to add documents to: a new one, or that of an interrupted build of the same corpus.

        rows: how many documents there will be. Searches don't see it until `publish`. Raises InputError.
        """
        if server.is_embedded and info.index_type not in EMBEDDED_TYPES:  # which Milvus Lite finds out when it searches
            raise InputError(f"{server}: {LACKS_TYPE}")
        client = connect(server)
        current = alias_target(server, client, alias)
        base = f"{alias}_{info.fingerprint}"
        name = base if current != base else f"{base}_2"
        with milvus_errors(server, name):
            if client.has_collection(name, timeout=server.call_seconds):
                index = cls._of(server, name, client)
                log(f"{index.name}: goes on with an interrupted build")
                index._patiently(client.load_collection)
            else:
                index = cls(server, name, client, info)
                index._create(options, rows, shards)
                index.is_new = True
        index._local = []
        return index

    def _create(self, options: IndexOptions, rows: int, shards: int) -> None:
        """Makes the empty collection with its vector index."""
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field(ID, DataType.INT64, is_primary=True)
        schema.add_field(TEXT, DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=self.dim)
        parameters = self._client.prepare_index_params()
        kind = self.info.index_type
        # pymilvus takes the outer `params` apart. Milvus Lite reads only the inner one, servers read both.
        params = {"params": build_parameters(kind, options, rows)}
        parameters.add_index(VECTOR, index_type=kind, metric_type="IP", params=params)
        self._client.create_collection(
            self.name,
            schema=schema,
            properties={PROPERTY: self._info_json()},
            num_shards=shards,
            consistency_level="Bounded",
            timeout=self.server.call_seconds,
        )
        try:
            self._client.create_index(self.name, parameters, timeout=self.server.call_seconds)
        except BaseException:
            self._client.drop_collection(self.name, timeout=self.server.call_seconds)
            raise

    def _info_json(self) -> str:
        return json.dumps(asdict(self.info), sort_keys=True)

    # How it is searched.

    @property
    def ef(self) -> int:
        """Candidates kept while searching, see `CollectionInfo`."""
        return self.info.ef

    @ef.setter
    def ef(self, ef: int) -> None:
        self.info = replace(self.info, ef=ef)

    @property
    def target_recall(self) -> float:
        """See `VectorIndex`."""
        return self.info.target_recall

    @target_recall.setter
    def target_recall(self, target_recall: float) -> None:
        self.info = replace(self.info, target_recall=target_recall)

    @property
    def is_tunable(self) -> bool:
        """Whether `ef` changes what is found."""
        return self.info.index_type in WIDTH_NAMES

    def save_settings(self) -> None:
        """Keeps `ef` and the target recall in the collection, for all who search it."""
        with milvus_errors(self.server, self.name):
            self._client.alter_collection_properties(
                self.name, {PROPERTY: self._info_json()}, timeout=self.server.call_seconds
            )

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        ids, similarities = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
        with progress_bar(len(queries), "search", "query") as progress:
            for start in range(0, len(queries), QUERY_ROWS):
                rows = slice(start, start + QUERY_ROWS)
                ids[rows], similarities[rows], documents = self.find(queries[rows], k)
                self.documents.remember(documents)
                progress.update(len(ids[rows]))
        short = np.flatnonzero(ids[:, -1] < 0)  # an approximate index of Milvus doesn't promise k hits
        if len(short) and self.searches_exactly:
            found, cosines = self.search_exactly(queries[short], k)
            ids[short, : found.shape[1]], similarities[short, : found.shape[1]] = found, cosines
        return ids, similarities

    def find(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """What Milvus finds, in one step: ids, cosines, and the documents by id.

        queries: unit vectors, float32 [Q, dim]. Returns int64 and float32 [Q, k], best first; where Milvus finds fewer,
        the last ids and cosines are -1. Raises InputError.
        """
        if k > MAX_K:
            raise InputError(f"{self.server}: returns up to {MAX_K} hits for a query, not {k}; ask for fewer")
        ids, cosines = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -1, np.float32)
        documents: dict[int, str] = {}
        rows = max(1, min(QUERY_ROWS, ANSWER_HITS // k))
        for start in range(0, len(queries), rows):
            for row, hits in enumerate(self._search_once(queries[start : start + rows], k), start):
                ids[row, : len(hits)] = [hit[ID] for hit in hits]
                cosines[row, : len(hits)] = [hit["distance"] for hit in hits]
                documents.update((hit[ID], hit["entity"][TEXT]) for hit in hits)
        return ids, cosines, documents

    def _search_once(self, queries: np.ndarray, k: int) -> Sequence[Sequence[Any]]:
        name = WIDTH_NAMES.get(self.info.index_type)
        lowest = 1 if name == "nprobe" else k
        width = {name: max(self.ef, lowest)} if name else {}
        with self._reading() as consistency:
            return self._client.search(
                self.name,
                data=list(queries),
                limit=k,
                output_fields=[TEXT],
                search_params={"metric_type": "IP", "params": width},
                anns_field=VECTOR,
                consistency_level=consistency,
                timeout=self.server.call_seconds,
            )

    # What it holds.

    @property
    def live_count(self) -> int:
        """The number of documents; others' changes are seen within COUNT_SECONDS."""
        count, when = self._known_count
        if self._last_change is not self._seen_change or time.monotonic() - when > COUNT_SECONDS:
            count = self.count()
            self._known_count = count, time.monotonic()
        return count

    def __len__(self) -> int:
        return self.live_count

    def count(self, ids: Iterable[int] | None = None) -> int:
        """How many documents there are, or how many of those with these ids, of which there are up to RANGE_ROWS."""
        condition = "" if ids is None else f"{ID} in {list(map(int, ids))}"
        with self._reading() as consistency:
            options = {"consistency_level": consistency, "timeout": self.server.call_seconds}
            found = self._client.query(self.name, filter=condition, output_fields=["count(*)"], **options)
        return int(found[0]["count(*)"])

    @contextlib.contextmanager
    def _reading(self, latest: bool = False) -> Iterator[str]:
        """The consistency level with which this object's own changes are seen; latest: and all of others."""
        change = self._last_change
        with milvus_errors(self.server, self.name):
            yield "Bounded" if self._seen_change is change and not latest else "Strong"
        self._seen_change = change

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            with milvus_errors(self.server, self.name):
                yield
        finally:  # a call that fails may have an effect; reads that began before its end needn't have seen it
            self._last_change = object()

    def texts(self, ids: Sequence[int], *, latest: bool = False) -> dict[int, str]:
        """The documents that are there, by id. latest: also those that others have just added."""
        found: dict[int, str] = {}
        for start in range(0, len(ids), RANGE_ROWS):
            with self._reading(latest) as consistency:
                rows = self._client.query(
                    self.name,
                    filter=f"{ID} in {list(map(int, ids[start : start + RANGE_ROWS]))}",
                    output_fields=[ID, TEXT],
                    consistency_level=consistency,
                    timeout=self.server.call_seconds,
                )
            found |= {row[ID]: row[TEXT] for row in rows}
        return found

    def is_live(self, row: int) -> bool:
        """Whether there is a document with this id."""
        return self.count([row]) > 0

    def sample_ids(self, count: int) -> list[int]:
        """The ids of some documents, at most `count`."""
        with milvus_errors(self.server, self.name):
            rows = self._client.query(
                self.name,
                filter=f"{ID} >= 0",
                output_fields=[ID],
                limit=min(count, MAX_K),
                timeout=self.server.call_seconds,
            )
        return sorted(row[ID] for row in rows)

    @property
    def searches_exactly(self) -> bool:
        """Whether the vectors are here, or few enough to read them from the server."""
        return self._has_local or self.live_count <= MAX_STREAMED

    @property
    def _has_local(self) -> bool:
        """Whether all vectors were added by this object."""
        return self._local is not None and sum(len(ids) for ids, _ in self._local) == self.live_count

    def assign_ids(self, documents: Sequence[str]) -> Added:
        """The ids of documents, and which of them the collection lacks; of equal ones, the first."""
        ids = self.ids_of(documents)
        seen = set(self.texts(list(dict.fromkeys(ids)), latest=True))
        is_new = []
        for each in ids:
            is_new.append(each not in seen)
            seen.add(each)
        return Added(ids, is_new)

    def ids_of(self, documents: Iterable[str]) -> list[int]:
        """The `document_id` of each document."""
        return [document_id(document, self.info.lowercase) for document in documents]

    def _live_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From the vectors that were added here, if those are all; else from the server."""
        if self._local is not None and self._has_local:
            for ids, vectors in self._local:
                for start in range(0, len(ids), CORPUS_BLOCK):
                    rows = slice(start, start + CORPUS_BLOCK)
                    yield ids[rows], np.asarray(vectors[rows], np.float32)
            return
        for page_ids, values in self.pages(VECTOR):
            yield np.array(page_ids, np.int64), np.array(values, np.float32)

    def pages(self, field: str) -> Iterator[tuple[list[int], list[Any]]]:
        """All ids and values of a field, page by page."""
        with milvus_errors(self.server, self.name):
            pages = self._client.query_iterator(
                self.name, batch_size=PAGE_ROWS, output_fields=[ID, field], consistency_level="Strong"
            )
            while rows := pages.next():
                yield [row[ID] for row in rows], [row[field] for row in rows]
            pages.close()

    # How it changes.

    def _add(self, vectors: Any, documents: Sequence[str]) -> None:
        """Sends what isn't there yet; safe to repeat after an interruption."""
        if len(documents) != len(vectors):
            raise InputError(f"there are {len(documents)} documents and {len(vectors)} vectors")
        all_ids = np.empty(len(documents), np.int64)
        with progress_bar(len(vectors), "milvus", "vector") as progress, ThreadPoolExecutor(IN_FLIGHT) as pool:
            try:
                waiting: set[Future[int]] = set()
                for start in range(0, len(vectors), RANGE_ROWS):
                    rows = slice(start, min(start + RANGE_ROWS, len(vectors)))
                    texts = documents[rows]
                    check_sizes(texts, start)
                    all_ids[rows] = ids = np.array(self.ids_of(texts))
                    if not self.is_new and self.count(ids) == len(ids):
                        progress.update(len(ids))
                        continue
                    for batch in _batches(texts, self.dim):
                        done, waiting = _bounded(waiting)
                        progress.update(done)
                        part = np.asarray(vectors[start + batch.start : start + batch.stop], np.float32)
                        waiting.add(pool.submit(self._send, ids[batch].tolist(), texts[batch], part))
                progress.update(sum(future.result() for future in waiting))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self._local is not None:
            self._local.append((all_ids, vectors))

    def _send(self, ids: Sequence[int], texts: Sequence[str], vectors: np.ndarray) -> int:
        """Sends rows; how many. A row that is there already is replaced."""
        rows = [{ID: each, TEXT: text, VECTOR: vector} for each, text, vector in zip(ids, texts, vectors, strict=True)]
        send = self._client.insert if self.is_new else self._client.upsert
        with self._changing():
            send(self.name, rows, timeout=self.server.call_seconds)
        return len(rows)

    def keep_vectors(self, ids: np.ndarray, vectors: Any) -> None:
        """Says that these are all vectors of the collection, int64 [N] and [N, dim], for `search_exactly`."""
        self._local = [(ids, vectors)]

    def delete(self, ids: Iterable[int]) -> int:
        """`VectorIndex.delete`; deleted before it returns, for searches of this client."""
        there = list(self.texts(list(dict.fromkeys(ids)), latest=True))
        if there:
            with self._changing():
                self._client.delete(self.name, ids=there, timeout=self.server.call_seconds)
            self._local = None
        return len(there)

    def finish(self, documents: Sequence[str]) -> None:
        """Waits until all documents are on the server's disk and indexed. Raises InputError if some are missing.

        documents: all that were added.
        """
        self._patiently(self._client.flush)
        with milvus_errors(self.server, self.name):
            self._wait_for_index()
        self.reload()  # else new rows are searched without the index
        self.is_new = False
        self._last_change = object()
        count = self.count()
        if count != len(documents):
            raise InputError(f"{self}: has {count} of {len(documents)} documents; {self._lacking(documents)}")

    def reload(self) -> None:
        """Has the server read all documents and their index from its disk again."""
        with milvus_errors(self.server, self.name):
            self._client.release_collection(self.name, timeout=self.server.call_seconds)
        self._patiently(self._client.load_collection)

    def _patiently(self, call: Callable[..., Any]) -> None:
        """Repeats a call for the collection, which may take long and can be repeated, while Milvus answers others."""
        while True:
            try:
                with milvus_errors(self.server, self.name):
                    call(self.name, timeout=self.server.call_seconds)
                return
            except MilvusUnavailable:
                with milvus_errors(self.server, self.name):
                    self._client.has_collection(self.name, timeout=self.server.call_seconds)

    def _wait_for_index(self) -> None:
        """Waits until Milvus has indexed all rows, which it does in segments of up to a million."""
        state, indexed, moved = self._index_state(), 0, time.monotonic()
        with progress_bar(state.total, "milvus index", "vector") as progress:
            while state.indexed < state.total:
                if state.indexed > indexed:
                    progress.update(state.indexed - indexed)
                    indexed, moved = state.indexed, time.monotonic()
                if state.has_failed or time.monotonic() - moved > STALLED_SECONDS:  # some retry for ever
                    remedy = f"look into its log, or give another --milvus_index_type than {self.info.index_type}"
                    raise InputError(f"{self.server}: doesn't get on with the index of {self.name}; {remedy}")
                time.sleep(POLL_SECONDS)
                state = self._index_state()
            progress.update(state.total - indexed)

    def _index_state(self) -> "_IndexState":
        state = self._client.describe_index(self.name, VECTOR, timeout=self.server.call_seconds) or {}
        total, pending = int(state.get("total_rows", 0)), int(state.get("pending_index_rows", 0))
        return _IndexState(total, total - pending, state.get("state") == "Failed")

    def _lacking(self, documents: Sequence[str]) -> str:
        """Which ranges of rows are missing, and what to do."""
        ranges = [
            f"{start} to {min(start + RANGE_ROWS, len(documents)) - 1}"
            for start in range(0, len(documents), RANGE_ROWS)
            if self.count(ids := self.ids_of(documents[start : start + RANGE_ROWS])) != len(ids)
        ]
        if not ranges:
            return "it has documents that aren't of this corpus; drop it and build it again"
        return f"rows {', '.join(ranges[:10])} lack some; run this again, which sends them"

    def publish(self, alias: str) -> None:
        """Makes this collection the one that is searched under the alias, and drops the one before."""
        before = alias_target(self.server, self._client, alias)
        with milvus_errors(self.server, self.name):
            if before is None:
                self._client.create_alias(self.name, alias, timeout=self.server.call_seconds)
            elif before != self.name:
                self._client.alter_alias(self.name, alias, timeout=self.server.call_seconds)
                self._client.drop_collection(before, timeout=self.server.call_seconds)


class MilvusDocuments(Mapping[int, str]):
    """The documents of a collection by id. Keeps those found last: an id is a hash of the text."""

    def __init__(self, index: MilvusIndex) -> None:
        self._index = index
        self._found: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return self._index.live_count

    def __getitem__(self, row: int) -> str:
        document = self._found.get(row)
        if document is None:
            self.remember(self._index.texts([row]))
            document = self._found[row]
        return document

    def __iter__(self) -> Iterator[int]:
        return (row for ids, _ in self._index.pages(TEXT) for row in ids)

    def remember(self, documents: Mapping[int, str]) -> None:
        """Keeps documents that a search has found."""
        self._found.update(documents)
        while len(self._found) > CACHED_DOCUMENTS:
            self._found.popitem(last=False)


def _batches(texts: Sequence[str], dim: int) -> Iterator[slice]:
    """Rows of up to BATCH_BYTES together."""
    start = size = 0
    for row, text in enumerate(texts):
        row_bytes = len(text.encode()) + 4 * dim + 8
        size += row_bytes
        if size > BATCH_BYTES and row > start:
            yield slice(start, row)
            start, size = row, row_bytes
    yield slice(start, len(texts))


def _bounded(waiting: "set[Future[int]]") -> "tuple[int, set[Future[int]]]":
    """Waits until fewer than 2 IN_FLIGHT calls are waiting; the rows of those that are done, and the others."""
    if len(waiting) < 2 * IN_FLIGHT:
        return 0, waiting
    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
    return sum(future.result() for future in done), waiting
