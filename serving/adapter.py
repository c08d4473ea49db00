"""Paddle Serving 0.9.0 (2022) on today's Python and Paddle: every workaround is here, each with its reason.

What is Serving's own: the protocol, the requests' way through its graph of operators and channels, and its client. What
is ours, and why:

- The encoder: Serving's LocalPredictor finds no model that Paddle 3 wrote, and kills the whole process group, the shell
  that started it included, where one can't be loaded. See encoder_process.py.
- Batches (`EncoderOp`): Serving's batching counts requests instead of texts, can't join texts of different lengths,
  and makes a lone client wait as long as many.
- Opening the gRPC port (`PipelineService`): Serving listens on all interfaces, lets two servers share a port, and
  queues without bound.
- The HTTP port (http_gateway.py): Serving's gateway is a Go library that listens on all interfaces, knows no limits,
  and has no /health.
"""

import collections
import collections.abc
import logging
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from common.errors import InputError
from serving import installed_packages
from serving.encoder_process import EncoderProcess, EncoderStopped
from serving.limits import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    NO_SUCH_SERVICE,
    Admission,
    Limits,
    RequestError,
    check_texts,
    service_log,
)

# Python 3.10 dropped this name; paddle_serving_client.httpclient imports it.
vars(collections)["Iterable"] = collections.abc.Iterable
# Its logger makes a folder PipelineServingLogs in the current one, takes over the root logger, and writes dozens of
# lines a request, the texts among them where one fails.
sys.modules["paddle_serving_server.pipeline.logger"] = types.ModuleType("paddle_serving_server.pipeline.logger")
logging.getLogger("paddle_serving_server").setLevel(logging.CRITICAL + 1)

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC says on stderr once more what its exceptions say

with installed_packages():
    import grpc
    from google.protobuf.message import DecodeError
    from paddle_serving_server.pipeline import (
        Op,
        PipelineClient,
        RequestOp,
        ResponseOp,
        dag,
        error_catch,
        operator,
        pipeline_server,
    )
    from paddle_serving_server.pipeline.channel import ChannelData, ChannelTimeoutError
    from paddle_serving_server.pipeline.error_catch import CustomExceptionCode
    from paddle_serving_server.pipeline.pipeline_server import PipelineServicer, ServerYamlConfChecker
    from paddle_serving_server.pipeline.proto.pipeline_service_pb2 import Request, Response

    from serving.metrics import Metrics

SERVICE = "ernie"  # name of the service and of its operator, as in the original
OUTPUT = "output_embedding"
METHOD = "baidu.paddle_serving.pipeline_serving.PipelineService"
OTHER_RPC_CONNECTIONS = 256  # beside those whose request is answered
SHORTEST_WAIT = 1e-4  # seconds; Serving's channels take 0 for no limit


def _end(command: str, process_group: int) -> None:
    # Serving sends SIGKILL to the process group, to which the shell, a supervisor or a test run may belong.
    service_log("error: Paddle Serving could not set up its operators")
    os._exit(1)


for module in (operator, dag, pipeline_server):
    module.print = lambda *_: None  # what it prints tells the user nothing
operator.kill_stop_process_by_pid = error_catch.kill_stop_process_by_pid = _end


class ServiceOptions(NamedTuple):
    """How a service batches, and what it takes."""

    batch_size: int  # texts
    max_queue_delay: float  # seconds that a batch waits for requests that are expected
    rpc_threads: int  # requests over gRPC at a time
    limits: Limits


class CheckedRequest(NamedTuple):
    """What goes through Serving's graph in place of the protobuf Request: it has no tensors."""

    texts: list[str]
    logid: int


class TextsOp(RequestOp):
    """Unpacks a CheckedRequest.

    Serving's own runs `np.load(allow_pickle=True)` on a request's tensors, which is code from the network.
    """

    def unpack_request_package(self, request: CheckedRequest) -> tuple[dict[str, Any], int, None, str]:
        """The texts, the log id, and no error."""
        return {"texts": request.texts}, request.logid, None, ""


