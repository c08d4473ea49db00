"""A lock for data that many threads read and some change."""

import contextlib
import threading
from collections.abc import Iterator


class ReadWriteLock:
    """Lets many readers in at the same time, or one writer alone.

    They take turns, so that neither keeps the other out: no reader overtakes a waiting writer, and a writer lets those
    in who waited for the one before it. A thread must not ask for the lock while it holds it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._is_writing = False
        self._waiting_readers = self._waiting_writers = 0
        self._next_readers = 0  # of the waiting ones, those who go before the next writer

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keeps writers out."""
        with self._changed:
            self._waiting_readers += 1
            try:
                self._changed.wait_for(
                    lambda: not self._is_writing and (self._next_readers or not self._waiting_writers)
                )
                self._readers += 1
            finally:
                self._waiting_readers -= 1
                self._next_readers = min(self._next_readers, self._waiting_readers)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps all others out."""
        with self._changed:
            self._waiting_writers += 1
            try:
                self._changed.wait_for(lambda: not (self._is_writing or self._readers or self._next_readers))
                self._is_writing = True
            finally:
                self._waiting_writers -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._is_writing = False
                self._next_readers = self._waiting_readers
                self._changed.notify_all()
