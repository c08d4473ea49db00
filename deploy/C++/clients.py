"""What rpc_client.py and http_client.py share: options, messages, and the two protocols."""

import argparse
import http.client
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, number_in_range, text_argument
from common.errors import InputError
from common.options import add_role_arg
from data import SAMPLE_TEXTS, TokenIds
from encoding.exported_files import exported_tokenizer
from encoding.token_statistics import report_tokens
from serving.protos import Request, Response, RpcMeta

INT64 = 0  # elem_type
HTTP_PATH = "/GeneralModelService/inference"
SERVICE = "baidu.paddle_serving.predictor.general_model.GeneralModelService"
FRAME_HEADER = struct.Struct(">4sII")  # magic, size of meta data and payload, size of meta data


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of both clients."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--texts", nargs="+", type=text_argument, default=SAMPLE_TEXTS, help="texts to encode")
    parser.add_argument("--endpoint", type=endpoint, default="127.0.0.1:9393", help="host:port of the server")
    parser.add_argument("--model_dir", default="serving_server", help="folder with the model's vocabulary")
    add_role_arg(parser)
    parser.add_argument("--max_seq_length", type=number_in_range(3), help="tokens per text (default: the model's)")
    seconds = number_in_range(0.001, float)
    parser.add_argument("--timeout", type=seconds, default=20.0, help="seconds to wait for the server")
    return parser


def endpoint(text: str) -> tuple[str, int]:
    """An argparse type: host:port."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text} isn't host:port")
    return host.strip("[]"), int(port)


def tokenize(texts: Sequence[str], model_dir: str, max_seq_length: int | None, role: str | None) -> TokenIds:
    """The texts as int64 [B, max_seq_length], padded to the full length as the document's clients do.

    max_seq_length: by default the model's; role: see `TextTokenizer.prefixed`. Raises InputError if the
    folder isn't a model's.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise InputError(f"--model_dir {folder}: no such folder; give the one that the server serves")
    tokenizer = exported_tokenizer(folder, max_seq_length)
    tokenizer.pad_to_max_seq_len = True
    report_tokens(tokenizer, {"texts": texts}, role)
    return tokenizer(tokenizer.prefixed(texts, role))


def make_request(tokens: TokenIds, log_id: int = 0, *, as_bytes: bool = False) -> Any:
    """A Request for the vectors of int64 [B, L] token ids.

    as_bytes: send the ids, and get the vectors, as the tensors' bytes. Lists of numbers, the original's form, take the
    pinned version of protobuf, which is pure Python, ten times as long.
    """
    request = Request(log_id=log_id)
    for name, array in zip(("input_ids", "token_type_ids"), tokens, strict=True):
        elements = {"tensor_content": array.tobytes()} if as_bytes else {"int64_data": array.ravel().tolist()}
        request.tensor.add(name=name, alias_name=name, elem_type=INT64, shape=array.shape, **elements)
    return request


def outputs(response: Any) -> dict[str, np.ndarray]:
    """The vectors in a Response by name, float32 [B, D]."""
    tensors = [tensor for output in response.outputs for tensor in output.tensor]
    return {tensor.alias_name: _elements(tensor).reshape(tensor.shape) for tensor in tensors}


def _elements(tensor: Any) -> np.ndarray:
    if tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, np.float32)
    return np.array(tensor.float_data, np.float32)


def http_inference(address: tuple[str, int], request: Any, timeout: float) -> Any:
    """Sends a Request over HTTP and gives the Response. Raises InputError if there is none."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request("POST", HTTP_PATH, request.SerializeToString(), {"Content-Type": "application/proto"})
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise no_answer(address, error) from None
    finally:
        connection.close()
    if answer.headers.get("Content-Type") != "application/proto":
        where = f"--endpoint {address[0]}:{address[1]}"
        raise InputError(f"{where}: isn't the C++ server ({answer.status} {answer.reason})")
    response = Response.FromString(body)
    if answer.status != http.client.OK:
        raise InputError(f"the server refused the request: {response.err_msg}")
    return response


def rpc_inference(address: tuple[str, int], request: Any, timeout: float) -> Any:
    """Sends a Request over baidu_std, brpc's protocol, and gives the Response. Raises InputError if there is none."""
    try:
        with socket.create_connection(address, timeout) as connection:
            connection.sendall(format_frame(request.SerializeToString()))
            with connection.makefile("rb") as stream:
                meta, payload = read_frame(stream)
    except (OSError, EOFError) as error:
        raise no_answer(address, error) from None
    if meta.response.error_code:
        raise InputError(f"the server refused the request: {meta.response.error_text}")
    return Response.FromString(payload)


def format_frame(payload: bytes, correlation_id: int = 1) -> bytes:
    """A request to GeneralModelService.inference as a frame of baidu_std (brpc's docs/en/baidu_std.md)."""
    meta = RpcMeta(request={"service_name": SERVICE, "method_name": "inference"}, correlation_id=correlation_id)
    meta_bytes = meta.SerializeToString()
    return FRAME_HEADER.pack(b"PRPC", len(meta_bytes) + len(payload), len(meta_bytes)) + meta_bytes + payload


def read_frame(stream: Any) -> tuple[Any, bytes]:
    """The RpcMeta and the payload of the next frame. Raises EOFError if the stream ends or holds something else."""
    meta_bytes, payload = read_frame_bytes(stream)
    return RpcMeta.FromString(meta_bytes), payload


def read_frame_bytes(stream: Any) -> tuple[bytes, bytes]:
    """The next frame with its RpcMeta unparsed."""
    header = stream.read(FRAME_HEADER.size)
    if len(header) < FRAME_HEADER.size or not header.startswith(b"PRPC"):
        raise EOFError("the server closed the connection" if not header else "the answer isn't baidu_std")
    _, size, meta_size = FRAME_HEADER.unpack(header)
    body = stream.read(size)
    if len(body) < size:
        raise EOFError("the server closed the connection")
    return body[:meta_size], body[meta_size:]


def no_answer(address: tuple[str, int], error: Exception) -> InputError:
    """The error for a server that doesn't answer."""
    remedy = "start the server with sh deploy/C++/start_server.sh"
    return InputError(f"--endpoint {address[0]}:{address[1]}: no answer ({error}); {remedy}")
