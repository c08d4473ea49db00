"""How scripts react to SIGINT and SIGTERM."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM as a KeyboardInterrupt, so that the same clean-up runs as after Ctrl-C."""


def terminate(*_: object) -> NoReturn:
    """A signal handler that raises Terminated."""
    raise Terminated


class Stopped(Exception):
    """Ends work early: a signal arrived inside `StopSignals.raised`, or another rank has called `announce_exit`."""


class StopSignals:
    """A context manager in which SIGINT and SIGTERM only set `received`, so that the work in hand can be finished."""

    def __init__(self) -> None:
        self.received: int | None = None  # number of the first signal
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.received = self.received or number
        if self._raise:
            self._raise = False  # a second signal must not interrupt the reaction to the first
            raise Stopped

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """For work that may be abandoned: inside this block a signal raises Stopped, also one that came before it."""
        self._raise = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._raise = False
