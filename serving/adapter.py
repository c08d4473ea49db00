"""Paddle Serving 0.9.0 (2022) on today's Python and Paddle: its protocol and its client, in front of our encoders.

Serving's own server isn't used, because:

- its LocalPredictor can't read the models of Paddle 3, and if loading fails it kills the whole process group, including
  the shell that started it (ours: encoder_process.py);
- its batches count requests instead of texts, can't join texts of different lengths, and make a single client wait as
  long as many (ours: batching.py);
- its gRPC port listens on all interfaces, lets two servers share a port, and has no limit on its queue (ours: below);
- its HTTP gateway is a Go library that listens on all interfaces and has neither limits nor /health (ours:
  http_gateway.py);
- it runs `np.load(allow_pickle=True)` on a request's tensors, which is code from the network.
"""

import collections
import collections.abc
import ipaddress
import logging
import os
import socket
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar
from urllib.request import proxy_bypass

import numpy as np

from common.errors import InputError
from common.texts import DOCUMENT, QUERY
from data import TextTokenizer
from encoding.token_statistics import count_unseen
from retrieval.corpus import parse_documents
from serving import installed_packages
from serving.api_keys import NO_KEY, ApiKeys
from serving.encoder_process import EncoderProcess
from serving.limits import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    NO_SUCH_SERVICE,
    OK,
    Admission,
    Limits,
    RequestError,
    check_texts,
    connection_limit,
    order_texts,
    service_log,
    take_role,
)

# Python 3.10 dropped this name; paddle_serving_client.httpclient imports it.
vars(collections)["Iterable"] = collections.abc.Iterable
# Its logger creates a folder PipelineServingLogs in the current one, changes the root logger, and writes dozens of
# lines per request, including the texts if one fails.
sys.modules["paddle_serving_server.pipeline.logger"] = types.ModuleType("paddle_serving_server.pipeline.logger")
logging.getLogger("paddle_serving_server").setLevel(logging.CRITICAL + 1)

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # otherwise gRPC prints on stderr what its exceptions say

with installed_packages():
    import grpc
    from google.protobuf.message import DecodeError
    from paddle_serving_server.pipeline import PipelineClient
    from paddle_serving_server.pipeline.proto.pipeline_service_pb2 import Request, Response
    from paddle_serving_server.pipeline.proto.pipeline_service_pb2_grpc import PipelineServiceStub

    from retrieval.live_index import Added
    from serving.batching import Batcher
    from serving.metrics import Metrics
    from serving.search import Hits, IndexState, ServedIndex
    from serving.search_batching import SearchBatcher

Answer = TypeVar("Answer")
SERVICE = "ernie"  # name of the service, the original's
NO_INDEX = "this service has no index: start web_service.py with --index_dir or --milvus_uri"
OUTPUT = "output_embedding"
METHOD = "baidu.paddle_serving.pipeline_serving.PipelineService"
OTHER_RPC_CONNECTIONS = 256  # in addition to those with a request in progress
MIN_PING_MS = 9_000  # between a client's pings: its least is 10 s in Go and Java; gRPC's 5 min end their connections
KEEPALIVE_MS = 60_000  # after which a silent client is asked whether it is still there; by default 2 hours
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order


class ServiceOptions(NamedTuple):
    """How a service forms batches, and its limits."""

    batch_size: int  # texts
    max_queue_delay: float  # seconds that a batch waits for expected requests
    rpc_threads: int  # concurrent requests over gRPC
    limits: Limits
    keys: ApiKeys | None = None  # what callers have to send; None: nothing


def vectors_json(vectors: np.ndarray) -> str:
    """A JSON list of lists; 9 digits reproduce every float32."""
    row = "[" + ",".join(["%.9g"] * vectors.shape[1]) + "]"
    return "[" + ",".join(row % tuple(vector) for vector in vectors.tolist()) + "]"


def error_response(number: int, message: str) -> Response:
    """An answer without vectors."""
    return Response(err_no=number, err_msg=message)


