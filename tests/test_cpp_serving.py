"""The C++ server, built with AddressSanitizer: its vectors, its load, and what clients and users can do wrong.

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
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import venv
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from google.protobuf import json_format, text_format

import clients
import export_model
import export_to_serving
from base_model import SemanticIndexBase
from clients import FRAME_HEADER, Request, Response, RpcMeta, format_frame, make_request, outputs, read_frame
from common.cpu import has_bf16
from common.errors import InputError
from data import TextTokenizer, TokenIds
from helpers import ROOT, all_pairs, cpp_environment, make_model_folder, run_script
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.cpp
CPP = ROOT / "deploy" / "C++"
HOST = "127.0.0.1"
TOLERANCE = 1e-5
TITLES = [title for _, title in all_pairs()]
TEXTS = ["水", "水稻的产量", "Deep Learning 2.0!", "论水稻产量研究水稻,产量" * 20]
BAD_REQUEST, NO_SERVICE, NO_METHOD, OVERLOADED = 1003, 1001, 1002, 2004
PROTO, JSON = {"Content-Type": "application/proto"}, {"Content-Type": "application/json"}
MAX_BODY = 16 << 20


class Server(NamedTuple):
    """A running one."""

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
    """SIGTERM to the process that was started ends the server well; AddressSanitizer must have found nothing."""
    server.process.terminate()
    assert server.process.wait(60) == 0
    server.reader.join(60)
    assert not server.reader.is_alive() and "Sanitizer" not in "".join(server.log)


@pytest.fixture(scope="module")
def folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where export_to_serving.py wrote serving_server and serving_client."""
    folder = tmp_path_factory.mktemp("serving")
    paths = ["--server_path", str(folder / "serving_server"), "--client_path", str(folder / "serving_client")]
    export_to_serving.main(["--dirname", str(exported), *paths, "--fetch_alias_names", "output_embedding"])
    return folder


@pytest.fixture(scope="module")
def server(cpp_program: Path, folder: Path) -> Iterator[Server]:
    """One server for the tests of this module, started with the document's command."""
    port = free_port()
    command = [sys.executable, "-u", "-m", "paddle_serving_server.serve", "--model", "serving_server", "--port", port]
    options = ["--thread", 5, "--ir_optim", "True"]
    variables = cpp_environment(SERVING_BIN=f"exec {cpp_program}", PYTHONPATH="")
    server = start([*command, *options], port, cwd=folder, env=variables)
    yield server
    stop(server)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> tuple[Callable[..., np.ndarray], TextTokenizer]:
    """What the server's vectors must equal."""
    model, tokenizer = load_checkpoint(checkpoint)
    return model.embed, tokenizer


@pytest.fixture
def answers(server: Server, model: Any) -> Iterator[None]:
    """Whatever a test did, the next requests get the right vectors."""
    yield
    embed, tokenizer = model
    tokens = tokenizer(["水稻"])
    for send in (clients.http_inference, clients.rpc_inference):
        vectors = outputs(send(server.address, make_request(tokens), 60))["output_embedding"]
        np.testing.assert_allclose(vectors, embed(*tokens), atol=TOLERANCE)


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
    """What baidu_std answers to some bytes."""
    with socket.create_connection(server.address, 60) as connection:
        connection.sendall(frame)
        with connection.makefile("rb") as stream:
            return read_frame(stream)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_the_clients_print_the_models_vectors(server: Server, folder: Path, model: Any) -> None:
    """As the document shows them."""
    embed, tokenizer = model
    expected = embed(*tokenizer(TEXTS))
    options = ["--endpoint", f"{HOST}:{server.port}", "--model_dir", folder / "serving_server", "--texts", *TEXTS]
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


def test_the_readmes_commands(cpp_program: Path, folder: Path, tmp_path: Path) -> None:
    """The server is started and asked as the README does it, on a free port and with the tests' build."""
    blocks = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    build, start_server, *questions = [block for block in blocks if "deploy/C++" in block]
    assert build == "sh deploy/C++/build.sh"
    assert questions == ["python deploy/C++/rpc_client.py", "python deploy/C++/http_client.py"]
    shutil.copytree(CPP, tmp_path / "deploy" / "C++", ignore=shutil.ignore_patterns("build"))
    shutil.copytree(folder / "serving_server", tmp_path / "serving_server")
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


