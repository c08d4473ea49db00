"""The collection in Milvus that a service searches, as any number of other services may. Imports no Paddle."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ann_util import check_unit_vectors
from common.errors import InputError
from retrieval.hybrid_search import VECTOR, by_vectors
from retrieval.live_index import Added
from retrieval.milvus_collection import MAX_TEXT_BYTES
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_place import MilvusPlace
from retrieval.milvus_server import CollectionMissing, MilvusUnavailable
from serving.limits import BAD_REQUEST, FORBIDDEN, NO_SEARCH, RequestError, service_log
from serving.search import MODEL_LENGTH, READ_ONLY, Hits, IndexState, ServedIndex

CALL_SECONDS = 5  # that a call of Milvus may take
WATCH_SECONDS = 3.0  # between looks at what the alias names, and whether Milvus answers
STOP_SECONDS = 1.0  # that `close` waits for such a look
NO_WORDS = "an index in Milvus has no words: leave mode out"
NO_ANSWER = "Milvus doesn't answer: try again later; the service's log says more"
NOT_USABLE = "the index in Milvus can't be searched now: the service's log says why"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Collection:
    """What is searched."""

    index: MilvusIndex
    state: IndexState


class MilvusSearch(ServedIndex):
    """The collection that an alias in Milvus names.

    A thread looks every WATCH_SECONDS whether the alias names another collection, as after a rebuild, and how many
    documents there are. If Milvus doesn't answer, searches are refused at once until it does. Each answer is of one
    collection, whose name is its version; a change by this or another service doesn't alter it.

    model: fingerprint of the encoder. precision: the encoder's; a collection of another one is logged. writable: takes
    and deletes documents. Raises InputError if there is no such collection, or one of another model.
    """

    def __init__(self, place: MilvusPlace, model: str, precision: str, *, writable: bool = False) -> None:
        self._model, self._writable = model, writable
        # Without the file, which a rebuild on another machine doesn't change.
        self._place = place._replace(server=place.server._replace(call_seconds=CALL_SECONDS), file=None)
        index = place._replace(file=None).open()  # with the time that loading a large collection takes
        place.check(index, model, precision=precision)
        index.server = self._place.server
        self._collection = self._counted(index)
        self._reason = ""  # of `problem`, for the log
        self._refreshing, self._changing = threading.Lock(), threading.Lock()
        self._wake, self._is_closed = threading.Event(), False
        self._watcher = threading.Thread(target=self._watch, name="milvus", daemon=True)
        self._watcher.start()

    @property
    def state(self) -> IndexState:
        """Of the last look."""
        return self._collection.state

    @property
    def is_searchable(self) -> bool:
        """Whether Milvus answered last."""
        return self.problem is None

    def search(self, vectors: np.ndarray, top_k: int, texts: Sequence[str] = (), mode: str | None = VECTOR) -> Hits:
        """`ServedIndex.search`; where Milvus finds fewer than top_k documents, the last hits are missing."""
        if mode not in (None, VECTOR):
            raise RequestError(BAD_REQUEST, NO_WORDS, "mode")
        check_unit_vectors(vectors, self._collection.index.dim, "query", 0)
        collection, (ids, cosines, documents) = self._ask(lambda index: index.find(vectors, top_k))
        return Hits(collection.state, VECTOR, documents, by_vectors(ids, cosines))

    def add(self, documents: Sequence[str], vectors: np.ndarray) -> tuple[IndexState, Added]:
        """Adds documents, except those that the collection has; Milvus has taken them afterwards. Raises RequestError.

        If two services add the same document at the same time, it is there once, and both say that it is new.
        """
        for row, document in enumerate(documents):
            if len(document.encode()) > MAX_TEXT_BYTES:
                problem = f"document {row} has more than {MAX_TEXT_BYTES} bytes, which Milvus doesn't take: shorten it"
                raise RequestError(BAD_REQUEST, problem, "documents")
        return self._change(lambda index: _add_missing(index, documents, vectors))

    def delete(self, ids: Sequence[int] = (), documents: Sequence[str] = ()) -> tuple[IndexState, int]:
        """`ServedIndex.delete`."""
        return self._change(lambda index: index.delete([*ids, *index.ids_of(documents)]))

    def check_writable(self) -> None:
        """`ServedIndex.check_writable`."""
        if not self._writable:
            raise RequestError(FORBIDDEN, READ_ONLY)

    def _change(self, change: Callable[[MilvusIndex], Answer]) -> tuple[IndexState, Answer]:
        """Changes the collection that the alias names now. Raises RequestError."""
        self.check_writable()
        with self._changing:  # two requests with the same document
            self._check_searchable()
            self.reload()
            _, answer = self._ask(change)
            _, self._collection = self._ask(self._counted)
            return self.state, answer

    def _check_searchable(self) -> None:
        if self.problem is not None:
            raise RequestError(NO_SEARCH, self.problem)

    def _ask(self, question: Callable[[MilvusIndex], Answer]) -> tuple[_Collection, Answer]:
        """What the collection in service answers or, if it was dropped, the one that took its place.

        Raises RequestError.
        """
        self._check_searchable()
        collection = self._collection
        try:
            try:
                return collection, question(collection.index)
            except CollectionMissing:
                self.reload()
                collection = self._collection
                return collection, question(collection.index)
        except InputError as error:
            refusal = self._refusal(error)
            self._wake.set()
            raise refusal from None

    def _refusal(self, error: Exception) -> RequestError:
        """Refuses searches from now on; says why in the log, once."""
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__} in asking Milvus"
        if reason != self._reason:
            service_log(f"error: {reason}; searches are refused until that is over")
        self._reason = reason
        self.problem = NO_ANSWER if isinstance(error, MilvusUnavailable) else NOT_USABLE
        return RequestError(NO_SEARCH, self.problem)

    def reload(self) -> None:
        """Takes the collection that the alias names now, with its present settings. Raises RequestError."""
        with self._refreshing:
            before = self._collection
            try:
                index = before.index
                if self.problem is not None or not index.refresh(self._place.collection):
                    index = self._place.open()
                self._place.check(index, self._model)
                self._collection = self._counted(index)
            except Exception as error:
                if isinstance(error, MilvusUnavailable):  # gRPC might wait for two minutes before it connects again
                    before.index.disconnect()
                raise self._refusal(error) from None
            is_new = self.problem is not None or before.index.name != index.name
            self.problem, self._reason = None, ""
            if is_new:
                service_log(f"search: {self}")

    def _counted(self, index: MilvusIndex) -> _Collection:
        return _Collection(index, IndexState(index.name, index.live_count, self._model[:MODEL_LENGTH], [VECTOR]))

    def _watch(self) -> None:
        while True:
            self._wake.wait(WATCH_SECONDS)
            self._wake.clear()
            if self._is_closed:
                return
            with suppress(RequestError):
                self.reload()

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed = True
        self._wake.set()
        self._watcher.join(STOP_SECONDS)


def _add_missing(index: MilvusIndex, documents: Sequence[str], vectors: np.ndarray) -> Added:
    """Adds the documents that the index lacks. vectors: float32 [N, D] of all."""
    added = index.assign_ids(documents)
    rows = np.flatnonzero(added.is_new)
    if len(rows):
        index.add(vectors[rows], [documents[row] for row in rows])
    return added
