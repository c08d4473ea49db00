"""What the tests of the Pipeline service share: an encoder that they control, and requests to a service."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.service_clients import HOST, Service, urlopen
from serving.adapter import PipelineService, Request, Response
from serving.encoder_process import EncoderStopped
from serving.http_gateway import HttpGateway
from serving.http_routes import PREDICTION_PATH
from serving.limits import Limits

SECRET = "机密文本" * 5  # a text that no log may hold
LIMITS = Limits(texts=4, characters=100, bytes=10_000, queued_texts=6)


class FakeEncoder:
    """Returns [number of the call, characters of the text] once `go` is set."""

    broken = False

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[list[str]] = []
        self.closed = False

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        assert self.go.wait(30)
        if "fail" in texts:
            raise EncoderStopped("ended")
        if "crash" in texts:
            raise ValueError(SECRET)
        return np.array([[len(self.batches), len(text)] for text in texts], dtype=np.float32)

    def close(self) -> None:
        self.closed = True


def ask(service: PipelineService, *texts: str) -> Response:
    return service.answer("grpc", lambda: Request(key=map(str, range(len(texts))), value=texts))


def until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def as_json(**content: Any) -> bytes:
    return json.dumps(content).encode()


def get(service: Service, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urlopen(f"http://{HOST}:{service.http_port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post(service: Service, body: bytes, path: str = PREDICTION_PATH) -> tuple[int, dict[str, Any]]:
    """Status and content."""
    request = urllib.request.Request(f"http://{HOST}:{service.http_port}{path}", body)
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def at(gateway: HttpGateway) -> Service:
    """A gateway in this process, for `get`, `post` and `read_metrics`."""
    return Service(None, 0, gateway.server_port, [])


def read_all(connection: socket.socket) -> bytes:
    """All bytes until the other end closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))