class VectorsOp(ResponseOp):
    """Packs vectors as JSON, in the form that the original's Python literal had."""

    def pack_response_package(self, channeldata: ChannelData) -> Response:
        """The answer with vectors, or with an error."""
        if channeldata.error_code != CustomExceptionCode.OK.value:
            # The only error that an operator of ours raises; Serving adds paths and names to its message.
            return error_response(INTERNAL_ERROR, "the encoder failed: try again")
        return Response(key=[OUTPUT], value=[vectors_json(channeldata.parse()[OUTPUT])])


class EncoderOp(Op):
    """Encodes the texts of several requests together."""

    def set_up(
        self, encoders: Sequence[EncoderProcess], options: ServiceOptions, admission: Admission, metrics: Metrics
    ) -> None:
        """What Serving's constructor has no room for."""
        self._encoders: SimpleQueue[EncoderProcess] = SimpleQueue()
        for encoder in encoders:
            self._encoders.put(encoder)
        self._workers, self._expected = len(encoders), 1
        self._service_options, self._admission, self._metrics = options, admission, metrics

    def _auto_batching_generator(
        self, input_channel: Any, op_name: str, batch_size: int, timeout: float | None, op_info_prefix: str
    ) -> Iterator[list[dict[str, ChannelData]]]:
        """Lists of requests with batch_size texts together, or as many as there are.

        A batch waits for as many requests as there were before the last answers left: clients that get their answers
        together send their next requests within moments. A lone client never waits.
        """
        while True:
            batch = [input_channel.front(op_name)]
            until = time.monotonic() + self._service_options.max_queue_delay
            while sum(map(_texts, batch)) < self._service_options.batch_size:
                wait = until - time.monotonic() if len(batch) < self._expected else 0.0
                try:
                    batch.append(input_channel.front(op_name, max(wait, SHORTEST_WAIT)))
                except ChannelTimeoutError:
                    break
            yield batch

    def _run_process(
        self, preped_data_dict: Mapping[int, Mapping[str, Any]], op_info_prefix: str, *_: object
    ) -> tuple[dict[int, dict[str, np.ndarray]], dict[int, ChannelData]]:
        """Vectors, or an error, by the number that Serving gave to a request."""
        counts = [len(data["texts"]) for data in preped_data_dict.values()]
        texts = [text for data in preped_data_dict.values() for text in data["texts"]]
        encoder = self._encoders.get()
        try:
            start = time.monotonic()
            vectors = encoder.encode(texts)
            self._metrics.encoded(len(texts), time.monotonic() - start)
            self._expected = self._admission.requests // self._workers
            parts = np.split(vectors, np.cumsum(counts)[:-1])
            return {number: {OUTPUT: part} for number, part in zip(preped_data_dict, parts, strict=True)}, {}
        except EncoderStopped as error:
            service_log(f"error: the encoder {error}")
        except Exception as error:  # it would end Serving's thread, and with it all answers
            service_log(f"error: {type(error).__name__} in encoding a batch")  # its message could hold texts
        finally:
            self._encoders.put(encoder)
        return {}, {
            number: ChannelData(error_code=INTERNAL_ERROR, error_info="", data_id=number) for number in preped_data_dict
        }


def _texts(data: Mapping[str, ChannelData]) -> int:
    (request,) = data.values()
    return len(request.dictdata["texts"])


def vectors_json(vectors: np.ndarray) -> str:
    """A JSON list of lists; 9 digits give back every float32."""
    row = "[" + ",".join(["%.9g"] * vectors.shape[1]) + "]"
    return "[" + ",".join(row % tuple(vector) for vector in vectors.tolist()) + "]"


def error_response(number: int, message: str) -> Response:
    """An answer without vectors."""
    return Response(err_no=number, err_msg=message)


