"""The C++ server, built with AddressSanitizer: its vectors, its load, and what clients can do wrong.

A build of these sources takes a minute or more, so all tests share one.
"""

import collections
import contextlib
import gzip
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format

import clients
import export_model
import export_to_serving
from base_model import SemanticIndexBase
from clients import FRAME_HEADER, Request, Response, RpcMeta, format_frame, make_request, outputs, read_frame
from common.errors import InputError
from cpp_helpers import (
    CPP,
    GOOD,
    HOST,
    TEXTS,
    TOKENS,
    TOLERANCE,
    Server,
    call,
    free_port,
    many_texts,
    post,
    start,
    stop,
)
from data import TextTokenizer
from helpers import ROOT, all_pairs, cpp_environment, make_model_folder, run_script
from modeling.checkpoint import create_model, save_checkpoint

pytestmark = pytest.mark.cpp
TITLES = [title for _, title in all_pairs()]
BAD_REQUEST, NO_SERVICE, NO_METHOD, OVERLOADED = 1003, 1001, 1002, 2004
PROTO, JSON = {"Content-Type": "application/proto"}, {"Content-Type": "application/json"}
MAX_BODY = 16 << 20


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_the_clients_print_the_models_vectors(cpp_server: Server, serving_folder: Path, model: Any) -> None:
    """As the document shows them."""
    embed, tokenizer = model
    expected = embed(*tokenizer(TEXTS))
    options = [
        "--endpoint",
        f"{HOST}:{cpp_server.port}",
        "--model_dir",
        serving_folder / "serving_server",
        "--texts",
        *TEXTS,
    ]
    done = run_script(CPP / "rpc_client.py", *options)
    first, _, rest = done.stdout.partition("\n")
    assert re.fullmatch(r"time to cost :\d+\.\d+(e-\d+)? seconds", first), done.stderr
    printed = eval(rest, {"array": np.array, "float32": np.float32})
    np.testing.assert_allclose(printed["output_embedding"], expected, atol=TOLERANCE)

    done = run_script(CPP / "http_client.py", *options)
    shapes, _, rest = done.stdout.partition("outputs {")
    assert shapes == "(4, 24)\n(4, 24)\n", done.stderr
    assert rest.startswith("\n  tensor {\n    float_data: ")
    response = text_format.Parse("outputs {" + rest, Response())
    np.testing.assert_allclose(outputs(response)["output_embedding"], expected, atol=TOLERANCE)


