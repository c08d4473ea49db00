"""The service over HTTP: `POST /ernie/prediction`, `GET /health` and `GET /metrics`."""

import contextlib
import io
import json
import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from runtime import InputError
from serving import metrics
from serving.adapter import SERVICE, PipelineService, Request, Response, error_response
from serving.limits import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    NO_SUCH_SERVICE,
    OK,
    OVERLOADED,
    STOPPING,
    RequestError,
)

PREDICTION_PATH = f"/{SERVICE}/prediction"
REQUEST_SECONDS = 10.0  # in which a request must have come in whole, and in which a client must read its answer
IDLE_SECONDS = 60.0  # that a connection may stay open without a request
DISCARD_SECONDS = 2.0  # of a body that isn't read: closing at once would lose the answer on its way
POLL_SECONDS = 0.1  # in which a stop is noticed
SENDING_SECONDS = 2.0  # that a stop leaves for answers on their way
CLOSING_SECONDS = 1.0  # in which a connection that is closed for another must have ended
OTHER_CONNECTIONS = 384  # beside those whose request is answered: they are idle, or ask for /health, or are refused
STATUSES = {
    OK: HTTPStatus.OK,
    BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    NO_SUCH_SERVICE: HTTPStatus.NOT_FOUND,
    OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    STOPPING: HTTPStatus.SERVICE_UNAVAILABLE,
    INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}
FIELDS = {"key", "value", "tensors", "name", "method", "logid", "clientip"}  # of a Request
ERROR_NUMBERS = {HTTPStatus.NOT_FOUND: NO_SUCH_SERVICE, HTTPStatus.SERVICE_UNAVAILABLE: OVERLOADED}  # else BAD_REQUEST


def parse_json_request(body: bytes) -> Request:
    """The Request in a JSON object such as {"key": ["0"], "value": ["text"]}. Raises RequestError."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise RequestError(BAD_REQUEST, "the body isn't UTF-8") from None
    except RecursionError:
        raise RequestError(BAD_REQUEST, "the body's JSON is nested too deeply") from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(BAD_REQUEST, f"the body isn't JSON{where}") from None
    if not isinstance(content, dict):
        raise RequestError(BAD_REQUEST, 'the body isn\'t an object such as {"key": ["0"], "value": ["text"]}')
    if content.get("tensors"):
        raise RequestError(BAD_REQUEST, "tensors aren't taken: send texts as values")
    if not content.keys() <= FIELDS:
        raise RequestError(BAD_REQUEST, f"unknown fields: a request has {', '.join(sorted(FIELDS - {'tensors'}))}")
    keys, values = _strings(content, "key"), _strings(content, "value")
    name = content.get("name", "")
    logid = content.get("logid", 0)
    if not isinstance(name, str) or isinstance(logid, bool) or not isinstance(logid, int) or abs(logid) >= 2**63:
        raise RequestError(BAD_REQUEST, "name must be a string, and logid a number of 64 bits")
    try:
        return Request(key=keys, value=values, name=name, logid=logid)
    except ValueError:
        raise RequestError(BAD_REQUEST, "key, value or name holds half of a surrogate pair, which isn't text") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} isn't JSON")


def _strings(content: Mapping[str, Any], field: str) -> Sequence[str]:
    strings = content.get(field, [])
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise RequestError(BAD_REQUEST, f"{field} must be a list of strings")
    return strings


def response_json(response: Response) -> bytes:
    """As Serving's gateway writes it: err_no, err_msg, key, value, tensors."""
    content = {
        "err_no": response.err_no,
        "err_msg": response.err_msg,
        "key": list(response.key),
        "value": list(response.value),
        "tensors": [],
    }
    return json.dumps(content, ensure_ascii=False).encode()


def format_answer(
    status: HTTPStatus, body: bytes, content_type: str = "application/json", close: bool = False
) -> bytes:
    """An answer as it is sent; close: tell the client that the connection ends with it."""
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
    ]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        head.append("Retry-After: 1")
    if close:
        head.append("Connection: close")
    return "\r\n".join([*head, "", ""]).encode() + body


