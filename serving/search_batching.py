"""Searches for the queries of several requests together. Imports no Paddle."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import numpy as np

from retrieval.hybrid_search import VECTOR, SearchHits
from serving.limits import INTERNAL_ERROR, RequestError, service_log
from serving.metrics import Metrics
from serving.search import Hits, ServedIndex


class _Job(NamedTuple):
    """The queries of a request, and their future hits."""

    texts: Sequence[str]
    vectors: np.ndarray
    top_k: int
    mode: str | None
    hits: "Future[Hits]"


class SearchBatcher:
    """Searches for the queries of waiting requests together, in a thread."""

    def __init__(self, index: ServedIndex, metrics: Metrics) -> None:
        self.index, self._metrics = index, metrics
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None ends the thread
        self._thread = Thread(target=self._run, name="search", daemon=True)
        self._thread.start()

    def search(self, vectors: np.ndarray, top_k: int, texts: Sequence[str] = (), mode: str | None = VECTOR) -> Hits:
        """`ServedIndex.search`. Raises RequestError if the search fails."""
        job = _Job(texts, vectors, top_k, mode, Future())
        self._jobs.put(job)
        return job.hits.result()

    def stop(self) -> None:
        """Ends the thread; no request may be waiting."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            with suppress(Empty):
                while (more := self._jobs.get_nowait()) is not None:
                    jobs.append(more)
                self._jobs.put(None)  # from `stop`; put back, it ends this thread in the next round
            # Not all together: HNSW finds more with a larger top_k, and hits mustn't depend on other requests.
            for how in dict.fromkeys((job.top_k, job.mode) for job in jobs):
                self._search([job for job in jobs if (job.top_k, job.mode) == how], *how)

    def _search(self, jobs: Sequence[_Job], top_k: int, mode: str | None) -> None:
        """Searches for the queries of jobs with the same top_k and mode."""
        vectors, texts = np.concatenate([job.vectors for job in jobs]), [text for job in jobs for text in job.texts]
        start = time.monotonic()
        try:
            hits = self.index.search(vectors, top_k, texts, mode)
        except RequestError as error:
            for job in jobs:
                job.hits.set_exception(error)
            return
        except Exception as error:  # it would end the thread
            service_log(f"error: {type(error).__name__} in searching the index")
            for job in jobs:
                job.hits.set_exception(RequestError(INTERNAL_ERROR, "the search failed: try again"))
            return
        self._metrics.searched(len(vectors), int((hits.found.ids >= 0).sum()), time.monotonic() - start)
        ends = np.cumsum([len(job.vectors) for job in jobs])[:-1]
        for job, parts in zip(jobs, zip(*(np.split(part, ends) for part in hits.found), strict=True), strict=True):
            job.hits.set_result(hits._replace(found=SearchHits(*parts)))