def test_paddle_servings_own_client(server: Server, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, in both formats, compressed and not."""
    monkeypatch.setattr(collections, "Iterable", collections.abc.Iterable, raising=False)
    from paddle_serving_client.httpclient import HttpClient

    embed, tokenizer = model
    tokens = tokenizer(TEXTS * 10)
    client = HttpClient()
    client.load_client_config(str(folder / "serving_client"))
    client.connect([f"{HOST}:{server.port}"])
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
    """The second way to give token ids."""
    for tensor in request.tensor:
        tensor.int_data.extend(tensor.int64_data)
        tensor.elem_type = 2
        del tensor.int64_data[:]


def as_bytes(request: Any) -> None:
    """The third."""
    for tensor in request.tensor:
        tensor.tensor_content = np.array(tensor.int64_data, dtype="<i8").tobytes()
        del tensor.int64_data[:]


@pytest.mark.parametrize("change", [lambda request: None, as_int32, as_bytes], ids=["int64", "int32", "bytes"])
def test_all_ways_to_send_a_request(server: Server, model: Any, change: Callable[[Any], None]) -> None:
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
            status, content = post(server, *sent)
            assert status == 200
            responses.append(parse(content))
    responses.append(Response.FromString(call(server, format_frame(proto))[1]))
    for response in responses:
        np.testing.assert_allclose(outputs(response)["output_embedding"], expected, atol=TOLERANCE)
        assert (response.log_id, response.err_no) == (2**63, 0)
        assert list(response.outputs[0].tensor[0].shape) == [len(TEXTS), 16]


def test_compressed_and_attached_frames(server: Server, model: Any) -> None:
    """What brpc's clients may add; several requests of one connection are told apart by their numbers."""
    embed, tokenizer = model
    numbers = {}
    with socket.create_connection(server.address, 60) as connection, connection.makefile("rb") as stream:
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

TOKENS = (np.array([[1, 5, 6, 2], [1, 7, 2, 0]]), np.zeros((2, 4), np.int64))


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
def test_bad_requests(server: Server, answers: None, case: str) -> None:
    """Refused over both protocols and in both formats, with a reason."""
    make, reason = BAD_REQUESTS[case]
    request = make()
    bodies = [
        (request.SerializeToString(), PROTO, Response.FromString),
        (json_format.MessageToJson(request).encode(), JSON, lambda body: json_format.Parse(body, Response())),
    ]
    for body, headers, parse in bodies:
        status, content = post(server, body, headers)
        response = parse(content)
        assert status in (400, 413) and response.err_no == BAD_REQUEST and re.search(reason, response.err_msg)
    meta, payload = call(server, format_frame(bodies[0][0], correlation_id=9))
    assert meta.correlation_id == 9 and payload == b""
    assert meta.response.error_code == BAD_REQUEST and re.search(reason, meta.response.error_text)


GOOD = make_request(TOKENS).SerializeToString()
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
    "chunks": (b"", {**PROTO, "Transfer-Encoding": "chunked"}, 411),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies(server: Server, answers: None, case: str) -> None:
    """Each is answered with an error in its own format, and takes no memory worth mentioning."""
    body, headers, expected = BAD_BODIES[case]
    status, content = post(server, body, headers)
    assert status == expected
    response = json.loads(content) if headers["Content-Type"] == JSON["Content-Type"] else Response.FromString(content)
    assert (response["err_no"] if isinstance(response, dict) else response.err_no) == BAD_REQUEST


@pytest.mark.parametrize("start", [b'{"tensor":[{"shape":', b'{"tensor":[{"name":\'"\',"shape":'])
def test_deep_json_costs_nothing(server: Server, answers: None, start: bytes) -> None:
    """Protobuf's parser isn't given it; it takes strings in either quotes."""
    status, content = post(server, start + b"[" * 10**6, JSON)
    assert status == 400 and "nested too deeply" in json.loads(content)["err_msg"]


@pytest.mark.parametrize("send", [clients.http_inference, clients.rpc_inference])
def test_large_requests_that_are_sent_whole(server: Server, answers: None, send: Callable[..., Any]) -> None:
    """Their clients hear why they are refused."""
    with pytest.raises(InputError, match="refused the request: the body has more than 16777216 bytes"):
        send(server.address, Request(fetch_var_names=["x" * MAX_BODY]), 60)


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
        (b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 20000 + b"\r\n\r\n", 400),
        (b"POST /GeneralModelService/inference HTTP/1.1\r\n" + b"a: b\r\n" * 5000 + b"\r\n", 400),
    ],
)
def test_bad_http(server: Server, answers: None, request_bytes: bytes, status: int) -> None:
    """Answered with a status, after which the connection ends."""
    with socket.create_connection(server.address, 60) as connection:
        connection.sendall(request_bytes)
        answer = connection.makefile("rb").read()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_http_1_0_keeps_a_connection_where_it_asks_to(server: Server, model: Any) -> None:
    """As `ab -k` and older proxies do, who look for the header."""
    body = make_request(model[1](TEXTS)).SerializeToString()
    head = f"POST /GeneralModelService/inference HTTP/1.0\r\nContent-Length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in PROTO.items())
    with socket.create_connection(server.address, 60) as connection, connection.makefile("rb") as answers:
        for kept in (True, True, False):
            connection.sendall(f"{head}{'Connection: keep-alive' if kept else 'a: b'}\r\n\r\n".encode() + body)
            assert answers.readline() == b"HTTP/1.0 200 OK\r\n"
            headers = http.client.parse_headers(answers)
            assert headers["Connection"] == ("keep-alive" if kept else None)
            assert Response.FromString(answers.read(int(headers["Content-Length"]))).err_no == 0
        assert answers.read() == b""


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


