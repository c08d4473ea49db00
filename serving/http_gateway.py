"""The service over HTTP: `POST /ernie/prediction`, `GET /health` and `GET /metrics`."""

import asyncio
import json
import logging
import re
import socket
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from common.errors import InputError
from serving import installed_packages
from serving.adapter import SERVICE, PipelineService, Request, Response, error_response
from serving.limits import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    NO_SUCH_SERVICE,
    OK,
    OVERLOADED,
    STOPPING,
    RequestError,
    connection_limit,
    service_log,
)

with installed_packages():
    from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
    from tornado.http1connection import HTTP1ServerConnection
    from tornado.httpserver import HTTPServer
    from tornado.httputil import HTTPConnection, HTTPHeaders, HTTPMessageDelegate
    from tornado.iostream import IOStream
    from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

PREDICTION_PATH = f"/{SERVICE}/prediction"
METHODS = {PREDICTION_PATH: "POST", "/health": "GET, HEAD", "/metrics": "GET, HEAD"}
REQUEST_SECONDS = 30.0  # to receive a request's body, and for a client to read its answer
POLL_SECONDS = 0.02  # between checks of what can't be waited for
SENDING_SECONDS = 2.0  # that a stop waits for answers that are being sent
OTHER_CONNECTIONS = 384  # in addition to those with a request in progress: idle, asking for /health, or refused
BACKLOG = 128  # connections that the system opens before they are accepted
STATUSES = {
    OK: HTTPStatus.OK,
    BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    NO_SUCH_SERVICE: HTTPStatus.NOT_FOUND,
    OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    STOPPING: HTTPStatus.SERVICE_UNAVAILABLE,
    INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}
ERROR_NUMBERS = {  # else BAD_REQUEST
    HTTPStatus.NOT_FOUND: NO_SUCH_SERVICE,
    HTTPStatus.SERVICE_UNAVAILABLE: OVERLOADED,
    HTTPStatus.INTERNAL_SERVER_ERROR: INTERNAL_ERROR,
}
FIELDS = {"key", "value", "tensors", "name", "method", "logid", "clientip"}  # of a Request

BARE_REFUSAL = b"HTTP/1.1 400 Bad Request\r\n\r\n"  # Tornado's answer to a head or chunks that it doesn't accept
NOT_HTTP_MESSAGE = "the request isn't valid HTTP 1.1: it needs a Host, and one Content-Length or plain chunks"

# They log failed requests, whose paths and messages may contain texts.
logging.getLogger("tornado").setLevel(logging.CRITICAL + 1)
logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


def request_path(target: str) -> str:
    """The path in a request's target, without a query, a slash at its end and, as to a proxy, a scheme and a host."""
    return re.sub(r"^https?://[^/?]*", "", target, flags=re.IGNORECASE).partition("?")[0].rstrip("/")


def content_problem(headers: HTTPHeaders, body: bytes) -> str | None:
    """What is wrong with how the headers say that a body is encoded, if anything."""
    if not _is_gzip(headers) and headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
        return "Content-Encoding has to be gzip, or nothing"
    charset = re.search(r";\s*charset\s*=\s*\"?([^\s;\"]*)", headers.get("Content-Type", ""), re.IGNORECASE)
    if charset and charset[1].lower() not in ("", "utf-8", "utf8") and not body.isascii():
        return "Content-Type names a charset other than UTF-8: send UTF-8"
    return None


def _is_gzip(headers: HTTPHeaders) -> bool:
    return headers.get("Content-Encoding", "").strip().lower() in ("gzip", "x-gzip")


def decompress(body: bytes, limit: int) -> bytes:
    """A gzip body's content, or its first limit + 1 bytes. Raises RequestError if it is damaged."""
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: gzip alone
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error:
        raise RequestError(BAD_REQUEST, "the compressed body is damaged") from None
    if len(content) <= limit and (not stream.eof or stream.unused_data):
        raise RequestError(BAD_REQUEST, "the compressed body is damaged")
    return content


def parse_json_request(body: bytes) -> Request:
    """The Request in a JSON object such as {"key": ["0"], "value": ["text"]}. Raises RequestError."""
    if not body:
        raise RequestError(BAD_REQUEST, 'the body is empty: send JSON such as {"key": ["0"], "value": ["text"]}')
    try:
        content = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)  # a BOM is allowed
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
        raise RequestError(BAD_REQUEST, "tensors aren't accepted: send texts as values")
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
    content = {"err_no": response.err_no, "err_msg": response.err_msg}
    content |= {"key": list(response.key), "value": list(response.value), "tensors": []}
    return json.dumps(content, ensure_ascii=False).encode()