class PipelineService:
    """Answers requests for vectors and for documents, over gRPC and for the callers of its methods.

    tokenizer: the encoders' tokenizer, for prefixes and to count texts that the model doesn't see as a whole; None does
    neither. index: what `search` searches.
    """

    def __init__(
        self,
        encoders: Sequence[EncoderProcess],
        options: ServiceOptions,
        tokenizer: TextTokenizer | None = None,
        index: ServedIndex | None = None,
    ) -> None:
        self._options, self._encoders, self.limits, self.keys = options, encoders, options.limits, options.keys
        self._tokenizer, self.index = tokenizer, index
        self.admission = Admission(self.limits.queued_texts)
        self.metrics = Metrics(self.admission, index)
        self._batcher = Batcher(encoders, options.batch_size, options.max_queue_delay, self.admission, self.metrics)
        self._searches = None if index is None else SearchBatcher(index, self.metrics)
        self._rpc_server: grpc.Server | None = None

    @property
    def status(self) -> str:
        """The value "ok", or why requests fail: "stopping", "no encoder", or "no index" that can be searched."""
        if self.admission.stopping:
            return "stopping"
        if any(encoder.broken for encoder in self._encoders):
            return "no encoder"
        return "ok" if self.index is None or self.index.is_searchable else "no index"

    def counted(self, protocol: str, answer: Callable[[], Answer], refuse: Callable[[RequestError], Answer]) -> Answer:
        """What `answer` returns or, for any error in it, `refuse`; counts the request. protocol: "grpc" or "http"."""
        start, number = time.monotonic(), OK
        try:
            result = answer()
        except Exception as problem:
            if isinstance(problem, RequestError):
                error = problem
            else:
                service_log(f"error: {type(problem).__name__} in answering a request")  # its message could hold texts
                error = RequestError(INTERNAL_ERROR, "the service failed: try again")
            result, number = refuse(error), error.number
        self.metrics.answered(protocol, number, time.monotonic() - start)
        return result

    def answer(self, protocol: str, read: Callable[[], Request]) -> Response:
        """The answer to the request that `read` gives; protocol: see `counted`."""
        return self.counted(
            protocol, lambda: self.predict(read()), lambda error: error_response(error.number, str(error))
        )

    def predict(self, request: Request) -> Response:
        """The vectors of a request's texts. Raises RequestError."""
        if request.name not in ("", SERVICE):
            raise RequestError(NO_SUCH_SERVICE, f"no such service: this one is named {SERVICE}")
        if request.tensors:
            raise RequestError(BAD_REQUEST, "tensors aren't accepted: send texts as values")
        role, keys, values = take_role(request.key, request.value)
        vectors = self.embed(order_texts(keys, values), role)
        return Response(key=[OUTPUT], value=[vectors_json(vectors)])

    def embed(self, texts: Sequence[str], role: str | None, param: str | None = None) -> np.ndarray:
        """Vectors of texts, float32 [N, D]. role: see `TextTokenizer.prefixed`. Raises RequestError.

        param: the request's field with the texts.
        """
        check_texts(texts, self.limits, param)
        with self.admission.admitted(len(texts)):
            return self._embed(texts, role)

    def search(self, queries: Sequence[str], top_k: int, mode: str | None = None, param: str | None = None) -> Hits:
        """The best documents of each query. Raises RequestError, also without an index.

        mode: see `ServedIndex.search`; param: see `embed`.
        """
        searches = self._searcher()
        check_texts(queries, self.limits, param)
        with self.admission.admitted(len(queries)):
            return searches.search(self._embed(queries, QUERY), top_k, queries, mode)

    def add(self, texts: Sequence[str]) -> tuple[IndexState, Added]:
        """Adds documents to the index, see `ServedIndex.add`. Raises RequestError, also without an index."""
        index = self._writable_index()
        check_texts(texts, self.limits, "documents")
        try:
            documents = parse_documents(texts)
        except InputError as error:
            raise RequestError(BAD_REQUEST, f"{error}: send it as one line", "documents") from None
        with self.admission.admitted(len(documents)):
            return index.add(documents, self._embed(documents, DOCUMENT))

    def delete(self, ids: Sequence[int], documents: Sequence[str]) -> tuple[IndexState, int]:
        """Deletes documents from the index, see `ServedIndex.delete`. Raises RequestError, also without an index."""
        index = self._writable_index()
        if documents or not ids:
            check_texts(documents, self.limits, "documents")
        if len(ids) > self.limits.texts:
            raise RequestError(BAD_REQUEST, f"{len(ids)} ids: send at most {self.limits.texts} in a request", "ids")
        with self.admission.admitted(1):
            return index.delete(ids, documents)

    def check_index(self) -> ServedIndex:
        """The index. Raises RequestError if there is none."""
        return self._searcher().index

    def _searcher(self) -> SearchBatcher:
        if self._searches is None:
            raise RequestError(NO_SUCH_SERVICE, NO_INDEX)
        return self._searches

    def _writable_index(self) -> ServedIndex:
        index = self.check_index()
        index.check_writable()  # before documents are encoded
        return index

    def count_tokens(self, texts: Sequence[str], role: str | None) -> int:
        """The tokens that the encoder sees of texts, with [CLS], [SEP] and the prefix of the role."""
        if self._tokenizer is None:
            return 0
        return sum(map(len, self._tokenizer.tokenize(self._tokenizer.prefixed(texts, role))))

    def _embed(self, texts: Sequence[str], role: str | None) -> np.ndarray:
        """Vectors of admitted texts."""
        vectors = self._batcher.encode(self._tokenizer.prefixed(texts, role) if self._tokenizer else texts)
        if self._tokenizer:
            self.metrics.unseen(*count_unseen(self._tokenizer, texts, role))
        return vectors

    def listen(self, host: str, port: int) -> int:
        """Opens the gRPC port (0: any free one) and returns its number. Raises InputError if it is in use."""
        self._rpc_server = grpc.server(
            ThreadPoolExecutor(self._options.rpc_threads, "rpc"),
            maximum_concurrent_rpcs=self._options.rpc_threads,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self.limits.bytes),
                (
                    "grpc.max_allowed_incoming_connections",
                    connection_limit(self._options.rpc_threads + OTHER_RPC_CONNECTIONS),
                ),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ],
        )
        # The bytes arrive unparsed, because gRPC rejects what isn't a Request without giving the reason.
        handler = grpc.unary_unary_rpc_method_handler(self._answer_rpc, response_serializer=Response.SerializeToString)
        methods = grpc.method_handlers_generic_handler(METHOD, {"inference": handler})
        self._rpc_server.add_generic_rpc_handlers([methods])
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._rpc_server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if not bound:
            raise InputError(f"--rpc_port {port}: can't listen on {address}; name another")
        self._rpc_server.start()
        return bound

    def _answer_rpc(self, data: bytes, context: grpc.ServicerContext) -> Response:
        if self.keys and not self.keys.accept(dict(context.invocation_metadata()).get("authorization")):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, NO_KEY)
        return self.answer("grpc", lambda: parse_request(data))

    def stop(self, seconds: float) -> bool:
        """Rejects new requests and waits for the others; False if some weren't answered within this many seconds."""
        finished = self.admission.stop(seconds)
        if self._rpc_server:
            self._rpc_server.stop(1.0).wait()  # only answers are left to send
        if finished:
            self._batcher.stop()
            if self._searches:
                self._searches.stop()
        if self.index:
            self.index.close()
        for encoder in self._encoders:
            encoder.close()
        return finished