def test_bad_frames(server: Server, answers: None) -> None:
    """Those whose ends are known are answered and followed by others."""
    with socket.create_connection(server.address, 60) as connection, connection.makefile("rb") as stream:
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
def test_bad_frame_headers(server: Server, answers: None, header: bytes) -> None:
    """Answered too, and then the connection ends, after a good frame as before any."""
    for before in (b"", format_frame(GOOD)):
        with socket.create_connection(server.address, 60) as connection, connection.makefile("rb") as stream:
            connection.sendall(before + header)
            codes = sorted(read_frame(stream)[0].response.error_code for _ in range(2 if before else 1))
            assert codes == ([0, BAD_REQUEST] if before else [BAD_REQUEST])
            assert stream.read() == b""


def test_random_changes_of_requests(server: Server, answers: None) -> None:
    """Bytes changed, left out and added anywhere end in an answer or in the end of the connection."""
    generator = random.Random(0)
    head = (
        f"POST {clients.HTTP_PATH} HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: {len(GOOD)}\r\n\r\n"
    )
    for sent in [head.encode() + GOOD, format_frame(GOOD)] * 100:
        changed = bytearray(sent)
        for _ in range(generator.randrange(1, 5)):
            place = generator.randrange(len(changed))
            changed[place : place + generator.randrange(3)] = generator.randbytes(generator.randrange(3))
        with socket.create_connection(server.address, 60) as connection:
            connection.sendall(changed)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as stream:
                assert re.match(rb"$|HTTP/1.1 |PRPC", stream.read())


# ---------------------------------------------------------------------------------------------------------------------
# Load


def test_bad_requests_write_nothing_to_the_log(start_alone: Callable[..., Server]) -> None:
    """Where nobody reads it, the server would stand still."""
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
    """Nor one behind a request that is still computed."""
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