NOT_HTTP_BODY = response_json(error_response(BAD_REQUEST, NOT_HTTP_MESSAGE))
NOT_HTTP_FIELDS = f"Connection: close\r\nContent-Type: application/json\r\nContent-Length: {len(NOT_HTTP_BODY)}\r\n\r\n"


@stream_request_body
class _Handler(RequestHandler):
    """A request. It is answered after its whole body has arrived, since a client that sends doesn't read."""

    def initialize(self) -> None:
        self._gateway: HttpGateway = self.settings["gateway"]
        self._service = self._gateway.service
        self._body, self._is_whole = bytearray(), False
        self._path = request_path(self.request.uri or "")
        headers = self.request.headers
        if headers.get("Expect", "").lower() == "100-continue":
            headers["Expect"] = "100-continue"  # Tornado answers no other spelling, and the client would wait
        self._gateway.server.idle.pop(self.request.server_connection, None)

    def prepare(self) -> None:
        if self.request.method == "POST" and self._path == PREDICTION_PATH:
            self._gateway.take(self)

    async def data_received(self, chunk: bytes) -> None:
        await asyncio.sleep(0)  # otherwise a client that sends as fast as this reads would block the others
        if self in self._gateway.taken and len(self._body) <= self._service.limits.bytes:  # otherwise it is refused
            self._body += chunk

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if not self._is_whole:  # otherwise it is still being computed
            self._gateway.taken.discard(self)

    def get(self) -> None:
        if self._path == "/health":
            status = "stopping" if self._service.admission.stopping else "ok" if self._service.healthy else "no encoder"
            code = HTTPStatus.OK if status == "ok" else HTTPStatus.SERVICE_UNAVAILABLE
            self._send(code, json.dumps({"status": status}).encode())
        elif self._path == "/metrics":
            self._send(HTTPStatus.OK, self._service.metrics.text(), CONTENT_TYPE_PLAIN_0_0_4)
        else:
            self._refuse_path_or_method()

    head = get  # Tornado leaves out the body

    async def post(self) -> None:
        self._is_whole = True
        try:
            await self._answer()
        finally:
            self._gateway.taken.discard(self)

    async def _answer(self) -> None:
        headers, body, limit = self.request.headers, bytes(self._body), self._service.limits.bytes
        if self._path != PREDICTION_PATH:
            return self._refuse_path_or_method()
        if self not in self._gateway.taken:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at a time: try again later")
        if _is_gzip(headers) and len(body) <= limit:
            try:
                body = await self._gateway.decompress(body)
            except RequestError as error:
                return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        if len(body) > limit:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {limit} bytes")
        if problem := content_problem(headers, body):
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem)
        self._send(*await self._gateway.answer(body))

    def _send(self, status: HTTPStatus, body: bytes, content_type: str = "application/json") -> None:
        self.set_status(status)
        self.set_header("Content-Type", content_type)
        self.clear_header("Server")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.set_header("Retry-After", "1")
        connection, is_last = self.request.connection, self._service.admission.stopping
        if is_last:
            self.set_header("Connection", "close")
        unread = asyncio.get_running_loop().call_later(REQUEST_SECONDS, connection.close)

        def sent(_: object) -> None:
            unread.cancel()
            if is_last:
                connection.close()

        self.finish(body).add_done_callback(sent)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        number = ERROR_NUMBERS.get(status, BAD_REQUEST)
        self._service.metrics.answered("http", number, 0.0)
        self._send(status, response_json(error_response(number, message)))

    def _refuse_path_or_method(self) -> None:
        methods = METHODS.get(self._path)
        if methods:
            self.set_header("Allow", methods)
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, f"send {methods.replace(', ', ' or ')} to this path")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"try /health, /metrics, or POST {PREDICTION_PATH}")

    def write_error(self, status_code: int, **_: Any) -> None:
        """Answers what Tornado refuses; Tornado's own error pages are HTML."""
        status = HTTPStatus(status_code)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            if self.request.method not in self.SUPPORTED_METHODS:
                self.set_header("Connection", "close")  # Tornado does so without reading the body
            return self._refuse_path_or_method()
        self._refuse(status, status.description or status.phrase)

    def log_exception(self, kind: type[BaseException], error: BaseException, _: object) -> None:
        """Logs neither the message, which could contain texts, nor a client's errors."""
        if not isinstance(error, HTTPError):
            service_log(f"error: {kind.__name__} in answering over HTTP")

    def compute_etag(self) -> None:
        """Returns None, because no answer is requested twice."""


