"""The HTTP port: receives requests within limits, and sends what `http_routes` answers."""

import asyncio
import logging
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from common.errors import InputError
from serving import installed_packages
from serving.adapter import PipelineService, error_response
from serving.api_keys import CHALLENGES, NO_KEY
from serving.http_messages import (
    JSON_TYPE,
    STATUSES,
    HttpAnswer,
    HttpRequest,
    content_problem,
    decompress,
    is_gzip,
    split_target,
)
from serving.http_routes import PREDICTION_PATH, Respond, Route, Routes, response_json, serving_error
from serving.limits import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    NO_SUCH_SERVICE,
    OVERLOADED,
    RequestError,
    connection_limit,
    service_log,
)

with installed_packages():
    from tornado.http1connection import HTTP1ServerConnection
    from tornado.httpserver import HTTPServer
    from tornado.httputil import HTTPConnection, HTTPMessageDelegate
    from tornado.iostream import IOStream
    from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

Result = TypeVar("Result")
REQUEST_SECONDS = 30.0  # to receive a request's body, and for a client to read its answer
POLL_SECONDS = 0.02  # between checks of what can't be waited for
SENDING_SECONDS = 2.0  # that a stop waits for answers that are being sent
OTHER_CONNECTIONS = 384  # in addition to those with a request in progress: idle, asking for /health, or refused
BACKLOG = 128  # connections that the system opens before they are accepted
PREFLIGHT_SECONDS = 600  # for which a browser remembers what CORS allows
ERROR_NUMBERS = {  # else BAD_REQUEST
    HTTPStatus.NOT_FOUND: NO_SUCH_SERVICE,
    HTTPStatus.SERVICE_UNAVAILABLE: OVERLOADED,
    HTTPStatus.INTERNAL_SERVER_ERROR: INTERNAL_ERROR,
}

BARE_REFUSAL = b"HTTP/1.1 400 Bad Request\r\n\r\n"  # Tornado's answer to a head or chunks that it doesn't accept
NOT_HTTP_MESSAGE = "the request isn't valid HTTP 1.1: it needs a Host, and one Content-Length or plain chunks"

# They log failed requests, whose paths and messages may contain texts.
logging.getLogger("tornado").setLevel(logging.CRITICAL + 1)
logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)

NOT_HTTP_BODY = response_json(error_response(BAD_REQUEST, NOT_HTTP_MESSAGE))
NOT_HTTP_FIELDS = f"Connection: close\r\nContent-Type: {JSON_TYPE}\r\nContent-Length: {len(NOT_HTTP_BODY)}\r\n\r\n"


