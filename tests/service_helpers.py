"""What the tests of the Pipeline service share: an encoder that they control, and requests to a service."""

import contextlib
import json
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ann_util import IndexOptions, build_index
from benchmarks.service_clients import HOST, Service, urlopen
from common.texts import QUERY
from helpers import small_tokenizer, write_pairs
from retrieval.corpus import Corpus
from retrieval.documents import Documents
from retrieval.lexical_index import LexicalIndex
from retrieval.saved_index import LocalDocumentIndex, save_index
from serving.adapter import PipelineService, Request, Response, ServiceOptions
from serving.api_keys import ApiKeys
from serving.encoder_process import EncoderStopped
from serving.http_gateway import HttpGateway
from serving.http_routes import PREDICTION_PATH
from serving.limits import Limits
from serving.search import SearchIndex

DOCUMENTS = [f"文{row}" for row in range(50)]  # of an index
MODEL = "a model's fingerprint"
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


def text_vectors(texts: Sequence[str]) -> np.ndarray:
    """A random unit vector for each text, float32 [N, 8], the same for equal texts."""
    vectors = np.stack([np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8) for text in texts])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class VectorEncoder(FakeEncoder):
    """Returns `text_vectors` at once."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        return text_vectors(texts)


def write_index(
    folder: Path, documents: Sequence[str], ann: str = "exact", model: str = MODEL, has_words: bool = False
) -> None:
    """Saves an index of the documents' `text_vectors`, in the place of the one that may be in the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Corpus(write_pairs(Path(temporary, "corpus.csv"), [(document,) for document in documents]))
        index = build_index(IndexOptions(ann), text_vectors(documents))
        lexical = LexicalIndex.build(documents, len(documents)) if has_words else None
        save_index(folder, LocalDocumentIndex(index, Documents(corpus), model, corpus.sha256, lexical=lexical))


@contextlib.contextmanager
def running_search_gateway(index: SearchIndex, keys: Sequence[str] = (), cors: str = "") -> Iterator[HttpGateway]:
    """A service over HTTP with an index, which puts a prefix before queries. keys: of which clients send one."""
    key_options = ApiKeys(keys) if keys else None
    options = ServiceOptions(4, max_queue_delay=0.0, rpc_threads=16, limits=LIMITS._replace(top_k=20), keys=key_options)
    tokenizer = small_tokenizer(24)
    tokenizer.prefixes = {QUERY: "问:"}
    service = PipelineService([VectorEncoder()], options, tokenizer, index)
    gateway = HttpGateway(service, HOST, 0, requests=8, idle_timeout=30.0, cors=cors)
    yield gateway
    assert service.stop(30)
    gateway.stop()


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


def post(
    service: Service, body: bytes, path: str = PREDICTION_PATH, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and content."""
    request = urllib.request.Request(f"http://{HOST}:{service.http_port}{path}", body, dict(headers or {}))
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