def parse_request(data: bytes) -> Request:
    """Raises RequestError for bytes that aren't a Request."""
    try:
        return Request.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        raise RequestError(BAD_REQUEST, "not a Request of PipelineService: are the texts UTF-8?") from None


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "host:port", with brackets around IPv6 addresses. Raises InputError for anything else."""
    host, _, port = endpoint.rpartition(":")
    is_address = (host.startswith("[") and host.endswith("]")) or ":" not in host
    if not host or "/" in host or not is_address or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--endpoint {endpoint}: isn't host:port, such as 127.0.0.1:8080 or [::1]:8080")
    return host.strip("[]"), int(port)


def is_this_machine(host: str) -> bool:
    """Whether all addresses of a host are loopback addresses, or the unspecified one, which connects to them."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ip.is_loopback or ip.is_unspecified for ip in map(ipaddress.ip_address, addresses))


class _Client(PipelineClient):
    """PipelineClient, whose own `connect` sends 127.0.0.1 to a proxy and takes IPv4 addresses alone."""

    def connect(self, endpoint: str) -> None:
        """Opens a channel to host:port."""
        host, _ = split_endpoint(endpoint)
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_http_proxy", int(not is_this_machine(host))),
        ]
        self._channel = grpc.insecure_channel(endpoint, options)
        self._stub = PipelineServiceStub(self._channel)


def remedy_without_answer(host: str) -> str:
    """What to do if the service on a host doesn't answer."""
    proxy = next((name for name in PROXY_VARIABLES if os.environ.get(name)), None)
    if proxy and not is_this_machine(host) and not proxy_bypass(host):
        return f"{proxy} is set: if the service can be reached without that proxy, add {host} to no_proxy"
    return "start deploy/python/web_service.py, or name another with --endpoint"


def embed_remotely(endpoint: str, feed: Mapping[str, str]) -> Response:
    """The answer of the service at "host:port" to texts by their keys. Raises InputError if there is none."""
    client = _Client()
    client.connect(endpoint)
    try:
        # With `clientip` it doesn't look up this machine's name, which fails if DNS doesn't know it.
        return client.predict(feed_dict={**feed, "clientip": "127.0.0.1"})
    except grpc.RpcError as error:
        details = error.details()
        if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "Concurrent RPC limit" in details:
            remedy = "the service is busy: try again later"  # others are about a message's size
        elif error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
            remedy = "send fewer texts at a time"
        elif error.code() == grpc.StatusCode.UNAUTHENTICATED:
            remedy = "this client sends none; call the service over HTTP"
        else:
            remedy = remedy_without_answer(split_endpoint(endpoint)[0])
        raise InputError(f"--endpoint {endpoint}: {error.code().name}, {details}; {remedy}") from None
