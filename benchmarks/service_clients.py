"""A Pipeline service and a C++ server in processes of their own, and clients for them; for the benchmark and tests."""

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import clients as cpp_clients
from common.errors import InputError
from data import TextTokenizer
from serving import adapter
from serving.http_routes import PREDICTION_PATH

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"


class Service(NamedTuple):
    """A running Pipeline service."""

    process: subprocess.Popen[str]
    rpc_port: int
    http_port: int
    log: list[str]  # lines that it has written to stderr


def _log_until(stream: Iterable[str], start: str) -> list[str]:
    """The lines up to the first with this start. Raises InputError with all lines if there is none."""
    log = []
    for line in stream:
        log.append(line)
        if line.startswith(start):
            return log
    raise InputError("".join(log).removeprefix("error: ").strip())


@contextmanager
def running_service(model_dir: Path, *options: str) -> Iterator[Service]:
    """Starts web_service.py on free ports, and ends it with SIGTERM. Raises InputError if it doesn't start."""
    command = [sys.executable, ROOT / "deploy" / "python" / "web_service.py", "--model_dir", model_dir, *options]
    ports = ["--rpc_port", "0", "--http_port", "0"]
    process = subprocess.Popen([*map(str, command), *ports], stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        log = _log_until(process.stderr, "ready: ")
        reader = threading.Thread(target=lambda: log.extend(process.stderr))
        reader.start()
        rpc_address, http_address = log[-1].removeprefix("ready: gRPC on ").split(", HTTP on http://")
        yield Service(process, int(rpc_address.split(":")[1]), int(http_address.split("/")[0].split(":")[1]), log)
        process.terminate()
        process.wait(60)
        reader.join()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


# urllib and gRPC would send requests to this machine to a proxy that the environment names.
urlopen = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def read_metrics(service: Service) -> dict[str, float]:
    """The values at /metrics, by name and labels."""
    with urlopen(f"http://{HOST}:{service.http_port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


class ServiceError(Exception):
    """The service answered with an error."""

    def __init__(self, number: int, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.number, self.status = number, status


class Client(NamedTuple):
    """A client with an open connection, in three parts; a load generator repeats only `send`."""

    prepare: Callable[[Sequence[str]], bytes]  # a request for texts
    send: Callable[[bytes], Any]  # the raw answer to a request
    parse: Callable[[Any], Any]  # of an answer: vectors, float32 [N, D], or hits. Raises ServiceError for an error

    def __call__(self, texts: Sequence[str]) -> Any:
        """What the answer for texts holds."""
        return self.parse(self.send(self.prepare(texts)))


@contextmanager
def rpc_client(service: Service) -> Iterator[Client]:
    """Calls over its own gRPC connection."""

    def prepare(texts: Sequence[str]) -> bytes:
        return adapter.Request(key=map(str, range(len(texts))), value=texts).SerializeToString()

    def vectors(answer: bytes) -> np.ndarray:
        response = adapter.Response.FromString(answer)
        if response.err_no:
            raise ServiceError(response.err_no, response.err_msg)
        return np.array(json.loads(response.value[0]), dtype=np.float32)

    address = f"{HOST}:{service.rpc_port}"
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    with adapter.grpc.insecure_channel(address, options) as channel:
        yield Client(prepare, channel.unary_unary(f"/{adapter.METHOD}/inference"), vectors)


@contextmanager
def http_connection(port: int, path: str, content_type: str) -> Iterator[Callable[[bytes], tuple[int, bytes]]]:
    """Posts bodies over its own HTTP connection, which stays open; returns status and body of each answer."""
    connection = http.client.HTTPConnection(HOST, port)

    def send(body: bytes) -> tuple[int, bytes]:
        connection.request("POST", path, body, {"Content-Type": content_type})
        answer = connection.getresponse()
        return answer.status, answer.read()

    try:
        yield send
    finally:
        connection.close()


@contextmanager
def http_client(service: Service) -> Iterator[Client]:
    """Calls over HTTP."""

    def prepare(texts: Sequence[str]) -> bytes:
        return json.dumps({"key": list(map(str, range(len(texts)))), "value": list(texts)}).encode()

    def vectors(answer: tuple[int, bytes]) -> np.ndarray:
        status, body = answer
        response = json.loads(body)
        if response["err_no"]:
            raise ServiceError(response["err_no"], response["err_msg"], status)
        return np.array(json.loads(response["value"][0]), dtype=np.float32)

    with http_connection(service.http_port, PREDICTION_PATH, "application/json") as send:
        yield Client(prepare, send, vectors)


CLIENTS = {"rpc": rpc_client, "http": http_client}


@contextmanager
def search_client(service: Service) -> Iterator[Client]:
    """Searches over HTTP; an answer holds, for each text, a list of hits as `POST /search` returns them."""

    def prepare(texts: Sequence[str]) -> bytes:
        return json.dumps({"query": list(texts)}).encode()

    def hits(answer: tuple[int, bytes]) -> list[list[dict[str, Any]]]:
        status, body = answer
        content = json.loads(body)
        if status != http.client.OK:
            raise ServiceError(status, content["error"]["message"], status)
        return [result["hits"] for result in content["results"]]

    with http_connection(service.http_port, "/search", "application/json") as send:
        yield Client(prepare, send, hits)


# ---------------------------------------------------------------------------------------------------------------------
# The C++ server, whose clients tokenize


class CppService(NamedTuple):
    """A running C++ server, and the tokenizer of its model."""

    port: int
    tokenizer: TextTokenizer


@contextmanager
def running_cpp_service(program: Path, serving_server: Path, tokenizer: TextTokenizer) -> Iterator[CppService]:
    """Starts `program`, a build of deploy/C++, with Paddle Serving on a free port. Raises InputError if it can't."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-u", "-m", "paddle_serving_server.serve", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--model", str(serving_server.absolute()), "--thread", "64"],
        cwd=serving_server.parent,
        env={**os.environ, "SERVING_BIN": f"exec {program}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _log_until(process.stdout, "serving ")
        yield CppService(port, tokenizer)
    finally:
        process.terminate()
        process.communicate()  # ends with the server, after it has answered its requests


def cpp_request(tokenizer: TextTokenizer, texts: Sequence[str]) -> bytes:
    """A Request for the vectors of texts."""
    return cpp_clients.make_request(tokenizer(texts), as_bytes=True).SerializeToString()


def cpp_vectors(response: bytes) -> np.ndarray:
    """The vectors in the bytes of a Response."""
    (vectors,) = cpp_clients.outputs(cpp_clients.Response.FromString(response)).values()
    return vectors


@contextmanager
def cpp_rpc_client(service: CppService) -> Iterator[Client]:
    """Calls over its own baidu_std connection."""

    def prepare(texts: Sequence[str]) -> bytes:
        return cpp_clients.format_frame(cpp_request(service.tokenizer, texts))

    def vectors(answer: tuple[bytes, bytes]) -> np.ndarray:
        meta_bytes, payload = answer
        response = cpp_clients.RpcMeta.FromString(meta_bytes).response
        if response.error_code:
            raise ServiceError(response.error_code, response.error_text)
        return cpp_vectors(payload)

    with socket.create_connection((HOST, service.port)) as connection, connection.makefile("rb") as stream:

        def send(request: bytes) -> tuple[bytes, bytes]:
            connection.sendall(request)
            return cpp_clients.read_frame_bytes(stream)

        yield Client(prepare, send, vectors)


@contextmanager
def cpp_http_client(service: CppService) -> Iterator[Client]:
    """Calls over HTTP."""

    def vectors(answer: tuple[int, bytes]) -> np.ndarray:
        status, body = answer
        if status != http.client.OK:
            response = cpp_clients.Response.FromString(body)
            raise ServiceError(response.err_no, response.err_msg, status)
        return cpp_vectors(body)

    with http_connection(service.port, cpp_clients.HTTP_PATH, "application/proto") as send:
        yield Client(partial(cpp_request, service.tokenizer), send, vectors)


CPP_CLIENTS = {"cpp_rpc": cpp_rpc_client, "cpp_http": cpp_http_client}