def test_the_documented_commands(cpp_program: Path, serving_folder: Path, tmp_path: Path) -> None:
    """The server is started and called as in docs/cpp_server.md, on a free port and with the tests' build."""
    page = (ROOT / "docs" / "cpp_server.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)\n```", page, re.DOTALL)
    build, start_server, *questions = [block for block in blocks if "deploy/C++" in block]
    assert build == "sh deploy/C++/build.sh"
    assert questions == ["python deploy/C++/rpc_client.py", "python deploy/C++/http_client.py"]
    shutil.copytree(CPP, tmp_path / "deploy" / "C++", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(serving_folder / "serving_server", tmp_path / "serving_server")
    port = free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "a b").symlink_to(cpp_program.parent)
    program = tmp_path / "a b" / cpp_program.name
    variables = cpp_environment(PATH=path, PYTHONPATH="", PYTHONUNBUFFERED="1", SERVING_BIN=f"exec '{program}'")
    start_server = start_server.replace("$PWD/deploy/C++/build/serving", str(program))
    for command in (
        start_server.replace("python -m", "exec python -m").replace("--port 9393", f"--port {port}"),
        f"exec sh deploy/C++/start_server.sh --port {port}",
    ):
        server = start(["sh", "-euc", command], port, cwd=tmp_path, env=variables)
        for question in questions:
            script = ROOT / question.removeprefix("python ")
            done = run_script(script, "--endpoint", f"{HOST}:{port}", cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert re.search(r"\(2, 24\)\n\(2, 24\)\noutputs|'output_embedding': array", done.stdout)
        stop(server)


def test_paddle_servings_own_client(
    cpp_server: Server, serving_folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP, in both formats, compressed and not."""
    monkeypatch.setattr(collections, "Iterable", collections.abc.Iterable, raising=False)
    from paddle_serving_client.httpclient import HttpClient

    embed, tokenizer = model
    tokens = tokenizer(TEXTS * 10)
    client = HttpClient()
    client.load_client_config(str(serving_folder / "serving_client"))
    client.connect([f"{HOST}:{cpp_server.port}"])
    feed = dict(zip(("input_ids", "token_type_ids"), tokens, strict=True))
    for proto in (True, False):
        for compressed in (False, True):
            client.set_http_proto(proto)
            client.set_request_compress(compressed)
            client.set_response_compress(compressed)
            response = client.predict(feed=feed, fetch=["output_embedding"], batch=True, log_id=7)
            tensor = response.outputs[0].tensor[0] if proto else response["outputs"][0]["tensor"][0]
            values = tensor.float_data if proto else tensor["float_data"]
            vectors = np.array(values, dtype=np.float32).reshape(len(tokens[0]), -1)
            np.testing.assert_allclose(vectors, embed(*tokens), atol=TOLERANCE)


def as_int32(request: Any) -> None:
    """Changes a request to int32 token ids."""
    for tensor in request.tensor:
        tensor.int_data.extend(tensor.int64_data)
        tensor.elem_type = 2
        del tensor.int64_data[:]


def as_bytes(request: Any) -> None:
    """Changes a request to token ids as bytes."""
    for tensor in request.tensor:
        tensor.tensor_content = np.array(tensor.int64_data, dtype="<i8").tobytes()
        del tensor.int64_data[:]


@pytest.mark.parametrize("change", [lambda request: None, as_int32, as_bytes], ids=["int64", "int32", "bytes"])
def test_all_ways_to_send_a_request(cpp_server: Server, model: Any, change: Callable[[Any], None]) -> None:
    """Over both protocols, in all formats and compressions."""
    embed, tokenizer = model
    tokens = tokenizer(TEXTS)
    expected = embed(*tokens)
    request = make_request(tokens, log_id=2**63)
    change(request)
    proto, text = request.SerializeToString(), json_format.MessageToJson(request).encode()
    responses = []
    for body, headers, parse in (
        (proto, PROTO, Response.FromString),
        (text, JSON, lambda body: json_format.Parse(body, Response())),
    ):
        zipped = {**headers, "Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
        for sent in ((body, headers), (gzip.compress(body), zipped)):
            status, content = post(cpp_server, *sent)
            assert status == 200
            responses.append(parse(content))
    responses.append(Response.FromString(call(cpp_server, format_frame(proto))[1]))
    for response in responses:
        np.testing.assert_allclose(outputs(response)["output_embedding"], expected, atol=TOLERANCE)
        assert (response.log_id, response.err_no) == (2**63, 0)
        assert list(response.outputs[0].tensor[0].shape) == [len(TEXTS), 16]


def test_compressed_and_attached_frames(cpp_server: Server, model: Any) -> None:
    """Additions that brpc's clients may make; several requests of one connection are told apart by their ids."""
    embed, tokenizer = model
    numbers = {}
    with socket.create_connection(cpp_server.address, 60) as connection, connection.makefile("rb") as stream:
        for number, (text, compress) in enumerate(zip(TITLES[:40], [0, 2, 3, 0] * 10, strict=True), start=5):
            tokens = tokenizer([text])
            payload = make_request(tokens).SerializeToString()
            payload = {0: bytes, 2: gzip.compress, 3: zlib.compress}[compress](payload)
            meta = RpcMeta(correlation_id=number, compress_type=compress, attachment_size=3)
            meta.request.service_name, meta.request.method_name = clients.SERVICE, "inference"
            connection.sendall(frame_of(meta.SerializeToString(), payload + b"abc"))
            numbers[number] = embed(*tokens)
        for _ in range(len(numbers)):
            meta, payload = read_frame(stream)
            vectors = outputs(Response.FromString(payload))["output_embedding"]
            np.testing.assert_allclose(vectors, numbers.pop(meta.correlation_id), atol=TOLERANCE)
    assert numbers == {}


def frame_of(meta: bytes, payload: bytes) -> bytes:
    """A frame with any meta data."""
    return FRAME_HEADER.pack(b"PRPC", len(meta) + len(payload), len(meta)) + meta + payload


# ---------------------------------------------------------------------------------------------------------------------
# Bad requests


def with_tensor(**fields: Any) -> Callable[[], Any]:
    """A request whose first tensor has other fields."""

    def make() -> Any:
        request = make_request(TOKENS)
        for name, value in fields.items():
            request.tensor[0].ClearField(name)
            request.tensor[0].MergeFrom(type(request.tensor[0])(**{name: value}))
        return request

    return make


def with_tensors(*numbers: int) -> Callable[[], Any]:
    """A request with some of the two tensors."""
    request = make_request(TOKENS)
    return lambda: Request(tensor=[request.tensor[number] for number in numbers])


BAD_REQUESTS = {
    "an id beyond the vocabulary": (with_tensor(int64_data=[1, 5, 10**6, 2, 1, 7, 2, 0]), "input_ids holds 1000000"),
    "a negative id": (with_tensor(int64_data=[1, -1, 6, 2, 1, 7, 2, 0]), "input_ids holds -1"),
    "too few elements": (with_tensor(int64_data=[1, 5, 6, 2]), "input_ids has 4 elements.*says 8"),
    "no elements": (with_tensor(int64_data=[]), "input_ids has 0 elements"),
    "nothing but padding": (with_tensor(int64_data=[1, 5, 6, 2, 0, 0, 0, 0]), "text 1 is nothing but padding"),
    "a negative shape": (with_tensor(shape=[2, -4]), "shape of input_ids"),
    "an empty shape": (with_tensor(shape=[]), "shape of input_ids"),
    "a shape without texts": (with_tensor(shape=[0, 4]), "shape of input_ids"),
    "a shape that overflows": (with_tensor(shape=[2**31 - 1, 2**31 - 1]), "texts, where a request holds 1024"),
    "too many texts": (with_tensor(shape=[1025, 4]), "1025 texts, where a request holds 1024"),
    "too many tokens": (with_tensor(shape=[2, 41]), "41 tokens a text, where the model takes 40"),
    "shapes that differ": (with_tensor(shape=[1, 4], int64_data=[1, 5, 6, 2]), "shapes differ"),
    "floats": (with_tensor(elem_type=1), "elem_type of input_ids is 1"),
    "bytes and numbers": (with_tensor(tensor_content=b"12345678"), "tensor_content"),
    "half a number": (with_tensor(int64_data=[], tensor_content=b"1234567"), "tensor_content"),
    "one tensor": (with_tensors(0), "token_type_ids is missing"),
    "no tensors": (with_tensors(), "input_ids is missing"),
    "a tensor twice": (with_tensors(0, 0, 1), "input_ids is there twice"),
    "a tensor too many": (
        lambda: Request(tensor=[*make_request(TOKENS).tensor, {"name": "x"}]),
        "tensors that the model doesn't take",
    ),
    "many tensors": (lambda: Request(tensor=[{}] * 100), "too many tensors"),
    "many strings": (lambda: Request(fetch_var_names=[""] * 100), "too many strings"),
    "another output": (lambda: Request(fetch_var_names=["x"]), "it gives output_embedding"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(cpp_server: Server, cpp_answers: None, case: str) -> None:
    """Refused over both protocols and in both formats, with a reason."""
    make, reason = BAD_REQUESTS[case]
    request = make()
    bodies = [
        (request.SerializeToString(), PROTO, Response.FromString),
        (json_format.MessageToJson(request).encode(), JSON, lambda body: json_format.Parse(body, Response())),
    ]
    for body, headers, parse in bodies:
        status, content = post(cpp_server, body, headers)
        response = parse(content)
        assert status in (400, 413) and response.err_no == BAD_REQUEST and re.search(reason, response.err_msg)
    meta, payload = call(cpp_server, format_frame(bodies[0][0], correlation_id=9))
    assert meta.correlation_id == 9 and payload == b""
    assert meta.response.error_code == BAD_REQUEST and re.search(reason, meta.response.error_text)


BAD_BODIES = {
    "not a message": (b"\xff" * 100, PROTO, 400),
    "half a message": (GOOD[:-3], PROTO, 400),
    "an empty message": (b"", PROTO, 400),
    "unknown fields": (GOOD + b"\xfa\x01\x00" * 1000, PROTO, 400),
    "very many tensors": (b"\x0a\x00" * 10**6, PROTO, 400),
    "very many strings": (b"\x12\x00" * 10**6, PROTO, 400),
    "very many tensors in JSON": (b'{"tensor": [' + b"{}," * 10**6 + b"{}]}", JSON, 400),
    "groups": (b"\x0b" * 10**5, PROTO, 400),
    "nested lengths": (b"\x0a\xff\xff\xff\xff\x0f" * 100, PROTO, 400),
    "not JSON": (b"{", JSON, 400),
    "deep JSON": (b"[" * 10**5, JSON, 400),
    "deep objects": (b'{"tensor":' * 10**5, JSON, 400),
    "not an object": (b"7", JSON, 400),
    "wrong types": (b'{"tensor": [{"int64_data": ["x"]}]}', JSON, 400),
    "fractions": (b'{"tensor": [{"int64_data": [1.5]}]}', JSON, 400),
    "numbers that overflow": (b'{"tensor": [{"int64_data": [99999999999999999999]}]}', JSON, 400),
    "not UTF-8": (b'{"fetch_var_names": ["\xff\xfe"]}', JSON, 400),
    "unknown names": (b'{"texts": ["a"]}', JSON, 400),
    "not gzip": (GOOD, {**PROTO, "Content-Encoding": "gzip"}, 400),
    "half of a gzip": (gzip.compress(GOOD)[:-9], {**PROTO, "Content-Encoding": "gzip"}, 400),
    "more than a gzip": (gzip.compress(GOOD) + b"x", {**PROTO, "Content-Encoding": "gzip"}, 400),
    "a gzip that blows up": (gzip.compress(bytes(MAX_BODY * 4)), {**PROTO, "Content-Encoding": "gzip"}, 413),
    "another compression": (GOOD, {**PROTO, "Content-Encoding": "br"}, 415),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies(cpp_server: Server, cpp_answers: None, case: str) -> None:
    """Each is answered with an error in its own format."""
    body, headers, expected = BAD_BODIES[case]
    status, content = post(cpp_server, body, headers)
    assert status == expected
    response = json.loads(content) if headers["Content-Type"] == JSON["Content-Type"] else Response.FromString(content)
    assert (response["err_no"] if isinstance(response, dict) else response.err_no) == BAD_REQUEST


@pytest.mark.parametrize("start", [b'{"tensor":[{"shape":', b'{"tensor":[{"name":\'"\',"shape":'])
def test_deep_json_costs_nothing(cpp_server: Server, cpp_answers: None, start: bytes) -> None:
    """It doesn't reach protobuf's parser, which accepts strings in either kind of quotes."""
    status, content = post(cpp_server, start + b"[" * 10**6, JSON)
    assert status == 400 and "nested too deeply" in json.loads(content)["err_msg"]


@pytest.mark.parametrize("send", [clients.http_inference, clients.rpc_inference])
def test_large_requests_that_are_sent_whole(cpp_server: Server, cpp_answers: None, send: Callable[..., Any]) -> None:
    """Their clients get the reason for the refusal."""
    with pytest.raises(InputError, match="refused the request: the body has more than 16777216 bytes"):
        send(cpp_server.address, Request(fetch_var_names=["x" * MAX_BODY]), 60)


CHUNKED_HEAD = (
    b"POST /GeneralModelService/inference HTTP/1.1\r\nContent-Type: application/proto\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /GeneralModelService/inference HTTP/1.1\r\n\r\n", 405),
        (b"POST /GeneralModelService/inference HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", 415),
        (b"POST /GeneralModelService/inference HTTP/1.1\r\nContent-Type: application/proto\r\n\r\n", 411),
        (
            b"POST /GeneralModelService/inference HTTP/1.1\r\nContent-Type: application/proto\r\n"
            b"Content-Length: 16777217\r\n\r\n",
            413,
        ),
        (
            b"POST /GeneralModelService/inference HTTP/1.1\r\nContent-Type: application/proto\r\n"
            b"Content-Length: 18446744073709551615\r\n\r\n",
            413,
        ),
        (b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"\0\0\0\0\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 20000 + b"\r\n\r\n", 431),
        (b"POST /GeneralModelService/inference HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (CHUNKED_HEAD + b"x\r\n", 400),
        (CHUNKED_HEAD + b"1\r\nabcde\r\n", 400),
        (CHUNKED_HEAD + b"1;" + b"x" * 300_000 + b"\r\n", 400),
        (CHUNKED_HEAD + b"fffffffffffffffff\r\n", 400),
        (CHUNKED_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n") + b"0\r\n\r\n", 400),
        (CHUNKED_HEAD.replace(b"chunked", b"gzip, chunked") + b"0\r\n\r\n", 501),
    ],
)
def test_bad_http(cpp_server: Server, cpp_answers: None, request_bytes: bytes, status: int) -> None:
    """Answered with a status, after which the connection ends."""
    with socket.create_connection(cpp_server.address, 60) as connection:
        connection.sendall(request_bytes)
        answer = connection.makefile("rb").read()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_http_1_0_keeps_a_connection_where_it_asks_to(cpp_server: Server, model: Any) -> None:
    """As with `ab -k` and older proxies, which look for the header."""
    body = make_request(model[1](TEXTS)).SerializeToString()
    head = f"POST /GeneralModelService/inference HTTP/1.0\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in PROTO.items())
    with socket.create_connection(cpp_server.address, 60) as connection, connection.makefile("rb") as answers:
        for kept in (True, True, False):
            connection.sendall(f"{head}{'Connection: keep-alive' if kept else 'a: b'}\r\n\r\n".encode() + body)
            assert answers.readline() == b"HTTP/1.0 200 OK\r\n"
            headers = http.client.parse_headers(answers)
            assert headers["Connection"] == ("keep-alive" if kept else None)
            assert Response.FromString(answers.read(int(headers["Content-Length"]))).err_no == 0
        assert answers.read() == b""


GOOD_JSON = json_format.MessageToJson(make_request(TOKENS)).encode()
BOM, GZIP = b"\xef\xbb\xbf", {"Content-Encoding": "gzip"}
H2C = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQBAAAAAAIAAAAA"}
WAYS = {  # headers and body of a request, status, and words of an error's message
    "a BOM": (JSON, BOM + GOOD_JSON, 200, ""),
    "a BOM alone": (JSON, BOM, 400, "isn't a Request in JSON"),
    "UTF-16": (JSON, GOOD_JSON.decode().encode("utf-16"), 400, "isn't a Request in JSON: Encountered non UTF-8"),
    "capitals": ({"Content-Type": "Application/JSON; charset=UTF-8"}, GOOD_JSON, 200, ""),
    "spaces": ({"Content-Type": "application/json ;charset=utf-8"}, GOOD_JSON, 200, ""),
    "protobuf": ({"Content-Type": "application/protobuf"}, GOOD, 200, ""),
    "capital protobuf": ({"Content-Type": "Application/X-Protobuf"}, GOOD, 200, ""),
    "curl -d": ({"Content-Type": "application/x-www-form-urlencoded"}, GOOD_JSON, 415, "application/json"),
    "another JSON": ({"Content-Type": "application/jsonlines"}, GOOD_JSON, 415, "application/json"),
    "no type": ({}, GOOD_JSON, 415, "application/json"),
    "gzip with a BOM": ({**JSON, **GZIP}, gzip.compress(BOM + GOOD_JSON), 200, ""),
    "its old name": ({**JSON, "Content-Encoding": "X-GZIP"}, gzip.compress(GOOD_JSON), 200, ""),
    "deflate": ({**JSON, "Content-Encoding": "deflate"}, zlib.compress(GOOD_JSON), 415, "has to be gzip, or nothing"),
    "chunks": (JSON, [GOOD_JSON[:9], GOOD_JSON[9:]], 200, ""),
    "small chunks": (PROTO, [GOOD[place : place + 1] for place in range(len(GOOD))], 200, ""),
    "large chunks": (JSON, [GOOD_JSON, *[b" " * 500_000] * 20], 200, ""),
    "gzip in chunks": ({**PROTO, **GZIP}, [gzip.compress(GOOD)[:9], gzip.compress(GOOD)[9:]], 200, ""),
    "a gzip in chunks that blows up": ({**PROTO, **GZIP}, [gzip.compress(bytes(MAX_BODY * 4))], 413, "too large"),
    "chunks without an end": (JSON, [b" " * 500_000] * 40, 413, "more than 16777216 bytes"),
    "compressed chunks": ({**JSON, "Transfer-Encoding": "gzip, chunked"}, [b"a"], 501, "has to be chunked, or nothing"),
    "Java's HttpClient": ({**JSON, **H2C}, GOOD_JSON, 200, ""),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_clients_send(cpp_server: Server, cpp_answers: None, way: str) -> None:
    """Errors are in the format of the request, and readable if that isn't known."""
    headers, body, expected, words = WAYS[way]
    connection = http.client.HTTPConnection(*cpp_server.address, timeout=60)
    connection.request("POST", clients.HTTP_PATH, body, headers, encode_chunked=isinstance(body, list))
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_proto = "proto" in headers.get("Content-Type", "").lower()
    assert answer.headers["Content-Type"] == ("application/proto" if is_proto else "application/json")
    response = Response.FromString(content) if is_proto else json_format.Parse(content, Response())
    assert (answer.status, words in response.err_msg) == (expected, True), response.err_msg
    assert bool(response.outputs) == (expected == 200)


TARGETS = [  # method, target, status, and words of the body or of the header Allow
    ("POST", clients.HTTP_PATH + "?a=b", 200, "outputs"),
    ("POST", clients.HTTP_PATH + "/", 200, "outputs"),
    ("POST", f"http://server:80{clients.HTTP_PATH}", 200, "outputs"),
    ("POST", "/GeneralModelService", 404, clients.HTTP_PATH),
    ("POST", "http://server", 404, clients.HTTP_PATH),
    ("post", clients.HTTP_PATH, 405, "POST"),
    ("GET", clients.HTTP_PATH, 405, "POST"),
    ("OPTIONS", clients.HTTP_PATH, 405, "POST"),
    ("POST", "/health", 405, "GET, HEAD"),
    ("GET", "/health", 200, "ok"),
    ("GET", "http://server/health/?a", 200, "ok"),
    ("HEAD", "/health", 200, ""),
    ("HEAD", clients.HTTP_PATH, 405, "POST"),
    ("HEAD", "/", 404, ""),
]


@pytest.mark.parametrize(("method", "target", "status", "words"), TARGETS)
def test_where_clients_send_it(cpp_server: Server, method: str, target: str, status: int, words: str) -> None:
    connection = http.client.HTTPConnection(*cpp_server.address, timeout=60)
    for _ in range(2):  # the connection stays usable, or the answer says that it doesn't
        connection.request(method, target, GOOD_JSON if method.upper() == "POST" else None, JSON)
        answer = connection.getresponse()
        content = answer.read().decode()
        assert answer.status == status
        assert words in (answer.headers["Allow"] if status == 405 else content)
        assert int(answer.headers["Content-Length"]) > 0 and bool(content) == (method != "HEAD")
    connection.close()


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("gzip;q=0", False),
        ("br;q=1, gzip; q=0.0", False),
        ("identity", False),
    ],
)
def test_answers_are_compressed_for_clients_that_accept_it(
    cpp_server: Server, accepted: str, is_compressed: bool
) -> None:
    connection = http.client.HTTPConnection(*cpp_server.address, timeout=60)
    connection.request("POST", clients.HTTP_PATH, GOOD_JSON, {**JSON, "Accept-Encoding": accepted})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Encoding"] == "gzip") == (200, is_compressed)
    connection.close()


def test_clients_that_wait_before_they_send_a_body(cpp_server: Server) -> None:
    """As curl and .NET do with large ones, in chunks or not; "100-continue" ignores case."""
    for spelling in ("100-continue", "100-Continue"):
        with socket.create_connection(cpp_server.address, 60) as connection:
            connection.sendall(CHUNKED_HEAD.replace(b"\r\n\r\n", f"\r\nExpect: {spelling}\r\n\r\n".encode()))
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD))
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


META = RpcMeta(request={"service_name": clients.SERVICE, "method_name": "inference"}, correlation_id=3)
BAD_FRAMES = {
    "another service": (RpcMeta(request={"service_name": "x", "method_name": "inference"}), NO_SERVICE),
    "another method": (RpcMeta(request={"service_name": clients.SERVICE, "method_name": "debug"}), NO_METHOD),
    "no request": (RpcMeta(correlation_id=3), BAD_REQUEST),
    "snappy": (RpcMeta(request=META.request, compress_type=1), BAD_REQUEST),
    "not gzip": (RpcMeta(request=META.request, compress_type=2), BAD_REQUEST),
    "a large attachment": (RpcMeta(request=META.request, attachment_size=10**9), BAD_REQUEST),
    "a negative attachment": (RpcMeta(request=META.request, attachment_size=-1), BAD_REQUEST),
}


def test_bad_frames(cpp_server: Server, cpp_answers: None) -> None:
    """If the end of a bad frame is known, it is answered, and the next frames are read."""
    with socket.create_connection(cpp_server.address, 60) as connection, connection.makefile("rb") as stream:
        for case, (meta, number) in BAD_FRAMES.items():
            connection.sendall(frame_of(meta.SerializeToString(), GOOD))
            assert read_frame(stream)[0].response.error_code == number, case
        connection.sendall(frame_of(b"\xff\xff", GOOD))
        assert read_frame(stream)[0].response.error_code == BAD_REQUEST
        connection.sendall(format_frame(GOOD))
        assert outputs(Response.FromString(read_frame(stream)[1]))["output_embedding"].shape == (2, 16)


@pytest.mark.parametrize(
    "header",
    [
        FRAME_HEADER.pack(b"PRPC", 10, 11),
        FRAME_HEADER.pack(b"PRPC", 2**32 - 1, 2**32 - 1),
        FRAME_HEADER.pack(b"PRPC", 2**32 - 1, 10),
        FRAME_HEADER.pack(b"PRPC", MAX_BODY + 11, 10),
    ],
)
def test_bad_frame_headers(cpp_server: Server, cpp_answers: None, header: bytes) -> None:
    """They are answered too, after a good frame or as the first one; then the connection ends."""
    for before in (b"", format_frame(GOOD)):
        with socket.create_connection(cpp_server.address, 60) as connection, connection.makefile("rb") as stream:
            connection.sendall(before + header)
            codes = sorted(read_frame(stream)[0].response.error_code for _ in range(2 if before else 1))
            assert codes == ([0, BAD_REQUEST] if before else [BAD_REQUEST])
            assert stream.read() == b""


def test_random_changes_of_requests(cpp_server: Server, cpp_answers: None) -> None:
    """Bytes changed, removed and added anywhere lead to an answer or to the end of the connection."""
    generator = random.Random(0)
    head = (
        f"POST {clients.HTTP_PATH} HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    )
    for sent in [head.encode() + GOOD, format_frame(GOOD)] * 100:
        changed = bytearray(sent)
        for _ in range(generator.randrange(1, 5)):
            place = generator.randrange(len(changed))
            changed[place : place + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        with socket.create_connection(cpp_server.address, 60) as connection:
            connection.sendall(changed)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as stream:
                assert re.match(rb"$|HTTP/1.1 |PRPC", stream.read())


# ---------------------------------------------------------------------------------------------------------------------
# Load


def test_bad_requests_write_nothing_to_the_log(start_alone: Callable[..., Server]) -> None:
    """The server would block if nothing read the log."""
    server = start_alone()
    lines = len(server.log)
    meta = b"\x0a\x00"  # an RpcMeta whose request lacks what it must have
    frame = FRAME_HEADER.pack(b"PRPC", len(meta), len(meta)) + meta
    not_utf8 = Request(fetch_var_names=["x"]).SerializeToString().replace(b"x", b"\xff")
    assert call(server, frame)[0].response.error_code == BAD_REQUEST
    assert call(server, format_frame(not_utf8))[0].response.error_code == BAD_REQUEST
    assert post(server, ('{"a' + "水" * 300 + '": 1}').encode(), JSON)[0] == 400
    stop(server)
    assert server.log[lines:] == []


def test_the_start_of_a_request_does_not_hold_up_a_stop(start_alone: Callable[..., Server]) -> None:
    """Nor does one after a request that is still being computed."""
    server = start_alone()
    frame = format_frame(GOOD)
    head = f"POST {clients.HTTP_PATH} HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: 9\r\n\r\n".encode()
    starts = [b"PRPC\0", frame[:7], frame[:20], b"POST /Gen", head, head + b"x"]
    with contextlib.ExitStack() as opened:
        for start in starts:
            connection = opened.enter_context(socket.create_connection(server.address, 60))
            connection.sendall(start)
        busy = opened.enter_context(socket.create_connection(server.address, 60))
        busy.sendall(format_frame(make_request(many_texts(512)).SerializeToString()) + frame[:20])
        time.sleep(0.3)
        server.process.terminate()
        assert read_frame(busy.makefile("rb"))[0].response.error_code == 0
        assert server.process.wait(20) == 0  # it would be 1 for requests that were given up
    stop(server)


def test_slow_and_vanished_clients(cpp_server: Server, cpp_answers: None) -> None:
    """They don't delay other clients."""
    frame = format_frame(GOOD)
    starts = [b"", b"P", b"POST /Gen", frame[:7], frame[:20], b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc"]
    slow = [socket.create_connection(cpp_server.address, 60) for _ in range(20) for _ in starts]
    for connection, sent in zip(slow, starts * 20, strict=True):
        connection.sendall(sent)
    for _ in range(50):
        vanished = socket.create_connection(cpp_server.address, 60)
        vanished.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        vanished.sendall(frame)
        vanished.close()
    begin = time.monotonic()
    assert call(cpp_server, frame)[0].response.error_code == 0
    assert time.monotonic() - begin < 20  # the server waits 30 s for a slow message
    for connection in slow:
        connection.close()


def test_announced_large_requests_leave_room_for_small_ones(cpp_server: Server, cpp_answers: None) -> None:
    """The total size of requests that are being received is limited only for large ones."""
    head = f"POST {clients.HTTP_PATH} HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: {MAX_BODY}\r\n\r\n"
    announced = [socket.create_connection(cpp_server.address, 60) for _ in range(17)]
    for connection in announced:
        connection.sendall(head.encode())
    refused, _, _ = select.select(announced, [], [], 60)
    assert refused[0].recv(12) == b"HTTP/1.1 503"
    assert call(cpp_server, format_frame(GOOD))[0].response.error_code == 0
    for connection in announced:
        connection.close()


def test_chunks_share_the_room_for_large_requests(cpp_server: Server, cpp_answers: None) -> None:
    """They take what has come in so far, and leave room for small requests, also in chunks."""
    chunk = b"%x\r\n%b\r\n" % (MAX_BODY, bytes(MAX_BODY))
    with contextlib.ExitStack() as opened:
        sending = [opened.enter_context(socket.create_connection(cpp_server.address, 60)) for _ in range(17)]
        for connection in sending:
            with contextlib.suppress(ConnectionError):  # one that is refused
                connection.sendall(CHUNKED_HEAD + chunk)
        refused, _, _ = select.select(sending, [], [], 60)
        assert refused[0].recv(12) == b"HTTP/1.1 503"
        small = opened.enter_context(socket.create_connection(cpp_server.address, 60))
        small.sendall(CHUNKED_HEAD + b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD))
        assert small.recv(12) == b"HTTP/1.1 200"


def test_every_answer_under_load_is_the_right_one(cpp_server: Server, model: Any) -> None:
    """32 clients of both protocols, texts of all lengths, a tenth of the requests malformed."""
    embed, tokenizer = model
    expected = {title: embed(*tokenizer([title]))[0] for title in [*TITLES, *TEXTS]}

    def client(seed: int) -> int:
        generator = random.Random(seed)
        wrong = 0
        for _ in range(30):
            texts = generator.sample(sorted(expected), generator.randrange(1, 6))
            request = make_request(tokenizer(texts))
            send = clients.rpc_inference if generator.random() < 0.5 else clients.http_inference
            if generator.random() < 0.1:
                request.tensor[0].int64_data[0] = -1
                with pytest.raises(InputError, match="refused the request: input_ids holds -1"):
                    send(cpp_server.address, request, 120)
                continue
            vectors = outputs(send(cpp_server.address, request, 120))["output_embedding"]
            wrong += np.abs(vectors - [expected[text] for text in texts]).max() > TOLERANCE
        return wrong

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(client, range(32))) == 0


@pytest.mark.parametrize("option", ["-max_queued_texts", "-max_waiting_texts"])  # the latter from version 1
def test_too_much_work_is_refused(start_alone: Callable[..., Server], model: Any, option: str) -> None:
    """A request that doesn't fit into the queue gets an error at once; smaller ones are still accepted."""
    server = start_alone(option, 8)
    refused = make_request(many_texts(9))
    with pytest.raises(InputError, match="too many texts are waiting; try again later"):
        clients.http_inference(server.address, refused, 60)
    assert post(server, refused.SerializeToString(), PROTO)[0] == 503
    assert call(server, format_frame(refused.SerializeToString()))[0].response.error_code == OVERLOADED
    tokens = many_texts(8)
    vectors = outputs(clients.rpc_inference(server.address, make_request(tokens), 60))["output_embedding"]
    np.testing.assert_allclose(vectors, model[0](*tokens), atol=TOLERANCE)
    stop(server)


def test_sigterm_lets_what_is_going_on_end(start_alone: Callable[..., Server], model: Any) -> None:
    """Received requests are answered, idle connections end, new ones aren't accepted, and the exit code is 0."""
    server = start_alone()
    request = make_request(many_texts(1024))
    idle = socket.create_connection(server.address, 60)
    with (
        ThreadPoolExecutor(2) as pool,
        socket.create_connection(server.address, 60) as first,
        socket.create_connection(server.address, 60) as second,
    ):
        first.sendall(format_frame(request.SerializeToString()))
        body = request.SerializeToString()
        head = f"POST {clients.HTTP_PATH} HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: {len(body)}"
        second.sendall(head.encode() + b"\r\n\r\n" + body)
        time.sleep(0.1)  # the answers take longer
        server.process.send_signal(signal.SIGTERM)
        rpc = pool.submit(lambda: read_frame(first.makefile("rb")))
        answer = pool.submit(lambda: second.makefile("rb").read()).result()
        assert rpc.result()[0].response.error_code == 0
    assert answer.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close\r\n" in answer
    for content in (rpc.result()[1], answer.partition(b"\r\n\r\n")[2]):
        vectors = outputs(Response.FromString(content))["output_embedding"]
        np.testing.assert_allclose(vectors, model[0](*many_texts(1024)), atol=TOLERANCE)
    assert idle.recv(1) == b""
    idle.close()
    stop(server)


# ---------------------------------------------------------------------------------------------------------------------
# Models and settings


def make_serving_folder(model: SemanticIndexBase, tokenizer: TextTokenizer, folder: Path) -> Path:
    """Exports a model to serving_server and serving_client in the folder."""
    save_checkpoint(folder / "checkpoint", model, tokenizer)
    export_model.main(["--params_path", str(folder / "checkpoint"), "--output_path", str(folder / "output")])
    paths = ["--server_path", str(folder / "serving_server"), "--client_path", str(folder / "serving_client")]
    export_to_serving.main(["--dirname", str(folder / "output"), *paths])
    return folder


def test_the_host_and_the_cores_that_are_given(cpp_program: Path, serving_folder: Path, cpp_server: Server) -> None:
    """A name is looked up, an empty one is ignored; there is a predictor for each core that the process may use."""
    core = min(os.sched_getaffinity(0))
    for host in ("localhost", ""):
        port = free_port()
        command = ["taskset", "-c", core, cpp_program, "-resource_path", f"workdir_{cpp_server.port}", "-port", port]
        alone = start(command, port, cwd=serving_folder, env=cpp_environment(SERVING_HOST=host))
        assert alone.log[-1].endswith("with 1 predictor(s)\n")
        assert call(alone, format_frame(GOOD))[0].response.error_code == 0
        stop(alone)


def test_idle_connections_stay_open_as_long_as_the_setting_says(
    cpp_program: Path, serving_folder: Path, cpp_server: Server
) -> None:
    """Over both protocols; Paddle Serving has no option for it."""
    port = free_port()
    command = [cpp_program, "-resource_path", f"workdir_{cpp_server.port}", "-port", port]
    alone = start(command, port, cwd=serving_folder, env=cpp_environment(SERVING_IDLE_TIMEOUT_S="2"))
    with contextlib.ExitStack() as opened:
        silent, http_client, rpc_client = (
            opened.enter_context(socket.create_connection(alone.address, 60)) for _ in range(3)
        )
        answers = rpc_client.makefile("rb")
        for _ in range(2):
            time.sleep(1.2)  # together more than the setting
            http_client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert http_client.recv(1000).startswith(b"HTTP/1.1 200")
            rpc_client.sendall(format_frame(GOOD))
            assert read_frame(answers)[0].response.error_code == 0
        assert silent.recv(1) == http_client.recv(1) == answers.read(1) == b""
    stop(alone)


def test_few_open_files(cpp_program: Path, serving_folder: Path, cpp_server: Server) -> None:
    """A soft limit is raised; a hard one gets a line, and further connections are refused instead of left waiting."""
    files = ["-resource_path", f"workdir_{cpp_server.port}"]
    for kind, lines in (("-S", 0), ("-", 1)):  # the latter sets both
        port = free_port()
        command = ["sh", "-c", f'ulimit {kind}n 64 || exit; exec "$@"', "sh", cpp_program, *files, "-port", port]
        server = start(command, port, cwd=serving_folder, env=cpp_environment())
        note = "note: ulimit -n leaves room for 32 connections; ulimit -n 1056 is enough\n"
        assert [line for line in server.log if line.startswith("note: ")] == [note] * lines
        with contextlib.ExitStack() as opened:
            for _ in range(40):
                last = opened.enter_context(socket.create_connection(server.address, 60))
            last.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            if lines:
                with contextlib.suppress(ConnectionResetError):
                    assert last.recv(12) == b""
            else:
                assert last.recv(12) == b"HTTP/1.1 200"
        stop(server)


def test_predictors_share_the_weights(cpp_program: Path, tmp_path: Path) -> None:
    """Two take hardly more memory than one, which a second copy of 100 MB would show."""
    model_folder = make_model_folder(tmp_path / "ernie", vocab_size=800_000)
    model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(model_folder))
    megabytes = sum(parameter.numpy().nbytes for parameter in model.parameters()) / 1e6
    assert megabytes > 100
    make_serving_folder(model, tokenizer, tmp_path)

    def resident_megabytes(predictors: int) -> float:
        port = free_port()
        command = [sys.executable, "-u", "-m", "paddle_serving_server.serve", "--model", "serving_server"]
        # Freed memory goes back to the system at once.
        variables = cpp_environment(ASAN_OPTIONS="quarantine_size_mb=0", SERVING_BIN=f"exec {cpp_program}")
        options = ["--port", port, "--runtime_thread_num", predictors]
        server = start([*command, *options], port, cwd=tmp_path, env=variables)
        assert f"with {min(predictors, len(os.sched_getaffinity(0)))} predictor(s)" in server.log[-1]
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        stop(server)
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000

    assert resident_megabytes(2) < resident_megabytes(1) + megabytes / 2


def test_ernie_3(cpp_program: Path, tmp_path: Path) -> None:
    """Its table of task types doesn't limit the length of a text."""
    model_folder = make_model_folder(tmp_path / "ernie", use_task_id=True, task_type_vocab_size=3)
    model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(model_folder))
    model.eval()
    port = free_port()
    folder = make_serving_folder(model, tokenizer, tmp_path)
    command = [sys.executable, "-u", "-m", "paddle_serving_server.serve", "--model", "serving_server", "--port", port]
    server = start(command, port, cwd=folder, env=cpp_environment(SERVING_BIN=f"exec {cpp_program}"))
    tokens = tokenizer(TEXTS)
    (vectors,) = outputs(clients.rpc_inference(server.address, make_request(tokens), 60)).values()
    np.testing.assert_allclose(vectors, model.embed(*tokens), atol=TOLERANCE)
    with pytest.raises(InputError, match="41 tokens a text, where the model takes 40 at most"):
        clients.rpc_inference(server.address, make_request(tuple(np.ones((2, 1, 41), dtype=np.int64))), 60)
    stop(server)
