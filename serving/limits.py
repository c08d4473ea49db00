"""The limits of requests, their errors, and the log. Imports neither Paddle nor Serving."""

import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from common.logs import log
from common.texts import ROLES, has_visible_text

# Values of err_no: those of Serving's `CustomExceptionCode` (0.9.0); it leaves 51 to 99 to its users.
OK = 0
OVERLOADED = 51
FORBIDDEN = 52
NO_SEARCH = 53  # the index can't be searched now
STOPPING = 3001
NO_SUCH_SERVICE = 3002
BAD_REQUEST = 5000
INTERNAL_ERROR = 10000
ROLE_KEY = "role"  # of a request: its value is what the texts are
MAX_TOP_K = 1000  # hits per query, by default
OTHER_FILES = 40  # that the service opens beside the connections of its two ports; 15 with one encoder at rest


def service_log(message: str) -> None:
    """Prints a line on stderr; the service continues if nothing reads its log any more."""
    with suppress(OSError):
        log(message)


class RequestError(Exception):
    """A request that can't be answered; the message is for the client and contains neither texts nor paths.

    number: see above; param: the field of the request that is wrong, if it is one.
    """

    def __init__(self, number: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.number, self.param = number, param


class Limits(NamedTuple):
    """Limits of a request, except `queued_texts`."""

    texts: int
    characters: int  # of a text
    bytes: int
    queued_texts: int  # of all requests that aren't answered yet
    top_k: int = MAX_TOP_K  # hits per query


def take_role(keys: Sequence[str], values: Sequence[str]) -> tuple[str | None, Sequence[str], Sequence[str]]:
    """The role of a request's texts, which is the value of the key "role", and its other keys and values.

    Without that key the role is None. Raises RequestError.
    """
    if ROLE_KEY not in keys or len(keys) != len(values):  # check_texts reports the latter
        return None, keys, values
    place = list(keys).index(ROLE_KEY)
    role = values[place]
    if role not in ROLES:
        raise RequestError(BAD_REQUEST, f"role is none of {', '.join(ROLES)}: leave it out for texts that are neither")
    return role, [*keys[:place], *keys[place + 1 :]], [*values[:place], *values[place + 1 :]]


def order_texts(keys: Sequence[str], values: Sequence[str]) -> list[str]:
    """The texts of a request to Paddle Serving in the order of their keys "0", "1", ... Raises RequestError."""
    if len(keys) != len(values):
        raise RequestError(BAD_REQUEST, f"{len(keys)} keys and {len(values)} values: give each text a key")
    if not keys:
        raise RequestError(BAD_REQUEST, "no texts: send at least one, with the key 0")
    texts = dict(zip(keys, values, strict=True))
    try:
        return [texts[str(number)] for number in range(len(keys))]
    except KeyError:
        raise RequestError(BAD_REQUEST, f"wrong keys: {len(keys)} texts have the keys 0 to {len(keys) - 1}") from None


def check_texts(texts: Sequence[str], limits: Limits, param: str | None = None) -> None:
    """Raises RequestError for no or too many texts, and for one that is empty or too long.

    param: the field that they come from.
    """
    if not texts:
        raise RequestError(BAD_REQUEST, "no texts: send at least one", param)
    if len(texts) > limits.texts:
        raise RequestError(BAD_REQUEST, f"{len(texts)} texts: send at most {limits.texts} in a request", param)
    for number, text in enumerate(texts):
        if not has_visible_text(text):
            what = "holds only invisible characters" if text.strip() else "is empty"
            raise RequestError(BAD_REQUEST, f"text {number} {what}: leave it out", param)
        if len(text) > limits.characters:
            problem = f"text {number} has {len(text)} characters: send at most {limits.characters}"
            raise RequestError(BAD_REQUEST, problem, param)


def raise_open_files(connections: int) -> None:
    """Raises the limit on open files, within what the system allows, for so many connections on each of two ports.

    Logs a line if that isn't enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if (room := connection_limit(connections)) < connections:
        service_log(f"note: ulimit -n leaves room for {room} connections on each port; ulimit -n {needed} is enough")


def connection_limit(connections: int) -> int:
    """As many connections of one of two ports as the limit on open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return connections if soft == resource.RLIM_INFINITY else min(connections, max(1, (soft - OTHER_FILES) // 2))


class Admission:
    """Counts the requests and texts that aren't answered yet, and limits them."""

    def __init__(self, queued_texts: int) -> None:
        self._limit = queued_texts
        self._changed = threading.Condition()
        self.stopping = False
        self.requests = 0
        self.texts = 0

    @contextmanager
    def admitted(self, texts: int) -> Iterator[None]:
        """Counts a request while the block runs. Raises RequestError for too many texts, and after `stop`."""
        with self._changed:
            if self.stopping:
                raise RequestError(STOPPING, "the service is stopping: send the request to another")
            if self.texts + texts > self._limit:
                raise RequestError(OVERLOADED, f"{self.texts} texts are waiting already: try again later")
            self.requests += 1
            self.texts += texts
        try:
            yield
        finally:
            with self._changed:
                self.requests -= 1
                self.texts -= texts
                self._changed.notify_all()

    def stop(self, seconds: float) -> bool:
        """Rejects new requests and waits for the others; False if some are left after this many seconds."""
        with self._changed:
            self.stopping = True
            return self._changed.wait_for(lambda: self.requests == 0, seconds)
