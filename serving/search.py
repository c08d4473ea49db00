"""The index that a service searches, one version of it at a time. Imports no Paddle."""

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cpu import release_freed_memory
from common.errors import InputError
from retrieval.hybrid_search import MODES, VECTOR, SearchHits, search
from retrieval.live_index import Added, LiveIndex
from retrieval.saved_index import DocumentIndex, index_version, load_with_version
from serving.limits import BAD_REQUEST, FORBIDDEN, INTERNAL_ERROR, RequestError, service_log

MODEL_LENGTH = 12  # hexadecimal digits
NO_WORDS = "the index has no words: leave mode out, or build the index with recall.py --lexical bm25"
READ_ONLY = "the service is read-only: start it with --writable to add and delete documents"
NOT_WRITTEN = "the change couldn't be written: the service's log says why"
NOT_IN_USE = "the index in the folder can't be used, so the one before stays in service: the service's log says why"


class IndexState(NamedTuple):
    """What answers tell of an index."""

    version: str
    documents: int  # how many
    model: str  # the first digits of the encoder's fingerprint
    modes: list[str]  # that it can be searched in; the last one is the default


class LoadedIndex:
    """A version of an index, in memory; one that `live` changes has a new version after each change."""

    def __init__(self, version: str, index: DocumentIndex | LiveIndex) -> None:
        self._version = version  # see `index_version`
        self.live = index if isinstance(index, LiveIndex) else None
        self._index = index

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[IndexState, DocumentIndex]]:
        """Its state and content, which don't change within the block."""
        if isinstance(self._index, DocumentIndex):
            yield _state(self._version, self._index), self._index
            return
        with self._index.reading() as saved:
            changes = self._index.changes
            yield _state(f"{self._version}+{changes}" if changes else self._version, saved), saved

    def is_in(self, folder: Path) -> bool:
        """Whether the folder holds this index."""
        return self.live.is_in_place if self.live else index_version(folder) == self._version


def _state(version: str, saved: DocumentIndex) -> IndexState:
    modes = [VECTOR] if saved.lexical is None else list(MODES)
    return IndexState(version, saved.index.live_count, saved.model[:MODEL_LENGTH], modes)


class Hits(NamedTuple):
    """What a search found in one version of the index."""

    state: IndexState
    mode: str  # one of `retrieval.hybrid_search.MODES`
    documents: Mapping[int, str]  # those that were found, by id
    found: SearchHits


class ServedIndex(ABC):
    """An index that a service searches, and of which a newer version can be taken into service."""

    problem: str | None = None  # why the index in service isn't the one that it should be

    def __str__(self) -> str:
        return f"{self.state.documents} documents, version {self.state.version}"

    @property
    @abstractmethod
    def state(self) -> IndexState:
        """The version in service; known at once."""

    @property
    def is_searchable(self) -> bool:
        """Whether searches aren't refused for now."""
        return True

    @abstractmethod
    def search(self, vectors: np.ndarray, top_k: int, texts: Sequence[str] = (), mode: str | None = VECTOR) -> Hits:
        """The best documents of each query.

        vectors: of the queries, float32 [Q, D]; texts: the same queries, for modes that search words; mode: one of
        MODES, or None for hybrid if the index has words, else vector. Raises InputError for vectors of another shape,
        and RequestError for a mode that needs words if the index has none, and for an index that can't be searched now.
        """

    @abstractmethod
    def add(self, documents: Sequence[str], vectors: np.ndarray) -> tuple[IndexState, Added]:
        """Adds documents, except those that the index has. Raises RequestError.

        documents: as `parse_documents` gives them; vectors: float32 [N, D] of them.
        """

    @abstractmethod
    def delete(self, ids: Sequence[int] = (), documents: Sequence[str] = ()) -> tuple[IndexState, int]:
        """Deletes documents by their ids and by their texts; how many there were. Raises RequestError."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raises RequestError if the index takes no changes."""

    @abstractmethod
    def reload(self) -> None:
        """Takes a newer version into service, if there is one. Raises RequestError if it can't be used."""

    def reload_in_background(self) -> None:
        """`reload` in a thread; an error is only logged."""

        def reload() -> None:
            with suppress(RequestError):
                self.reload()

        threading.Thread(target=reload, name="reload", daemon=True).start()

    @abstractmethod
    def close(self) -> None:
        """Takes no more changes."""