def test_slow_and_vanished_clients(server: Server, answers: None) -> None:
    """They hold up nobody."""
    frame = format_frame(GOOD)
    starts = [b"", b"P", b"POST /Gen", frame[:7], frame[:20], b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc"]
    slow = [socket.create_connection(server.address, 60) for _ in range(20) for _ in starts]
    for connection, sent in zip(slow, starts * 20, strict=True):
        connection.sendall(sent)
    for _ in range(50):
        vanished = socket.create_connection(server.address, 60)
        vanished.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        vanished.sendall(frame)
        vanished.close()
    begin = time.monotonic()
    assert call(server, frame)[0].response.error_code == 0
    assert time.monotonic() - begin < 20  # the server waits 30 s for a slow message
    for connection in slow:
        connection.close()


def test_announced_large_requests_leave_room_for_small_ones(server: Server, answers: None) -> None:
    """What may come in together is limited for large ones alone."""
    head = f"POST {clients.HTTP_PATH} HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: {MAX_BODY}\r\n\r\n"
    announced = [socket.create_connection(server.address, 60) for _ in range(17)]
    for connection in announced:
        connection.sendall(head.encode())
    refused, _, _ = select.select(announced, [], [], 60)
    assert refused[0].recv(12) == b"HTTP/1.1 503"
    assert call(server, format_frame(GOOD))[0].response.error_code == 0
    for connection in announced:
        connection.close()


def test_every_answer_under_load_is_the_right_one(server: Server, model: Any) -> None:
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
                    send(server.address, request, 120)
                continue
            vectors = outputs(send(server.address, request, 120))["output_embedding"]
            wrong += np.abs(vectors - [expected[text] for text in texts]).max() > TOLERANCE
        return wrong

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(client, range(32))) == 0


@pytest.fixture
def start_alone(cpp_program: Path, folder: Path, server: Server) -> Callable[..., Server]:
    """Starts a further server without Paddle Serving, on the files that it wrote for the first."""

    def start_with(*options: Any) -> Server:
        port = free_port()
        files = ["-resource_path", f"workdir_{server.port}"]
        return start([cpp_program, *files, "-port", port, *options], port, cwd=folder, env=cpp_environment())

    return start_with


def make_serving_folder(model: SemanticIndexBase, tokenizer: TextTokenizer, folder: Path) -> Path:
    """Exports a model to serving_server and serving_client in the folder."""
    save_checkpoint(folder / "checkpoint", model, tokenizer)
    export_model.main(["--params_path", str(folder / "checkpoint"), "--output_path", str(folder / "output")])
    paths = ["--server_path", str(folder / "serving_server"), "--client_path", str(folder / "serving_client")]
    export_to_serving.main(["--dirname", str(folder / "output"), *paths])
    return folder


def test_the_host_and_the_cores_that_are_given(cpp_program: Path, folder: Path, server: Server) -> None:
    """A name is looked up, an empty one is none; a predictor for each core that the process may use."""
    core = min(os.sched_getaffinity(0))
    for host in ("localhost", ""):
        port = free_port()
        command = ["taskset", "-c", core, cpp_program, "-resource_path", f"workdir_{server.port}", "-port", port]
        alone = start(command, port, cwd=folder, env=cpp_environment(SERVING_HOST=host))
        assert alone.log[-1].endswith("with 1 predictor(s)\n")
        assert call(alone, format_frame(GOOD))[0].response.error_code == 0
        stop(alone)


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
    """Its table of task types says nothing about how long a text may be."""
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


def many_texts(count: int) -> TokenIds:
    """A request of texts of 40 tokens."""
    ids = np.random.default_rng(0).integers(1, 60, (count, 40))
    return ids, np.zeros_like(ids)