@stream_request_body
class _Handler(RequestHandler):
    """A request. It is answered after its whole body has arrived, since a client that sends doesn't read."""

    def initialize(self) -> None:
        self._gateway: HttpGateway = self.settings["gateway"]
        self._service = self._gateway.service
        self._body, self._is_whole = bytearray(), False
        path, self._query = split_target(self.request.uri or "")
        self._route: Route | None = self._gateway.routes.get(path)
        headers = self.request.headers
        if headers.get("Expect", "").lower() == "100-continue":
            headers["Expect"] = "100-continue"  # Tornado answers no other spelling, and the client would wait
        self._gateway.server.idle.pop(self.request.server_connection, None)

    def prepare(self) -> None:
        self._allow_origin()
        if self._route and self._route.waits and self._respond and self._has_key:
            self._gateway.take(self)

    @property
    def _respond(self) -> Respond | None:
        """What answers this method on this path, if it may be used."""
        method = "GET" if self.request.method == "HEAD" else self.request.method  # Tornado leaves out HEAD's body
        return self._route.methods.get(method or "") if self._route else None

    @property
    def _has_key(self) -> bool:
        """Whether the request has a valid key, or needs none."""
        keys = self._service.keys
        if keys is None or self._route is None or not self._route.needs_key:
            return True
        return keys.accept(self.request.headers.get("Authorization"))

    async def data_received(self, chunk: bytes) -> None:
        await asyncio.sleep(0)  # otherwise a client that sends as fast as this reads would block the others
        if self in self._gateway.taken and len(self._body) <= self._service.limits.bytes:  # otherwise it is refused
            self._body += chunk

    def on_connection_close(self) -> None:
        super().on_connection_close()
        if not self._is_whole:  # otherwise it is still being computed
            self._gateway.taken.discard(self)

    async def _handle(self) -> None:
        self._is_whole = True
        try:
            await self._answer()
        finally:
            self._gateway.taken.discard(self)

    get = head = post = put = patch = delete = options = _handle

    async def _answer(self) -> None:
        respond, body, limit = self._respond, bytes(self._body), self._service.limits.bytes
        if self._is_preflight:
            return self._send(HttpAnswer(b"", HTTPStatus.NO_CONTENT))
        if self._route is None or respond is None:
            return self._refuse_path_or_method()
        if not self._has_key:
            return self._refuse_key()
        if not self._route.waits:
            return self._send(respond(HttpRequest(self._query, body)))
        if self not in self._gateway.taken:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at a time: try again later")
        if is_gzip(self.request.headers) and len(body) <= limit:
            try:
                body = await self._gateway.in_thread(decompress, body, limit)
            except RequestError as error:
                return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        if len(body) > limit:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send at most {limit} bytes")
        if problem := content_problem(self.request.headers, body):
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem)
        request = HttpRequest(self._query, body)
        refuse = partial(refusal, self._route)
        self._send(await self._gateway.in_thread(self._service.counted, "http", partial(respond, request), refuse))

    def _send(self, answer: HttpAnswer) -> None:
        self.set_status(answer.status)
        for name, value in {"Content-Type": answer.content_type, **answer.headers}.items():
            self.set_header(name, value)
        self.clear_header("Server")
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.set_header("Retry-After", "1")
        connection, is_last = self.request.connection, self._service.admission.stopping
        if is_last:
            self.set_header("Connection", "close")
        unread = asyncio.get_running_loop().call_later(REQUEST_SECONDS, connection.close)

        def sent(_: object) -> None:
            unread.cancel()
            if is_last:
                connection.close()

        self.finish(answer.body or None).add_done_callback(sent)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        error = RequestError(ERROR_NUMBERS.get(status, BAD_REQUEST), message)
        self._service.metrics.answered("http", error.number, 0.0)
        errors = self._route.errors if self._route else serving_error
        self._send(HttpAnswer(errors(status, error), status))

    def _refuse_key(self) -> None:
        for challenge in CHALLENGES:
            self.add_header("WWW-Authenticate", challenge)
        self._refuse(HTTPStatus.UNAUTHORIZED, NO_KEY)

    def _refuse_path_or_method(self) -> None:
        if self._route:
            methods = self._route.allowed
            self.set_header("Allow", ", ".join(methods))
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, f"send {' or '.join(methods)} to this path")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"try /health, /metrics, /openapi.json, or POST {PREDICTION_PATH}")

    def _allow_origin(self) -> None:
        """Lets a page of the origin that CORS allows, if any, read the answer."""
        if not self._gateway.cors:
            return
        self.set_header("Vary", "Origin")
        if self._gateway.cors in ("*", self.request.headers.get("Origin")):
            self.set_header("Access-Control-Allow-Origin", self._gateway.cors)
            if self._is_preflight:
                self.set_header("Access-Control-Allow-Methods", ", ".join(self._route.allowed if self._route else ()))
                self.set_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
                self.set_header("Access-Control-Max-Age", str(PREFLIGHT_SECONDS))

    @property
    def _is_preflight(self) -> bool:
        """Whether a browser asks what CORS allows here, before it sends a request; it does so without a key."""
        asks = self.request.method == "OPTIONS" and "Access-Control-Request-Method" in self.request.headers
        return asks and bool(self._gateway.cors) and self._route is not None

    def write_error(self, status_code: int, **_: Any) -> None:
        """Answers what Tornado refuses; Tornado's own error pages are HTML."""
        status = HTTPStatus(status_code)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.set_header("Connection", "close")  # Tornado does so without reading the body
            return self._refuse_path_or_method()
        self._refuse(status, status.description or status.phrase)

    def log_exception(self, kind: type[BaseException], error: BaseException, _: object) -> None:
        """Logs neither the message, which could contain texts, nor a client's errors."""
        if not isinstance(error, HTTPError):
            service_log(f"error: {kind.__name__} in answering over HTTP")

    def compute_etag(self) -> None:
        """Returns None, because no answer is requested twice."""


def refusal(route: Route, error: RequestError) -> HttpAnswer:
    """The answer for an error of a route."""
    status = STATUSES[error.number]
    return HttpAnswer(route.errors(status, error), status)


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

    requests: concurrent requests that take time; further ones are refused. If OTHER_CONNECTIONS more than that are
    open, or as many as the limit on open files allows, a new connection replaces an idle one. idle_timeout: seconds to
    receive the head of the next request. cors: the origin whose pages may read the answers, "*" for all, "" for none.
    """

    def __init__(
        self, service: PipelineService, host: str, port: int, requests: int, idle_timeout: float, cors: str = ""
    ) -> None:
        self.service, self.cors = service, cors
        self.routes = Routes(service).by_path()
        self._idle_timeout = idle_timeout
        self.taken: set[_Handler] = set()  # requests that take time, from their heads to their answers
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
        """Counts a request as in progress, unless that would be too many."""
        if len(self.taken) < self._requests:
            self.taken.add(handler)

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Calls a function in a thread."""
        return await self._loop.run_in_executor(self._pool, function, *arguments)

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