class _Stream(IOStream):
    """A connection on which Tornado's refusal of what isn't HTTP has a body, as other refusals have."""

    def write(self, data: bytes | memoryview) -> "asyncio.Future[None]":
        """Completes the refusal, after which Tornado closes the connection."""
        is_bare = data == BARE_REFUSAL
        return super().write(BARE_REFUSAL[:-2] + NOT_HTTP_FIELDS.encode() + NOT_HTTP_BODY if is_bare else data)


class _Server(HTTPServer):
    """Counts its connections, and knows the idle ones: those that haven't received the head of a request."""

    def initialize(self, application: Application, **options: Any) -> None:
        super().initialize(application, **options)
        self.open = 0
        self.idle: dict[HTTP1ServerConnection, None] = {}  # the longest idle first

    def handle_stream(self, stream: IOStream, address: tuple) -> None:
        self.open += 1
        super().handle_stream(stream, address)

    def start_request(self, server_conn: HTTP1ServerConnection, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        self.idle[server_conn] = None
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: HTTP1ServerConnection) -> None:
        self.open -= 1
        self.idle.pop(server_conn, None)
        super().on_close(server_conn)

    def close_idle(self) -> bool:
        """Closes the connection that has been idle longest; False if none is idle."""
        for connection in self.idle:
            if connection.stream.reading():  # otherwise the head has arrived and is about to be handled
                del self.idle[connection]
                connection.stream.close()
                return True
        return False


class HttpGateway:
    """Opens the HTTP port (0: any free one) and serves it in its own thread. Raises InputError.

    requests: concurrent requests for vectors; further ones are refused. If OTHER_CONNECTIONS more than that are open,
    or as many as the limit on open files allows, a new connection replaces an idle one. idle_timeout: seconds to
    receive the head of the next request.
    """

    def __init__(self, service: PipelineService, host: str, port: int, requests: int, idle_timeout: float) -> None:
        self.service = service
        self._idle_timeout = idle_timeout
        self.taken: set[_Handler] = set()  # requests for vectors, from their heads to their answers
        self._requests = requests
        self._connections = connection_limit(requests + OTHER_CONNECTIONS)
        self._pool = ThreadPoolExecutor(requests, "http")
        is_v6 = ":" in host
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_v6)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--http_port {port}: can't listen on {host}:{port} ({reason}); name another") from None
        self._listener.setblocking(False)
        self.server_port = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()

    async def _start(self) -> None:
        self.server = _Server(
            Application([(".*", _Handler)], gateway=self),
            idle_connection_timeout=self._idle_timeout,
            body_timeout=REQUEST_SECONDS,
            max_body_size=sys.maxsize,  # _Handler keeps at most the limit, and says what is too much
        )
        self._listen()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:  # otherwise it was stopped
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError:  # such as too many open files; the connection stays in the backlog
            self._loop.remove_reader(self._listener)
            self._loop.call_later(POLL_SECONDS, self._listen)
            return
        if self.server.open < self._connections or self.server.close_idle():
            self.server.handle_stream(_Stream(connection), address)
        else:
            connection.close()

    def take(self, handler: _Handler) -> None:
        """Counts a request for vectors as in progress, unless that would be too many."""
        if len(self.taken) < self._requests:
            self.taken.add(handler)

    async def decompress(self, body: bytes) -> bytes:
        """`decompress`, in a thread."""
        return await self._loop.run_in_executor(self._pool, decompress, body, self.service.limits.bytes)

    async def answer(self, body: bytes) -> tuple[HTTPStatus, bytes]:
        """Status and body of the answer to a request for vectors."""
        return await self._loop.run_in_executor(self._pool, self._answer, body)

    def _answer(self, body: bytes) -> tuple[HTTPStatus, bytes]:
        response = self.service.answer("http", lambda: parse_json_request(body))
        return STATUSES[response.err_no], response_json(response)

    def stop(self) -> None:
        """Accepts no more connections, and returns when the finished answers have been sent."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._pool.shutdown(wait=False)  # requests without an answer by now get none

    async def _stop(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        end = self._loop.time() + SENDING_SECONDS
        while len(self.server.idle) < self.server.open and self._loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)
        await self.server.close_all_connections()
