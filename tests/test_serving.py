"""A real Pipeline service: its vectors, its load, and everything that clients and operators can do wrong."""

import contextlib
import errno
import http.client
import io
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import grpc
import numpy as np
import pytest
import static_graph

import export_model
import export_to_serving
from benchmarks.service_clients import (
    CLIENTS,
    HOST,
    Service,
    ServiceError,
    http_client,
    read_metrics,
    rpc_client,
    running_service,
)
from common.errors import InputError
from data import encode_texts
from encoding.static_graph import load_exported
from helpers import ROOT, all_pairs, run_script
from serving import adapter, encoder_process, http_gateway
from serving.adapter import METHOD, PipelineService, Request, Response, ServiceOptions, embed_remotely
from serving.encoder_process import EncoderOptions, EncoderProcess, EncoderStopped, serve
from serving.http_gateway import PREDICTION_PATH, HttpGateway
from serving.limits import BAD_REQUEST, INTERNAL_ERROR, NO_SUCH_SERVICE, OVERLOADED, STOPPING, Limits
from serving.settings import check_ports, read_settings

TOLERANCE = 1e-5
TITLES = [title for _, title in all_pairs()]
SECRET = "机密文本" * 5  # a text that no log may hold
TEXTS = [
    "水",
    "水稻的产量",
    "Deep Learning 2.0!",
    SECRET,
    "论水稻产量研究水稻,产量" * 20,  # longer than the model's 24 tokens
]
MAX_TEXTS, MAX_CHARACTERS = 64, 2000


@pytest.fixture(scope="module")
def serving_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of export_to_serving.py."""
    folder = tmp_path_factory.mktemp("serving")
    export_model.main(["--params_path", str(checkpoint), "--output_path", str(folder / "output")])
    paths = ["--server_path", str(folder / "serving_server"), "--client_path", str(folder / "serving_client")]
    export_to_serving.main(["--dirname", str(folder / "output"), *paths, "--fetch_alias_names", "output_embedding"])
    return folder / "serving_server"


@pytest.fixture(scope="module")
def service(serving_server: Path) -> Iterator[Service]:
    """One service for the tests of this module."""
    options = ["--max_texts", str(MAX_TEXTS), "--max_characters", str(MAX_CHARACTERS), "--threads", "1"]
    with running_service(serving_server, *options) as service:
        yield service
    assert service.process.returncode == 0
    log = "".join(service.log)
    assert "ready" in log and "Traceback" not in log and SECRET[:4] not in log and "水稻" not in log


@pytest.fixture
def answers(service: Service) -> Iterator[None]:
    """Whatever a test did, the next request works."""
    yield
    for client in CLIENTS.values():
        with client(service) as embed:
            assert embed(["水稻"]).shape == (1, 16)
    assert get(service, "/health") == (200, '{"status": "ok"}')


def get(service: Service, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{service.http_port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def post(service: Service, body: bytes, path: str = PREDICTION_PATH) -> tuple[int, dict[str, Any]]:
    """Status and content."""
    request = urllib.request.Request(f"http://{HOST}:{service.http_port}{path}", body)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def call(service: Service, data: bytes) -> Response:
    """The answer to the bytes of a gRPC request."""
    with grpc.insecure_channel(f"{HOST}:{service.rpc_port}") as channel:
        method = channel.unary_unary(f"/{METHOD}/inference", response_deserializer=Response.FromString)
        return method(data, timeout=30)


def children(process: int) -> list[int]:
    """Numbers of a process's own processes."""
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for file in files for number in file.read_text().split()]


def encoders(process: int) -> list[int]:
    """Those of its children that run the encoder's program; one not so far yet holds its parent up (vfork)."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(process)}
    return [child for child, command in commands.items() if encoder_process.__name__.encode() in command]


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_the_answer_keeps_the_originals_form(service: Service) -> None:
    """Over HTTP as Serving's gateway writes it; the value is JSON and, as in the original, a Python literal."""
    status, content = post(service, json.dumps({"key": ["1", "0"], "value": ["小麦", "水稻"]}).encode())
    assert status == 200
    assert list(content) == ["err_no", "err_msg", "key", "value", "tensors"]
    assert (content["err_no"], content["err_msg"], content["key"]) == (0, "", ["output_embedding"])
    with rpc_client(service) as embed:
        np.testing.assert_allclose(json.loads(content["value"][0]), embed(["水稻", "小麦"]), atol=TOLERANCE)


def test_every_answer_under_load_is_the_right_one(service: Service, serving_server: Path) -> None:
    """16 clients at a time, both ways in, one to five texts a request; some are computed together."""
    exported = load_exported(serving_server)
    expected = encode_texts(exported.encoder.embed, TITLES, exported.tokenizer, 32)

    def work(seed: int) -> int:
        order = random.Random(seed)
        with CLIENTS[order.choice(list(CLIENTS))](service) as embed:
            for _ in range(20):
                rows = order.sample(range(len(TITLES)), order.randint(1, 5))
                vectors = embed([TITLES[row] for row in rows])
                np.testing.assert_allclose(vectors, expected[rows], atol=TOLERANCE, rtol=0)
        return 20

    before = read_metrics(service)["batch_texts_count"]
    with ThreadPoolExecutor(16) as pool:
        calls = sum(pool.map(work, range(16)))
    assert calls == 320
    assert read_metrics(service)["batch_texts_count"] - before < 320 / 2