class PipelineService(PipelineServicer):
    """Serving's graph with our operators, behind gRPC and whatever else calls `answer`."""

    def __init__(self, encoders: Sequence[EncoderProcess], options: ServiceOptions) -> None:
        self._options, self._encoders = options, encoders
        self.admission = Admission(options.limits.queued_texts)
        self.metrics = Metrics(self.admission)
        conf = ServerYamlConfChecker.load_server_yaml_conf(
            yml_dict={"op": {SERVICE: {"concurrency": len(encoders)}}, "dag": {"is_thread_op": True}}
        )
        encoder_op = EncoderOp(name=SERVICE, input_ops=[TextsOp()])
        encoder_op.set_up(encoders, options, self.admission, self.metrics)
        encoder_op.init_from_dict(conf["op"][SERVICE])
        super().__init__(SERVICE, VectorsOp(input_ops=[encoder_op]), conf)
        self._rpc_server: grpc.Server | None = None

    @property
    def healthy(self) -> bool:
        """Whether every encoder could be started when it was last tried."""
        return not any(encoder.broken for encoder in self._encoders)

    @property
    def limits(self) -> Limits:
        """Of requests."""
        return self._options.limits

    def answer(self, protocol: str, read: Callable[[], Request]) -> Response:
        """The answer to the request that `read` gives; protocol: "grpc" or "http". Any error becomes an answer."""
        start = time.monotonic()
        try:
            response = self._answer(read())
        except RequestError as error:
            response = error_response(error.number, str(error))
        except Exception as error:
            service_log(f"error: {type(error).__name__} in answering a request")  # its message could hold texts
            response = error_response(INTERNAL_ERROR, "the service failed: try again")
        self.metrics.answered(protocol, response.err_no, time.monotonic() - start)
        return response

    def _answer(self, request: Request) -> Response:
        if request.name not in ("", SERVICE):
            raise RequestError(NO_SUCH_SERVICE, f"no such service: this one is named {SERVICE}")
        if request.tensors:
            raise RequestError(BAD_REQUEST, "tensors aren't taken: send texts as values")
        texts = check_texts(request.key, request.value, self.limits)
        with self.admission.admitted(len(texts)):
            # PipelineServicer.inference: it looks at the service's name alone, and calls this.
            return self._dag_executor.call(CheckedRequest(texts, request.logid))

    def listen(self, host: str, port: int) -> int:
        """Opens the gRPC port, any free one for 0, and gives its number. Raises InputError if it is in use."""
        self._rpc_server = grpc.server(
            ThreadPoolExecutor(self._options.rpc_threads, "rpc"),
            maximum_concurrent_rpcs=self._options.rpc_threads,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self.limits.bytes),
                ("grpc.max_allowed_incoming_connections", self._options.rpc_threads + OTHER_RPC_CONNECTIONS),
            ],
        )
        # The bytes come here unparsed: gRPC answers what isn't a Request without saying why.
        handler = grpc.unary_unary_rpc_method_handler(
            lambda data, _: self.answer("grpc", lambda: parse_request(data)),
            response_serializer=Response.SerializeToString,
        )
        self._rpc_server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(METHOD, {"inference": handler})]
        )
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._rpc_server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if not bound:
            raise InputError(f"--rpc_port {port}: can't listen on {address}; name another")
        self._rpc_server.start()
        return bound

    def stop(self, seconds: float) -> bool:
        """Takes no more requests, and ends when the others are answered; False if they weren't in so many seconds."""
        finished = self.admission.stop(seconds)
        if self._rpc_server:
            self._rpc_server.stop(1.0).wait()  # what is left to do is sending
        if finished:
            self._dag_executor.stop()
        for encoder in self._encoders:
            encoder.close()
        return finished


def parse_request(data: bytes) -> Request:
    """Raises RequestError for bytes that aren't a Request."""
    try:
        return Request.FromString(data)
    except (DecodeError, UnicodeDecodeError):
        raise RequestError(BAD_REQUEST, "not a Request of PipelineService: are the texts UTF-8?") from None


def embed_remotely(endpoint: str, feed: Mapping[str, str]) -> Response:
    """The answer of a service to texts by their keys. Raises InputError where none comes from "address:port"."""
    client = PipelineClient()
    client.connect([endpoint])
    try:
        # With `clientip` it doesn't look up this machine's name, which fails where no DNS knows it.
        return client.predict(feed_dict={**feed, "clientip": "127.0.0.1"})
    except grpc.RpcError as error:
        details = error.details()
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            remedy = "start deploy/python/web_service.py, or name another with --endpoint"
        elif "Concurrent RPC limit" in details:  # of maximum_concurrent_rpcs; others are of a message's bytes
            remedy = "the service is busy: try again later"
        else:
            remedy = "send fewer texts at a time"
        raise InputError(f"--endpoint {endpoint}: {error.code().name}, {details}; {remedy}") from None
