"""Encodes the texts of several requests together. Imports neither Paddle nor Serving."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import NamedTuple

import numpy as np

from serving.encoder_process import EncoderProcess, EncoderStopped
from serving.limits import INTERNAL_ERROR, Admission, RequestError, service_log
from serving.metrics import Metrics


class _Job(NamedTuple):
    """The texts of a request, and its future vectors."""

    texts: Sequence[str]
    vectors: "Future[np.ndarray]"


class Batcher:
    """Joins the texts of waiting requests into batches, in a thread for each encoder.

    A batch has at least `batch_size` texts, or all that are waiting. It waits up to `max_queue_delay` seconds for as
    many requests as were unanswered before, since clients that got their answers together send their next requests
    soon after. A single client never waits.
    """

    def __init__(
        self,
        encoders: Sequence[EncoderProcess],
        batch_size: int,
        max_queue_delay: float,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self._batch_size, self._max_queue_delay = batch_size, max_queue_delay
        self._admission, self._metrics = admission, metrics
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None ends a thread
        self._threads = [Thread(target=self._run, args=(encoder,), name="encode", daemon=True) for encoder in encoders]
        for thread in self._threads:
            thread.start()

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors, float32 [N, D]. Raises RequestError if the encoder fails."""
        job = _Job(texts, Future())
        self._jobs.put(job)
        return job.vectors.result()

    def stop(self) -> None:
        """Ends the threads; no request may be waiting."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self, encoder: EncoderProcess) -> None:
        expected = 1
        while (job := self._jobs.get()) is not None:
            batch = [job]
            until = time.monotonic() + self._max_queue_delay
            while sum(len(job.texts) for job in batch) < self._batch_size:
                wait = until - time.monotonic() if len(batch) < expected else 0.0
                try:
                    more = self._jobs.get(timeout=max(wait, 0.0))
                except Empty:
                    break
                if more is None:  # from `stop`; put back, it ends this thread in the next round
                    self._jobs.put(None)
                    break
                batch.append(more)
            self._encode(encoder, batch)
            expected = self._admission.requests // len(self._threads)

    def _encode(self, encoder: EncoderProcess, batch: Sequence[_Job]) -> None:
        texts = [text for job in batch for text in job.texts]
        start = time.monotonic()
        try:
            vectors = encoder.encode(texts)
            self._metrics.encoded(len(texts), time.monotonic() - start)
            parts = np.split(vectors, np.cumsum([len(job.texts) for job in batch])[:-1])
        except Exception as error:  # it would end the thread; its message could contain texts
            is_known = isinstance(error, EncoderStopped)
            what = f"the encoder {error}" if is_known else f"{type(error).__name__} in encoding a batch"
            service_log(f"error: {what}")
            for job in batch:
                job.vectors.set_exception(RequestError(INTERNAL_ERROR, "the encoder failed: try again"))
            return
        for job, part in zip(batch, parts, strict=True):
            job.vectors.set_result(part)
