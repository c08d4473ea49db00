"""What the tests of the C++ server share: starting and stopping it, and requests."""

import gzip
import http.client
import socket
import subprocess
import threading
from typing import Any, NamedTuple

import numpy as np

import clients
from clients import make_request, read_frame
from data import TokenIds
from helpers import ROOT

CPP = ROOT / "deploy" / "C++"
HOST = "127.0.0.1"
TOLERANCE = 1e-5
TEXTS = ["水", "水稻的产量", "Deep Learning 2.0!", "论水稻产量研究水稻,产量" * 20]


TOKENS = (np.array([[1, 5, 6, 2], [1, 7, 2, 0]]), np.zeros((2, 4), np.int64))
GOOD = make_request(TOKENS).SerializeToString()


class Server(NamedTuple):
    """A running C++ server."""

    process: subprocess.Popen[str]
    port: int
    log: list[str]  # lines that it has written
    reader: threading.Thread  # of the log; it ends with the server

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return listener.getsockname()[1]


def start(command: list[Any], port: int, **options: Any) -> Server:
    """Starts a server and waits until it is ready."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    log = []
    for line in process.stdout:
        log.append(line)
        if line.startswith("serving "):
            reader = threading.Thread(target=lambda: log.extend(process.stdout), daemon=True)
            reader.start()
            return Server(process, port, log, reader)
    process.wait()
    raise AssertionError("".join(log))


def stop(server: Server) -> None:
    """Ends a server with SIGTERM; AddressSanitizer must have found nothing."""
    server.process.terminate()
    assert server.process.wait(60) == 0
    server.reader.join(60)
    assert not server.reader.is_alive() and "Sanitizer" not in "".join(server.log)


def post(server: Server, body: bytes, headers: dict[str, str], path: str = clients.HTTP_PATH) -> tuple[int, bytes]:
    """Status and body, decompressed."""
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.headers["Content-Type"] == headers.get("Content-Type", "application/proto")
        compressed = answer.headers["Content-Encoding"] == "gzip"
        return answer.status, gzip.decompress(content) if compressed else content
    finally:
        connection.close()


def call(server: Server, frame: bytes) -> tuple[Any, bytes]:
    """The answer over baidu_std to some bytes."""
    with socket.create_connection(server.address, 60) as connection:
        connection.sendall(frame)
        with connection.makefile("rb") as stream:
            return read_frame(stream)


def many_texts(count: int) -> TokenIds:
    """Token ids of texts of 40 tokens."""
    ids = np.random.default_rng(0).integers(1, 60, (count, 40))
    return ids, np.zeros_like(ids)