class _DeadlineSocket(io.RawIOBase):
    """Reads a socket until a point in time, however slowly the bytes come."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.until = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """A connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would hold back the end of an answer until the client acknowledges the rest
    server: "HttpGateway"

    def setup(self) -> None:
        super().setup()
        self._socket = _DeadlineSocket(self.connection)
        self.rfile = io.BufferedReader(self._socket)

    def handle_one_request(self) -> None:
        if not self._wait():
            self.close_connection = True
            return
        self._socket.until = time.monotonic() + REQUEST_SECONDS
        with self.server.handling():
            super().handle_one_request()

    def _wait(self) -> bool:
        """Whether a request has begun to come, before IDLE_SECONDS are over or the client hangs up."""
        self._socket.until = 0.0
        with contextlib.suppress(TimeoutError):
            return bool(self.rfile.peek(1))  # it came with the one before
        self.connection.settimeout(IDLE_SECONDS)
        with contextlib.suppress(TimeoutError), self.server.idle(self.connection):
            # Nothing is taken off it while it counts as idle: the gateway looks whether something is there.
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        return False

    def handle_expect_100(self) -> bool:
        # Refuses a large body before it is sent.
        return self._body_length() is not None and super().handle_expect_100()

    def do_GET(self) -> None:
        length = self._body_length()
        if length is None:
            return
        self._discard(length)  # else it would be the next request
        service = self.server.service
        if self.path == "/health":
            status = "stopping" if service.admission.stopping else "ok" if service.healthy else "no encoder"
            code = HTTPStatus.OK if status == "ok" else HTTPStatus.SERVICE_UNAVAILABLE
            self._send(code, json.dumps({"status": status}).encode())
        elif self.path == "/metrics":
            text = service.metrics.text(service.admission.requests, service.admission.texts)
            self._send(HTTPStatus.OK, text.encode(), metrics.CONTENT_TYPE)
        else:
            self._send_error(HTTPStatus.NOT_FOUND, f"try /health, /metrics, or POST {PREDICTION_PATH}")

    def do_POST(self) -> None:
        length = self._body_length()
        if length is None:
            return
        if self.path != PREDICTION_PATH:
            self._discard(length)
            self._send_error(HTTPStatus.NOT_FOUND, f"send requests to {PREDICTION_PATH}")
            return
        if not self.server.free_requests.acquire(blocking=False):
            self._discard(length)
            self._send_error(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at a time: try again later")
            return
        try:
            body = self.rfile.read(length)
            if len(body) < length:
                self.close_connection = True
                return
            response = self.server.service.answer("http", lambda: parse_json_request(body))
        except TimeoutError:
            self.close_connection = True
            self._send_error(HTTPStatus.REQUEST_TIMEOUT, f"the request took longer than {REQUEST_SECONDS:g} s to come")
            return
        finally:  # before the answer is sent: the client's next request may come at once, over another connection
            self.server.free_requests.release()
        self._send(STATUSES[response.err_no], response_json(response))

    def _body_length(self) -> int | None:
        """Bytes of the request's body; None where they aren't given or too many, and that was answered."""
        given = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if self.headers.defects or len(self.headers.get_all("Content-Length", [])) > 1:
            self.close_connection = True  # where the request ends isn't certain
            self._send_error(HTTPStatus.BAD_REQUEST, "send headers that are whole, and the body's length once")
            return None
        if not given.isascii() or not given.isdigit() or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._send_error(HTTPStatus.LENGTH_REQUIRED, "send the body's length as Content-Length")
            return None
        limit = self.server.service.limits.bytes
        if len(given) > 18 or int(given) > limit:
            self.close_connection = True
            self._send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {limit} bytes")
            self._discard(int(given[:18]))
            return None
        return int(given)

    def _discard(self, length: int) -> None:
        self._socket.until = time.monotonic() + DISCARD_SECONDS
        with contextlib.suppress(OSError):
            while length > 0 and (block := self.rfile.read1(min(length, 1 << 16))):
                length -= len(block)
        if length > 0:
            self.close_connection = True  # the rest of the body is no request

    def send_error(self, code: int, *_: object) -> None:
        """What http.server finds wrong; its own pages repeat what the client sent."""
        self.close_connection = True  # what comes next may be the rest of the bad request
        self._send_error(HTTPStatus(code), HTTPStatus(code).description or HTTPStatus(code).phrase)

    def _send_error(self, status: HTTPStatus, message: str) -> None:
        number = ERROR_NUMBERS.get(status, BAD_REQUEST)
        self.server.service.metrics.answered("http", number, 0.0)
        self._send(status, response_json(error_response(number, message)))

    def _send(self, status: HTTPStatus, body: bytes, content_type: str = "application/json") -> None:
        if self.server.service.admission.stopping:
            self.close_connection = True
        self.connection.settimeout(REQUEST_SECONDS)
        self.wfile.write(format_answer(status, body, content_type, self.close_connection))

    def log_message(self, *_: object) -> None:
        """Nothing: a path or a broken request line could hold texts."""


class HttpGateway(ThreadingHTTPServer):
    """Opens the HTTP port and serves it in threads of its own; port 0 takes any free one. Raises InputError.

    requests: for vectors, at a time; more are refused. Where OTHER_CONNECTIONS more than that are open, the next takes
    the place of the one that has been idle longest.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, service: PipelineService, host: str, port: int, requests: int) -> None:
        self.service = service
        self.free_requests = threading.BoundedSemaphore(requests)
        self._free_connections = threading.BoundedSemaphore(requests + OTHER_CONNECTIONS)
        self._idle: dict[socket.socket, None] = {}  # the longest idle first
        self._handled = 0
        self._changed = threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--http_port {port}: can't listen on {host}:{port} ({reason}); name another") from None
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_SECONDS,), name="http", daemon=True)
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(POLL_SECONDS)  # such as too many open files: it is tried again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        free = self._free_connections
        if free.acquire(blocking=False) or (self._close_idle() and free.acquire(timeout=CLOSING_SECONDS)):
            super().process_request(request, client_address)
            return
        response = error_response(OVERLOADED, "too many connections at a time: try again later")
        with contextlib.suppress(OSError):
            request.settimeout(0.1)
            request.sendall(format_answer(STATUSES[OVERLOADED], response_json(response), close=True))
        super().shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection that `process_request` took, whether or not its thread could be started."""
        super().shutdown_request(request)
        self._free_connections.release()

    def _close_idle(self) -> bool:
        """Ends the connection that has been idle longest; False if a request has come on every one."""
        with self._changed:
            for connection in self._idle:
                poll = select.poll()
                poll.register(connection, select.POLLIN)
                if not poll.poll(0):
                    del self._idle[connection]
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)  # its thread reads the end
                    return True
        return False

    @contextlib.contextmanager
    def idle(self, connection: socket.socket) -> Iterator[None]:
        """While no request comes on a connection."""
        with self._changed:
            self._idle[connection] = None
        try:
            yield
        finally:
            with self._changed:
                self._idle.pop(connection, None)

    def handle_error(self, *_: object) -> None:
        """Nothing: a client hung up."""

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """While a request is read and answered."""
        with self._changed:
            self._handled += 1
        try:
            yield
        finally:
            with self._changed:
                self._handled -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Takes no more connections, and ends when the answers that are there have been sent."""
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._changed:
            self._changed.wait_for(lambda: self._handled == 0, SENDING_SECONDS)