def test_how_texts_are_batched(tmp_path: Path) -> None:
    """batcher_test.cpp ends at the first expectation that doesn't hold, and says which it is."""
    sources = [ROOT / "tests" / "batcher_test.cpp", CPP / "server" / "batcher.cpp"]
    program = tmp_path / "batcher_test"
    subprocess.run(["g++", "-std=c++17", "-pthread", "-I", CPP / "server", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_too_much_work_is_refused(start_alone: Callable[..., Server], model: Any) -> None:
    """A request that doesn't fit into the queue gets an error at once; smaller ones go on."""
    server = start_alone("-max_queued_texts", 8)
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
    """Requests taken are answered, idle connections end, new ones aren't accepted, and the exit code is 0."""
    server = start_alone()
    request = make_request(many_texts(512))
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
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        rpc = pool.submit(lambda: read_frame(first.makefile("rb")))
        answer = pool.submit(lambda: second.makefile("rb").read()).result()
        assert rpc.result()[0].response.error_code == 0
    assert answer.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close\r\n" in answer
    for content in (rpc.result()[1], answer.partition(b"\r\n\r\n")[2]):
        vectors = outputs(Response.FromString(content))["output_embedding"]
        np.testing.assert_allclose(vectors, model[0](*many_texts(512)), atol=TOLERANCE)
    assert idle.recv(1) == b""
    idle.close()
    stop(server)


# ---------------------------------------------------------------------------------------------------------------------
# What users can do wrong


CPU_REFUSES = [  # options of Paddle Serving, the document's first, and the one that is named
    (["--gpu_id", "2", "--thread", "5", "--ir_optim", "True", "--use_trt", "--precision", "FP16"], "--gpu_id"),
    (["--use_trt"], "--use_trt"),
    (["--precision", "FP16"], "--precision FP16"),
    (["--precision", "int8"], "--precision int8"),
    *([] if has_bf16() else [(["--precision", "BF16"], "--precision bf16")]),
]


BAD_VALUES = [(["--model", "nope"], "--model nope"), (["--port", "99999"], "-port 99999")]


@pytest.mark.parametrize(("options", "named"), CPU_REFUSES + BAD_VALUES)
def test_what_start_server_refuses(cpp_program: Path, folder: Path, options: list[str], named: str) -> None:
    """What a CPU can't do and wrong values, by name, before it starts anything."""
    done = subprocess.run(
        ["sh", CPP / "start_server.sh", "--model", folder / "serving_server", *options],
        env=cpp_environment(SERVING_BIN=str(cpp_program)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {named}: .*\n", done.stderr)


@pytest.mark.parametrize(("options", "named"), CPU_REFUSES)
def test_paddle_serving_passes_on_what_the_server_refuses(
    cpp_program: Path, folder: Path, options: list[str], named: str
) -> None:
    """The document's command itself, with what setup.sh --serving changes in Paddle Serving."""
    command = ["-m", "paddle_serving_server.serve", "--model", "serving_server", "--port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *command, *options],
        cwd=folder,
        env=cpp_environment(SERVING_BIN=f"exec {cpp_program}", PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and f"error: {named}: " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-port", "x"], "-port x: give a number from 0 to 65535"),
        (["-resource_path", "nowhere"], "nowhere/resource.prototxt: can't be read"),
        (["-host", "nowhere"], "--port 0: can't listen on nowhere"),
        (["---x"], "---x: isn't an option"),
        (["-enable_prometheus=True"], "--enable_prometheus: this server has no metrics"),
    ],
)
def test_bad_options(cpp_program: Path, folder: Path, server: Server, options: list[str], message: str) -> None:
    """One line and exit code 2."""
    files = ["-resource_path", f"workdir_{server.port}", "-port", "0"]
    done = subprocess.run(
        [cpp_program, *files, *options],
        cwd=folder,
        env=cpp_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"), [(b"{}", "isn't the graph of a model of this project"), (b"\0", "isn't a graph")]
)
def test_damaged_graphs(
    cpp_program: Path, folder: Path, server: Server, tmp_path: Path, content: bytes, message: str
) -> None:
    """They are refused before Paddle sees them."""
    copy = tmp_path / "serving_server"
    copy.mkdir()
    (copy / "graph.json").write_bytes(content)
    (copy / "graph.pdiparams").write_bytes(b"")
    workdir = tmp_path / "workdir"
    for file in (folder / f"workdir_{server.port}").rglob("*.prototxt"):
        target = workdir / file.relative_to(folder / f"workdir_{server.port}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text().replace(f"workdir_{server.port}", "workdir"))
    done = subprocess.run(
        [cpp_program, "-resource_path", "workdir"],
        cwd=tmp_path,
        env=cpp_environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr.decode()


@pytest.mark.parametrize("script", ["rpc_client.py", "http_client.py"])
def test_clients_without_a_server_or_a_model(script: str, folder: Path, tmp_path: Path) -> None:
    """One line and exit code 2."""
    model_dir = ["--model_dir", folder / "serving_server"]
    for options, named in (
        ([*model_dir, "--endpoint", f"{HOST}:{free_port()}"], r"--endpoint 127.0.0.1:\d+: no answer .*start_server.sh"),
        ([*model_dir, "--endpoint", "here"], "argument --endpoint: here isn't host:port"),
        ([*model_dir, "--texts", "好", " "], "argument --texts: the text is empty"),
        (["--model_dir", tmp_path / "none"], "--model_dir .*none: no such folder; give the one that the server serves"),
    ):
        done = run_script(CPP / script, *options)
        assert done.returncode == 2
        assert re.match(f"error: .*{named}.*\n$", done.stderr), done.stderr


def test_cudas_libraries_are_found_where_pip_puts_them(tmp_path: Path) -> None:
    """A GPU build of Paddle asks the linker for them by name."""
    shutil.copytree(CPP, tmp_path / "deploy" / "C++", ignore=shutil.ignore_patterns("build"))
    venv.create(tmp_path / ".venv", symlinks=True)
    (site_packages,) = tmp_path.glob(".venv/lib/*/site-packages")
    folders = [site_packages / "nvidia" / name / "lib" for name in ("cublas", "cudnn")]
    for folder in folders:
        folder.mkdir(parents=True)
    program = tmp_path / "serving"
    program.write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH"\nexit 2\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", tmp_path / "deploy" / "C++" / "start_server.sh"],
        env={**os.environ, "SERVING_BIN": str(program), "LD_LIBRARY_PATH": "/mine"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    *nvidia, mine = done.stdout.strip().split(":")
    assert (sorted(nvidia), mine) == (sorted(map(str, folders)), "/mine")


def test_builds_take_turns_and_paths_may_hold_spaces(tmp_path: Path) -> None:
    """CMake's place is taken by a script that fails where another runs."""
    paddle = tmp_path / "a b*" / "paddle"
    (paddle / "version").mkdir(parents=True)
    (paddle / "__init__.py").touch()
    (paddle / "version" / "__init__.py").write_text("cuda_version = 'False'\n")
    cmake = tmp_path / "cmake"
    cmake.write_text('#!/bin/sh\nmkdir "$0.on" || exit\nprintf "%s\\n" "$@" >>"$0.log"\nsleep 0.3\nrmdir "$0.on"\n')
    cmake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "a b*")}
    command = ["sh", CPP / "build.sh", "--build-dir", tmp_path / "c d", "--python", sys.executable]
    builds = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [build.communicate()[0] for build in builds] == [f"{tmp_path}/c d/serving\n"] * 2
    assert cmake.with_suffix(".log").read_text().splitlines().count(f"-DPADDLE_FOLDER={paddle}") == 2


def test_missing_packages_are_named(tmp_path: Path) -> None:
    """By build.sh, which installs nothing unasked."""
    (tmp_path / "dpkg-query").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "dpkg-query").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", CPP / "build.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    packages = "g++ cmake make libboost-dev libprotobuf-dev protobuf-compiler zlib1g-dev"
    assert done.stderr == f"error: these packages are missing: sudo apt-get install {packages}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing


def test_the_parsers_bear_whatever_comes(tmp_path: Path) -> None:
    """libFuzzer, from requests that they accept."""
    done = subprocess.run(
        ["sh", CPP / "build.sh", "--fuzz", "--build-dir", tmp_path / "build", "--python", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    text = json_format.MessageToJson(make_request(TOKENS), preserving_proto_field_name=True).encode()
    for kind, content in enumerate([GOOD, text, format_frame(GOOD), gzip.compress(GOOD)]):
        (corpus / str(kind)).write_bytes(bytes([kind]) + content)
    # It compares the largest memory so far, which a process inherits from the one that starts it.
    limit = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) + 256
    options = ["-max_total_time=15", f"-rss_limit_mb={limit}", "-max_len=4096", "-seed=1", "-print_final_stats=1"]
    done = subprocess.run(
        [done.stdout.strip(), *options, corpus], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)[1]) > 1000


def test_a_build_of_another_place_is_made_anew(tmp_path: Path) -> None:
    """CMake refuses its cache once the repository was moved or copied."""
    (tmp_path / "dpkg-query").write_text("#!/bin/sh\necho install ok installed\n")
    (tmp_path / "cmake").write_text("#!/bin/sh\nexit 1\n")
    for program in ("dpkg-query", "cmake"):
        (tmp_path / program).chmod(0o755)
    cache = tmp_path / "build" / "CMakeCache.txt"
    cache.parent.mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["sh", CPP / "build.sh", "--python", sys.executable, "--build-dir", cache.parent]
    for place, kept in ((cache.parent, True), (tmp_path / "elsewhere", False)):
        cache.write_text(f"CMAKE_CACHEFILE_DIR:INTERNAL={place}\n")
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "the build failed" in done.stderr
        assert cache.exists() == kept