def test_metrics_count_what_happened(service: Service) -> None:
    before = read_metrics(service)
    with http_client(service) as http, rpc_client(service) as rpc:
        http(["水稻", "小麦", "玉米"])
        rpc(["水稻"])
        with pytest.raises(ServiceError):
            rpc([""])
    after = read_metrics(service)
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert changed['requests_total{way="http"}'] == 1 and changed['requests_total{way="rpc"}'] == 2
    assert changed[f'errors_total{{err_no="{BAD_REQUEST}"}}'] == 1
    assert changed["request_seconds_count"] == 3 and changed["batch_texts_count"] == 2
    assert changed["batch_texts_sum"] == 4 and changed['batch_texts_bucket{le="1.0"}'] == 1
    assert after['waiting{of="texts"}'] == 0


def test_it_listens_on_localhost_alone(service: Service) -> None:
    listening = {}
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A":  # TCP_LISTEN of the kernel's tcp_states.h
                listening[int(port, 16)] = address
    ipv4, mapped_ipv4 = "0100007F", "0000000000000000FFFF00000100007F"
    assert {listening[service.rpc_port], listening[service.http_port]} <= {ipv4, mapped_ipv4}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def as_json(**content: Any) -> bytes:
    return json.dumps(content).encode()


BAD_BODIES = [
    (b"", 400, "isn't JSON"),
    (b"{", 400, "isn't JSON at character 1"),
    (b'{"key": ["0"], "value": ["\xff\xfe"]}', 400, "isn't UTF-8"),
    (b"[" * 100_000 + b"]" * 100_000, 400, "nested too deeply"),
    (b'{"key": ["0"], "value": [NaN]}', 400, "isn't JSON"),
    (b'["0"]', 400, "isn't an object"),
    (b"{}", 400, "no texts"),
    (as_json(key=[], value=[]), 400, "no texts"),
    (as_json(key=["0"], value=[""]), 400, "text 0 is empty"),
    (as_json(key=["0", "1"], value=["水稻", " \n"]), 400, "text 1 is empty"),
    (as_json(key=["0"], value=["水" * (MAX_CHARACTERS + 1)]), 400, f"{MAX_CHARACTERS + 1} characters"),
    (as_json(key=list(map(str, range(10_000))), value=["水"] * 10_000), 400, f"at most {MAX_TEXTS}"),
    (as_json(key=["text"], value=["水稻"]), 400, "wrong keys"),
    (as_json(key=["0", "0"], value=["水稻", "小麦"]), 400, "wrong keys"),
    (as_json(key=["0", "1"], value=["水稻"]), 400, "2 keys and 1 values"),
    (as_json(key="0", value="水稻"), 400, "key must be a list of strings"),
    (as_json(key=["0"], value=[1.5]), 400, "value must be a list of strings"),
    (as_json(key=["0"], value=[None]), 400, "value must be a list of strings"),
    (as_json(key=["0"], value=[["水稻"]]), 400, "value must be a list of strings"),
    (as_json(key=["0"], value=["\ud800"]), 400, "surrogate"),
    (as_json(key=["0"], value=["水稻"], logid=2**70), 400, "logid"),
    (as_json(key=["0"], value=["水稻"], text="小麦"), 400, "unknown fields"),
    (as_json(key=["0"], value=["水稻"], tensors=[{"name": "0"}]), 400, "tensors aren't taken"),
    (as_json(key=["0"], value=["水稻"], name="other"), 404, "no such service"),
    (b" " * 10_000_000, 413, "at most 4194304 bytes"),
]


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(("body", "status", "message"), BAD_BODIES, ids=lambda value: str(value)[:20])
def test_bad_http_requests(service: Service, body: bytes, status: int, message: str) -> None:
    """An error that says what is wrong, without a text or a path."""
    got, content = post(service, body)
    assert got == status
    assert message in content["err_msg"]
    assert content["err_no"] and content["value"] == []
    assert "/" not in content["err_msg"] and "水稻" not in content["err_msg"]


@pytest.mark.usefixtures("answers")
def test_bad_rpc_requests(service: Service) -> None:
    """The same over gRPC."""
    tensor = Request(key=["0"], value=["水稻"])
    tensor.tensors.add(name="0", elem_type=0, int64_data=[1], shape=[1])
    for data, message in [
        (b"\x0a\x05\x01", "not a Request"),
        (b"\x12\x02\xff\xfe", "UTF-8"),
        (Request().SerializeToString(), "no texts"),
        (Request(key=["0"], value=["  "]).SerializeToString(), "text 0 is empty"),
        (Request(key=["0"], value=["水" * (MAX_CHARACTERS + 1)]).SerializeToString(), "characters"),
        (Request(key=map(str, range(10_000)), value=["水"] * 10_000).SerializeToString(), f"at most {MAX_TEXTS}"),
        (Request(key=["1"], value=["水稻"]).SerializeToString(), "wrong keys"),
        (Request(key=["0"], value=["水稻", "小麦"]).SerializeToString(), "1 keys and 2 values"),
        (tensor.SerializeToString(), "tensors aren't taken"),
    ]:
        response = call(service, data)
        assert response.err_no == BAD_REQUEST and message in response.err_msg and not response.value
    assert call(service, Request(name="other").SerializeToString()).err_no == NO_SUCH_SERVICE
    with pytest.raises(grpc.RpcError) as error:
        call(service, Request(key=["0"], value=["水" * 10_000_000]).SerializeToString())
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