class SearchIndex(ServedIndex):
    """The index in a folder.

    model: fingerprint of the encoder. precision: the encoder's; an index of another one is logged. writable: takes and
    deletes documents, and keeps others from changing the folder; lowercase: see LiveIndex. Raises InputError if the
    folder holds no index, a damaged one, or one of another model.
    """

    def __init__(
        self, folder: str | Path, model: str, precision: str, *, writable: bool = False, lowercase: bool = True
    ) -> None:
        self._folder, self._model, self._precision = Path(folder), model, precision
        self._writable, self._lowercase = writable, lowercase
        self._loaded = self._load()
        self._searching, self._reloading = threading.Lock(), threading.Lock()

    @property
    def state(self) -> IndexState:
        """The version in service, with a number that counts its changes."""
        with self._loaded.reading() as (state, _):
            return state

    def search(self, vectors: np.ndarray, top_k: int, texts: Sequence[str] = (), mode: str | None = VECTOR) -> Hits:
        """`ServedIndex.search`."""
        with self._searching, self._loaded.reading() as (state, saved):
            chosen = mode or state.modes[-1]
            if chosen not in state.modes:
                raise RequestError(BAD_REQUEST, NO_WORDS, "mode")
            found = search(saved, texts, vectors, top_k, chosen)
            documents = {row: saved.documents[row] for row in np.unique(found.ids).tolist() if row >= 0}
            return Hits(state, chosen, documents, found)

    def add(self, documents: Sequence[str], vectors: np.ndarray) -> tuple[IndexState, Added]:
        """Adds documents, see `LiveIndex.add`; they are on disk afterwards. Raises RequestError."""
        with self._changing() as live:
            added = live.add(documents, vectors)
        return self.state, added

    def delete(self, ids: Sequence[int] = (), documents: Sequence[str] = ()) -> tuple[IndexState, int]:
        """`ServedIndex.delete`."""
        with self._changing() as live:
            found = [row for row in live.find(documents) if row is not None]
            deleted = live.delete([*ids, *found])
        return self.state, deleted

    def check_writable(self) -> None:
        """`ServedIndex.check_writable`."""
        self._live()

    def _live(self) -> LiveIndex:
        """The index that takes changes. Raises RequestError if it takes none."""
        if self._loaded.live is None:
            raise RequestError(FORBIDDEN, READ_ONLY)
        return self._loaded.live

    @contextlib.contextmanager
    def _changing(self) -> Iterator[LiveIndex]:
        """The index to change. Raises RequestError if it takes no changes, or can't write them."""
        with self._reloading:  # a change mustn't go to an index that is about to be replaced
            live = self._live()
            try:
                yield live
            except InputError as error:
                service_log(f"error: {error}")
                raise RequestError(INTERNAL_ERROR, NOT_WRITTEN) from None

    def reload(self) -> None:
        """Takes the index that is now in the folder into service; does nothing if it is the same.

        Searches under way finish on the version before, whose memory goes back to the system. Raises RequestError, and
        that version stays, if the folder's index can't be used; a line in the log says why.
        """
        with self._reloading:
            try:
                if not self._loaded.is_in(self._folder):
                    loaded, before = self._load(), self._loaded
                    with self._searching:
                        self._loaded = loaded
                    if before.live:
                        before.live.close(compact=False)
                    del before
                    release_freed_memory()
                    service_log(f"search: {self}")
            except Exception as error:
                reason = error if isinstance(error, InputError) else f"{type(error).__name__} in loading the index"
                service_log(f"error: {reason}; version {self.state.version} of the index stays in service")
                self.problem = NOT_IN_USE
                raise RequestError(INTERNAL_ERROR, NOT_IN_USE) from None
            self.problem = None

    def close(self) -> None:
        """Takes no more changes, and writes those that were made into the files of the index."""
        with self._reloading:
            if self._loaded.live:
                self._loaded.live.close()

    def _load(self) -> LoadedIndex:
        if self._writable:  # its lock keeps others from replacing the folder
            live = LiveIndex(self._folder, self._model, precision=self._precision, lowercase=self._lowercase)
            return LoadedIndex(index_version(self._folder), live)
        return LoadedIndex(*load_with_version(self._folder, self._model, precision=self._precision))