class _Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("answers")
def test_pickled_tensors_run_no_code(service: Service, tmp_path: Path) -> None:
    """Serving's own unpacking loads them with np.load(allow_pickle=True)."""
    file = io.BytesIO()
    np.save(file, np.array([_Touch(tmp_path / "ran")], dtype=object), allow_pickle=True)
    request = Request()
    request.tensors.add(name="0", elem_type=13, byte_data=file.getvalue())
    assert "tensors aren't taken" in call(service, request.SerializeToString()).err_msg
    assert list(tmp_path.iterdir()) == []
    file.seek(0)
    np.load(file, allow_pickle=True)
    assert (tmp_path / "ran").exists()  # the payload would have worked


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of a TLS handshake
        b"POST /ernie/prediction HTTP/1.1\r\n",
        b"POST /ernie/prediction HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b'POST /ernie/prediction HTTP/1.1\r\nContent-Length: 31\r\n\r\n{"key": ["0"], "value": ["text"]}',
    ],
)
def test_clients_that_hang_up(service: Service, sent: bytes) -> None:
    """At any point, on either port."""
    for port in (service.http_port, service.rpc_port):
        for _ in range(5):
            with socket.create_connection((HOST, port)) as connection:
                connection.sendall(sent)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /ernie/prediction HTTP/1.1", b"400"),
        (b"POST /ernie/prediction HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2", b"400"),
        (b"POST /ernie/prediction HTTP/1.1\r\nContent-Length: -1", b"400"),
        (b"POST /ernie/prediction HTTP/1.1\r\nContent-Length: " + b"9" * 5000, b"400"),
        (b"POST /other HTTP/1.1\r\nContent-Length: 0", b"404"),
        (b"DELETE /ernie/prediction HTTP/1.1", b"405"),
        (b"BREW /ernie/prediction HTTP/1.1", b"405"),
        (b"GET / HTTP/1.1", b"404"),
        (b"nonsense", b"400"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1", b""),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_http_heads(service: Service, head: bytes, status: bytes) -> None:
    """One answer, in JSON or without a word, never a page of HTML or what was sent; none to a head without end."""
    with socket.create_connection((HOST, service.http_port), timeout=30) as connection:
        connection.sendall(head + b"\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 " + status) if status else not answer
    _, _, body = answer.partition(b"\r\n\r\n")
    assert not body or json.loads(body)["err_msg"]


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other end closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.usefixtures("answers")
def test_other_ways_to_send_a_request(service: Service) -> None:
    """In chunks, from HTTP/1.0, and with more in chunks than is taken."""
    body = as_json(key=["0"], value=["水稻"])
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    post = b"POST /ernie/prediction HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    for sent, status in [
        (post + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n", b"200"),
        (post.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n%s" % (len(body), body), b"200"),
        (
            post + b"Transfer-Encoding: chunked\r\n\r\n" + b"80000\r\n%b\r\n" % (b" " * 0x80000) * 9 + b"0\r\n\r\n",
            b"413",
        ),
    ]:
        with socket.create_connection((HOST, service.http_port), timeout=30) as connection:
            connection.sendall(sent)
            assert read_all(connection).startswith(b"HTTP/1.1 " + status)


# ---------------------------------------------------------------------------------------------------------------------
# Batches, overload, failures and stops, with encoders that do as they are told


class FakeEncoder:
    """Gives [number of the call, characters of the text] when `go` is set."""

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


LIMITS = Limits(texts=4, characters=100, bytes=10_000, waiting_texts=6)
MakeService = Callable[..., PipelineService]


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def fake_service(encoder: FakeEncoder) -> Iterator[PipelineService]:
    """A service in this process."""
    service = PipelineService([encoder], ServiceOptions(batch_size=4, batch_wait=0.2, rpc_threads=16, limits=LIMITS))
    yield service
    encoder.go.set()
    assert service.stop(30)


def ask(service: PipelineService, *texts: str) -> Response:
    return service.answer("rpc", lambda: Request(key=map(str, range(len(texts))), value=texts))


def until(condition: Callable[[], bool]) -> None:
    """Waits for it."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_waiting_requests_are_computed_together(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    """The first alone, then up to batch_size texts of those that came meanwhile; each gets its own vectors."""
    with ThreadPoolExecutor(8) as pool:
        futures = {text: pool.submit(ask, fake_service, text) for text in ("a",)}
        until(lambda: encoder.batches == [["a"]])
        for text in ("bb", "ccc", "dddd", "eeeee", "ffffff")[:5]:
            futures[text] = pool.submit(ask, fake_service, text)
        until(lambda: fake_service.admission.texts == 6)
        encoder.go.set()
        for text, future in futures.items():
            assert json.loads(future.result().value[0])[0][1] == len(text)
    assert [len(batch) for batch in encoder.batches] == [1, 4, 1]


def test_an_encoder_tells_why_it_can_t_load_or_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's errors are OSErrors; after one on a GPU the process ends, since CUDA may be lost to it."""

    def sent(load: Callable[..., Any]) -> list[Any]:
        monkeypatch.setattr(static_graph, "load_exported", load)
        answers: list[Any] = []
        connection = SimpleNamespace(send=answers.append, recv=lambda: ["a"])
        serve(connection, EncoderOptions("model", "gpu", "fp32", None, None, 1))
        return answers

    def embed(input_ids: np.ndarray, _: np.ndarray) -> np.ndarray:
        if input_ids[0, 0] == 1:
            raise OSError("(External) CUDA error(700)")
        return np.zeros((len(input_ids), 2), np.float32)

    tokenizer = SimpleNamespace(max_seq_length=8, lengths=lambda ids: list(map(len, ids)))
    tokenizer.tokenize = lambda texts: [[int(text == "a")] for text in texts]
    tokenizer.pad = lambda ids: (np.array(ids), np.array(ids))
    monkeypatch.setattr(static_graph, "choose_device", str)
    assert sent(MagicMock(side_effect=OSError("(External) CUDA error(803)"))) == [
        "model: OSError: (External) CUDA error(803)"
    ]
    exported = static_graph.Exported(SimpleNamespace(embed=embed), tokenizer)
    assert sent(lambda *_, **__: exported) == [None, "OSError in encoding 1 texts"]


def test_a_lone_client_never_waits(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    encoder.go.set()
    start = time.monotonic()
    for _ in range(20):
        assert ask(fake_service, "a").err_no == 0
    assert time.monotonic() - start < 20 * 0.2


def test_two_encoders_work_at_a_time() -> None:
    """A request doesn't wait for the batch before it where another encoder is free."""
    encoders = [FakeEncoder(), FakeEncoder()]
    service = PipelineService(encoders, ServiceOptions(4, 0.0, 16, LIMITS))
    with ThreadPoolExecutor(2) as pool:
        futures = []
        for number, text in enumerate(("a", "b"), start=1):
            futures.append(pool.submit(ask, service, text))
            until(lambda number=number: sum(len(encoder.batches) for encoder in encoders) == number)
        assert sorted(encoder.batches for encoder in encoders) == [[["a"]], [["b"]]]
        for encoder in encoders:
            encoder.go.set()
        assert [future.result().err_no for future in futures] == [0, 0]
    assert service.stop(30)


def test_overload_is_an_error_at_once(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    """Beyond waiting_texts, and only as long as they wait."""
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, fake_service, "a", "b", "c") for _ in range(2)]
        until(lambda: fake_service.admission.texts == 6)
        refused = ask(fake_service, "d")
        assert refused.err_no == OVERLOADED and "try again later" in refused.err_msg
        encoder.go.set()
        assert [future.result().err_no for future in futures] == [0, 0]
    assert ask(fake_service, "d").err_no == 0


def test_a_failing_encoder_fails_its_batch_alone(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    encoder.go.set()
    response = ask(fake_service, "fail")
    assert response.err_no == INTERNAL_ERROR and response.err_msg == "the encoder failed: try again"
    assert ask(fake_service, "a").err_no == 0


def test_an_unforeseen_error_fails_its_batch_alone(
    fake_service: PipelineService, encoder: FakeEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The thread that Serving encodes in goes on."""
    encoder.go.set()
    answers: list[Response] = []
    threading.Thread(
        target=lambda: answers.extend(ask(fake_service, text) for text in ("crash", "a")), daemon=True
    ).start()
    until(lambda: len(answers) == 2)
    assert [answer.err_no for answer in answers] == [INTERNAL_ERROR, 0]
    assert capsys.readouterr().err == "error: ValueError in encoding a batch\n"


def test_an_unforeseen_error_is_an_answer(
    fake_service: PipelineService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the client nor the log learn its message, which could hold texts."""

    def fail(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(adapter, "check_texts", fail)
    assert ask(fake_service, "a").err_msg == "the service failed: try again"
    assert capsys.readouterr().err == "error: ValueError in answering a request\n"


def test_an_unforeseen_error_over_http(
    gateway: HttpGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gateway.service.metrics, "text", Mock(side_effect=ValueError(SECRET)))
    status, body = get(Service(None, 0, gateway.server_port, []), "/metrics")
    assert (status, json.loads(body)["err_no"]) == (500, INTERNAL_ERROR)
    assert capsys.readouterr().err == "error: ValueError in answering over HTTP\n"


def test_stopping_answers_what_is_there(encoder: FakeEncoder) -> None:
    """And refuses what comes later."""
    service = PipelineService([encoder], ServiceOptions(4, 0.0, 16, LIMITS))
    with ThreadPoolExecutor(8) as pool:
        early = [pool.submit(ask, service, text) for text in ("a", "b")]
        until(lambda: service.admission.texts == 2)
        stopped = pool.submit(service.stop, 30)
        until(lambda: service.admission.stopping)
        late = ask(service, "c")
        encoder.go.set()
        assert stopped.result() is True
    assert [future.result().err_no for future in early] == [0, 0]
    assert late.err_no == STOPPING
    assert encoder.closed


INNER = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def gateway(fake_service: PipelineService, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpGateway]:
    """Of the fake service, with little patience, two requests at a time and six connections."""
    monkeypatch.setattr(http_gateway, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(http_gateway, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(http_gateway, "OTHER_CONNECTIONS", 4)
    gateway = HttpGateway(fake_service, HOST, 0, requests=2)
    yield gateway
    gateway.stop()


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (f"GET /health HTTP/1.1\r\nContent-Length: {len(INNER)}", INNER),
        ("GET /health HTTP/1.1\r\nTransfer-Encoding: chunked", INNER),
        ("POST /ernie/prediction HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 50", "{}" + INNER),
        ("POST /ernie/prediction HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding : chunked", "{}" + INNER),
    ],
)
def test_a_body_is_never_another_request(gateway: HttpGateway, head: str, body: str) -> None:
    """Nor where a proxy may see its end elsewhere."""
    with socket.create_connection((HOST, gateway.server_port), timeout=10) as connection:
        connection.sendall(f"{head}\r\nHost: a\r\n\r\n{body}".encode())
        answers = read_all(connection)  # one that stays open is closed as idle after a second
    assert answers.count(b"HTTP/1.1 ") == 1


def test_slow_clients_lose_their_connection(gateway: HttpGateway) -> None:
    """One that sends nothing, and those that send a byte of a head or body now and then."""
    for head in ("", "GET /health HTTP/1.1\r\nHost: ", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"):
        with socket.create_connection((HOST, gateway.server_port), timeout=0.05) as connection:
            connection.sendall(head.encode())
            end = time.monotonic() + 10
            while True:
                assert time.monotonic() < end
                try:
                    assert connection.recv(4096) == b""
                    break
                except TimeoutError:
                    connection.sendall(b" " if head else b"")
                except ConnectionResetError:
                    break


def test_a_client_that_does_not_read_loses_its_connection(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    encoder.encode = lambda texts: np.ones((1, 5_000_000), np.float32)  # 10 MB, more than the system holds
    body = as_json(key=["0"], value=["a"])
    with socket.create_connection((HOST, gateway.server_port), timeout=30) as connection:
        connection.sendall(
            f"POST {PREDICTION_PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        until(lambda: gateway.server.open == 1)
        until(lambda: gateway.server.open == 0)
        with contextlib.suppress(ConnectionResetError):
            assert len(read_all(connection)) < 10_000_000


def test_a_client_that_reads_no_refusals_loses_its_connection(gateway: HttpGateway) -> None:
    with socket.create_connection((HOST, gateway.server_port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # its requests aren't read any more, then it is reset
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * 500_000)
        until(lambda: gateway.server.open == 0)


def test_a_request_that_has_come_is_not_idle(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """Though it isn't read yet when its connection would have to make room."""
    encoder.go.set()
    connections = [http.client.HTTPConnection(HOST, gateway.server_port, timeout=10) for _ in range(7)]
    for connection in connections[:6]:
        connection.connect()
    until(lambda: len(gateway.server.idle) == 6)
    gateway._loop.call_soon_threadsafe(time.sleep, 0.2)
    connections[0].request("GET", "/health")
    connections[6].request("GET", "/health")
    assert connections[0].getresponse().status == connections[6].getresponse().status == 200
    for connection in connections:
        connection.close()


def test_bodies_on_their_way_count_as_requests(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """Until they are answered, or their clients have gone."""
    encoder.go.set()
    service, body = Service(None, 0, gateway.server_port, []), as_json(key=["0"], value=["a"])
    slow = [socket.create_connection((HOST, gateway.server_port)) for _ in range(2)]
    for connection in slow:
        connection.sendall(f"POST {PREDICTION_PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n".encode())
    until(lambda: len(gateway.taken) == 2)
    assert post(service, body)[1]["err_no"] == OVERLOADED
    for connection in slow:
        connection.close()
    until(lambda: not gateway.taken)
    assert post(service, body)[1]["err_no"] == 0


def test_a_stop_tells_clients_and_does_not_wait_for_ever(
    fake_service: PipelineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer after the stop is its connection's last; what isn't answered then is left."""
    monkeypatch.setattr(http_gateway, "SENDING_SECONDS", 0.1)
    gateway = HttpGateway(fake_service, HOST, 0, requests=2)
    connections = [http.client.HTTPConnection(HOST, gateway.server_port, timeout=30) for _ in range(2)]
    for number, connection in enumerate(connections, 1):
        connection.request("POST", PREDICTION_PATH, as_json(key=["0"], value=["a"]))
        until(lambda number=number: fake_service.admission.requests == number)
    assert not fake_service.admission.stop(0.0)
    with socket.create_connection((HOST, gateway.server_port), timeout=30) as late:
        late.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = read_all(late)
    assert b"503 Service Unavailable" in answer and b"Connection: close" in answer
    gateway.stop()
    assert fake_service.admission.requests == 2
    for connection in connections:
        with pytest.raises(OSError):
            connection.getresponse()
        connection.close()


def test_idle_connections_make_room(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """The longest idle one is closed for the next; those that stay go on."""
    encoder.go.set()
    connections = [http.client.HTTPConnection(HOST, gateway.server_port, timeout=10) for _ in range(8)]
    for connection in connections:
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status": "ok"}'
    connections[0].request("GET", "/health")
    with pytest.raises(OSError):
        connections[0].getresponse()
    status, answer = post_to(connections[-1], as_json(key=["0"], value=["a"]))
    assert (status, answer["err_no"]) == (200, 0)
    for connection in connections:
        connection.close()


def test_more_connections_at_work_are_refused(gateway: HttpGateway) -> None:
    """At once, and taken again when others are gone."""
    service = Service(None, 0, gateway.server_port, [])
    slow = [socket.create_connection((HOST, gateway.server_port)) for _ in range(6)]
    for connection in slow:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
    until(lambda: gateway.server.open == 6 and not gateway.server.idle)
    with pytest.raises(OSError):
        get(service, "/health")
    for connection in slow:
        connection.close()
    until(lambda: gateway.server.open == 0)
    assert get(service, "/health")[0] == 200


def post_to(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and content, over a connection that stays open."""
    connection.request("POST", PREDICTION_PATH, body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_more_requests_are_refused_at_once(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """Over a connection that goes on; /health and /metrics aren't concerned."""
    service = Service(None, 0, gateway.server_port, [])
    body = as_json(key=["0"], value=["a"])
    refused = http.client.HTTPConnection(HOST, gateway.server_port, timeout=10)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, service, body) for _ in range(2)]
        until(lambda: gateway.service.admission.requests == 2)
        status, answer = post_to(refused, body + b" " * 9000)
        assert (status, answer["err_no"], "try again later" in answer["err_msg"]) == (503, OVERLOADED, True)
        assert get(service, "/health")[0] == 200
        assert read_metrics(service)[f'errors_total{{err_no="{OVERLOADED}"}}'] == 1
        encoder.go.set()
        assert [future.result()[0] for future in waiting] == [200, 200]
    assert post_to(refused, body)[0] == 200
    refused.close()


def test_overload_over_rpc(encoder: FakeEncoder) -> None:
    """The client tells a busy service from texts that are too many, and from none."""
    service = PipelineService([encoder], ServiceOptions(4, 0.0, 1, LIMITS))
    endpoint = f"{HOST}:{service.listen(HOST, 0)}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(embed_remotely, endpoint, {"0": "a"})
        until(lambda: service.admission.requests == 1)
        with pytest.raises(InputError, match="the service is busy: try again later"):
            embed_remotely(endpoint, {"0": "b"})
        encoder.go.set()
        assert waiting.result().err_no == 0
    with pytest.raises(InputError, match="send fewer texts"):
        embed_remotely(endpoint, {"0": "a" * LIMITS.bytes})
    assert service.stop(30)
    with pytest.raises(InputError, match=r"start deploy/python/web_service\.py"):
        embed_remotely(endpoint, {"0": "a"})


def test_overload_over_http(gateway: HttpGateway, fake_service: PipelineService, encoder: FakeEncoder) -> None:
    """503 with Retry-After, which proxies and clients understand."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, fake_service, "a", "b", "c") for _ in range(2)]
        until(lambda: fake_service.admission.texts == 6)
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(
                f"http://{HOST}:{gateway.server_port}{PREDICTION_PATH}", as_json(key=["0"], value=["d"])
            )
        assert error.value.code == 503 and error.value.headers["Retry-After"] == "1"
        assert json.loads(error.value.read())["err_no"] == OVERLOADED
        encoder.go.set()
        assert [future.result().err_no for future in waiting] == [0, 0]


def test_health_is_bad_where_no_encoder_can_be_started(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    encoder.broken = True
    assert get(Service(None, 0, gateway.server_port, []), "/health") == (503, '{"status": "no encoder"}')


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.usefixtures("answers")
def test_a_killed_encoder_is_started_again(service: Service) -> None:
    """Whether it dies idle or at work."""
    (encoder,) = children(service.process.pid)
    os.kill(encoder, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{encoder}").exists() or "Z" in Path(f"/proc/{encoder}/stat").read_text())
    with http_client(service) as embed:
        assert embed(["水稻"]).shape == (1, 16)
    (successor,) = children(service.process.pid)
    assert successor != encoder


def test_an_encoder_that_cannot_be_started_again(serving_server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is broken until the next texts, which start it where that works by then."""
    others = children(os.getpid())
    encoder = EncoderProcess(EncoderOptions(str(serving_server), "cpu", "fp32", 1, None, 4))
    (process,) = {*children(os.getpid())}.difference(others)
    os.kill(process, signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(encoder_process, "Pipe", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        for _ in range(2):
            with pytest.raises(EncoderStopped, match=r"can't be started again: .*Too many open files.*raise the limit"):
                encoder.encode(["水稻"])
            assert encoder.broken
    assert encoder.encode(["水稻"]).shape == (1, 16) and not encoder.broken
    encoder.close()


def test_sigterm_answers_what_is_in_flight_and_leaves_no_process(serving_server: Path) -> None:
    """Clients that go on get right answers, then errors; no answer is wrong or cut off."""
    exported = load_exported(serving_server)
    texts = TITLES[:64]
    expected = encode_texts(exported.encoder.embed, texts, exported.tokenizer, 32)
    with running_service(serving_server, "--threads", "1") as service:
        processes = [service.process.pid, *children(service.process.pid)]
        assert len(processes) == 2
        signalled = threading.Event()
        counts = {"before": 0, "after": 0}

        def work(way: str) -> None:
            with CLIENTS[way](service) as embed:
                while True:
                    in_time = not signalled.is_set()
                    try:
                        vectors = embed(texts)
                    except (ServiceError, grpc.RpcError, OSError) as error:
                        # Before the signal, there is nothing but answers.
                        assert not in_time or signalled.is_set(), error
                        if isinstance(error, ServiceError):
                            assert error.number == STOPPING
                        return
                    np.testing.assert_allclose(vectors, expected, atol=TOLERANCE, rtol=0)
                    counts["after" if signalled.is_set() else "before"] += 1

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work, way) for way in ("rpc", "http", "rpc", "http")]
            until(lambda: counts["before"] >= 8)
            signalled.set()
            service.process.send_signal(signal.SIGTERM)
            for future in futures:
                future.result()
        assert service.process.wait(60) == 0
        assert counts["after"] >= 1
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


def test_a_killed_service_leaves_no_process(serving_server: Path) -> None:
    """Even without a chance to clean up."""
    with running_service(serving_server, "--threads", "1") as service:
        processes = children(service.process.pid)
        service.process.kill()
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


def refusal(*options: str | Path) -> str:
    """The line with which the service refuses to start."""
    done = run_script(ROOT / "deploy/python/web_service.py", *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    return done.stderr


def test_models_that_cannot_be_served(serving_server: Path, tmp_path: Path) -> None:
    """A missing folder, and a half-written one: a line that says what to do, and nothing runs on."""
    assert "export_model.py" in refusal("--model_dir", tmp_path / "missing", "--rpc_port", "0", "--http_port", "0")
    for file in serving_server.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "inference.get_pooled_embedding.pdiparams"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=rf"{weights.name}.*export_model\.py"):
        EncoderProcess(EncoderOptions(str(tmp_path), "cpu", "fp32", 1, None, 4))


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["web_service.py", "--rpc_port", "0", "--http_port", "0"], "paddle_serving_server"),
        (["web_service.py", "--rpc_port", "0", "--http_port", "0"], "prometheus_client"),
        (["web_service.py", "--rpc_port", "0", "--http_port", "0"], "tornado"),
        (["rpc_client.py"], "paddle_serving_server"),
        (["rpc_client.py"], "prometheus_client"),
    ],
)
def test_missing_packages(tmp_path: Path, command: list[str], package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT / "deploy/python",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    reason = f"(No module named {package})"
    assert done.stderr == f"error: Paddle Serving isn't installed {reason}; run sh scripts/setup.sh --serving\n"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("which", ["rpc_port", "http_port"])
def test_a_port_in_use(service: Service, fake_service: PipelineService, which: str) -> None:
    """Said before the model is loaded, and where another program takes the port in between."""
    port = getattr(service, which)
    ports = {"rpc_port": 0, "http_port": 0, which: port}
    line = refusal(*(str(word) for name, number in ports.items() for word in (f"--{name}", number)))
    assert f"--{which} {port}" in line and "name another" in line
    with pytest.raises(InputError, match=f"{which} {port}"):
        fake_service.listen(HOST, port) if which == "rpc_port" else HttpGateway(fake_service, HOST, port, 1)


def test_settings_come_from_options_then_the_environment_then_the_file(tmp_path: Path) -> None:
    config = ROOT / "deploy/python/config_nlp.yml"
    settings = read_settings({"rpc_port": 1}, {"SERVING_RPC_PORT": "2", "SERVING_HTTP_PORT": "3"}, config)
    assert (settings["rpc_port"], settings["http_port"], settings["host"]) == (1, 3, "127.0.0.1")
    assert Path(settings["model_dir"]).resolve() == ROOT / "serving_server"
    assert read_settings({}, {"SERVING_MODEL_DIR": "here"}, config)["model_dir"] == "here"
    assert [read_settings({}, {"SERVING_MAX_SEQ_LENGTH": n}, config)["max_seq_length"] for n in "03"] == [0, 3]
    for environment, message in [
        ({"SERVING_RPC_PORT": "x"}, "SERVING_RPC_PORT"),
        ({"SERVING_HTTP_PORT": "70000"}, "SERVING_HTTP_PORT"),
        ({"SERVING_DEVICE": "tpu"}, "SERVING_DEVICE: tpu is none of cpu, gpu"),
        ({"SERVING_MAX_WAITING_TEXTS": "1"}, "--max_queued_texts"),
        ({"SERVING_MAX_BYTES": str(2**31)}, "SERVING_MAX_BYTES: 2147483648 is out of range"),
        ({"SERVING_BATCH_WAIT_MS": str(10**13)}, "SERVING_BATCH_WAIT_MS: 10000000000000 is out of range"),
        ({"SERVING_THREADS": str(2**31)}, "SERVING_THREADS: 2147483648 is out of range"),
        ({"SERVING_MAX_SEQ_LENGTH": "2"}, "SERVING_MAX_SEQ_LENGTH: 2 is out of range: give 3 or more"),
    ]:
        with pytest.raises(InputError, match=message):
            read_settings({}, environment, config)
    changed = tmp_path / "config.yml"
    for text, message in [
        ("a: [\nb: c", "line 2: isn't YAML"),
        ("a: 2026-13-45", "isn't YAML"),
        ("[" * 3000, "isn't YAML"),
        ("", "op.ernie.local_service_conf.model_config"),
        (config.read_text().replace("rpc_port: 8080", "rpc_port: yes"), "rpc_port"),
        (config.read_text().replace("batch_size: 32", "batch_size: 0"), "op.ernie.batch_size"),
        (config.read_text().replace("max_seq_length: 0", "max_seq_length: 1"), "max_seq_length: 1 is out of range"),
    ]:
        changed.write_text(text)
        with pytest.raises(InputError, match=message):
            read_settings({}, {}, changed)


def test_many_rpc_connections_leave_room_for_http(serving_server: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    with contextlib.ExitStack() as opened, running_service(serving_server, "--threads", "1") as service:
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (600, most))
        for _ in range(700):
            connection = opened.enter_context(socket.create_connection((HOST, service.rpc_port), timeout=10))
            connection.sendall(preface)
        until(lambda: get(service, "/health")[0] == 200)


def test_no_descriptors_left(serving_server: Path) -> None:
    """New connections wait, those that are open go on."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running_service(serving_server, "--threads", "1") as service, http_client(service) as embed:
        assert embed(["水稻"]).shape == (1, 16)
        used = len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
        with socket.create_connection((HOST, service.http_port), timeout=30) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            connection.settimeout(1)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            assert embed(["水稻"]).shape == (1, 16)
            resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, limits)
            connection.settimeout(30)
            assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_metrics_leave_another_service_s_folder_alone(tmp_path: Path) -> None:
    """That of Prometheus for several processes, even where it isn't there."""
    code = "from serving.limits import Admission; from serving.metrics import Metrics; Metrics(Admission(1)).text()"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "none")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_a_signal_ends_a_start_that_hangs(serving_server: Path) -> None:
    options = ["--model_dir", serving_server, "--rpc_port", "0", "--http_port", "0"]
    command = [sys.executable, ROOT / "deploy/python/web_service.py", *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until(lambda: bool(encoders(process.pid)))
        (encoder,) = encoders(process.pid)
        os.kill(encoder, signal.SIGSTOP)
        try:
            process.terminate()
            assert process.wait(10) == 128 + signal.SIGTERM
        finally:
            process.kill()
            os.kill(encoder, signal.SIGKILL)


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", "a..é"])
def test_a_host_that_is_not_this_machine_is_named(host: str) -> None:
    with pytest.raises(InputError, match=f"^--host {host}: can't listen .*; give an address of this machine$"):
        check_ports({"host": host, "rpc_port": 0, "http_port": 0})


# ---------------------------------------------------------------------------------------------------------------------
# The documents' commands


def test_the_client_prints_what_the_document_shows(service: Service) -> None:
    done = run_script(ROOT / "deploy/python/rpc_client.py", "--endpoint", f"{HOST}:{service.rpc_port}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("{'0': '国有企业引入非国有资本对创新绩效的影响") and lines[0].endswith("文化对比'}")
    assert [line.split(" time:")[0] for line in lines[1:3]] == [
        "PipelineClient::predict pack_data",
        "PipelineClient::predict before",
    ]
    assert lines[3:5] == ["['output_embedding']", "(2, 16)"]
    assert lines[5].startswith("[[")


def test_the_client_says_what_is_wrong(service: Service) -> None:
    client, texts = ROOT / "deploy/python/rpc_client.py", ["--text", "水稻"] * 65
    refused = run_script(client, "--endpoint", f"{HOST}:{service.rpc_port}", *texts)
    answered = f"error: {HOST}:{service.rpc_port} answered: 65 texts: send at most 64 in a request\n"
    assert (refused.returncode, refused.stderr) == (2, answered)
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        endpoint = f"{HOST}:{unused.getsockname()[1]}"
        silent = run_script(ROOT / "deploy/python/rpc_client.py", "--endpoint", endpoint)
    assert silent.returncode == 2 and "web_service.py" in silent.stderr and len(silent.stderr.splitlines()) == 1
