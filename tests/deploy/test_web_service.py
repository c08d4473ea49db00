"""A real Pipeline service: its vectors, its behaviour under load, and errors of clients and operators."""

import contextlib
import gzip
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
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

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
from data import encode_texts
from encoding.exported_model import load_exported
from helpers import ROOT, all_pairs, children, run_script
from service_helpers import SECRET, as_json, get, post, read_all, until
from serving import encoder_process
from serving.adapter import METHOD, Request, Response
from serving.limits import BAD_REQUEST, NO_SUCH_SERVICE, STOPPING

pytestmark = pytest.mark.server
TOLERANCE = 1e-5
TITLES = [title for _, title in all_pairs()]
TEXTS = [
    "水",
    "水稻的产量",
    "Deep Learning 2.0!",
    SECRET,
    "论水稻产量研究水稻,产量" * 20,  # longer than the model's 24 tokens
]
MAX_TEXTS, MAX_CHARACTERS = 64, 2000


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
    """After the test, the next request works."""
    yield
    for client in CLIENTS.values():
        with client(service) as embed:
            assert embed(["水稻"]).shape == (1, 16)
    assert get(service, "/health") == (200, '{"status": "ok"}')


def call(service: Service, data: bytes) -> Response:
    """The answer to the bytes of a gRPC request."""
    with grpc.insecure_channel(f"{HOST}:{service.rpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
        method = channel.unary_unary(f"/{METHOD}/inference", response_deserializer=Response.FromString)
        return method(data, timeout=30)


def encoders(process: int) -> list[int]:
    """Those of its children that run the encoder's program already; until then a child blocks its parent (vfork)."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children(process)}
    return [child for child, command in commands.items() if encoder_process.__name__.encode() in command]


def test_the_answer_keeps_the_originals_form(service: Service) -> None:
    """Over HTTP as Serving's gateway writes it; the value is JSON and, as in the original, a Python literal."""
    status, content = post(service, json.dumps({"key": ["1", "0"], "value": ["小麦", "水稻"]}).encode())
    assert status == 200
    assert list(content) == ["err_no", "err_msg", "key", "value", "tensors"]
    assert (content["err_no"], content["err_msg"], content["key"]) == (0, "", ["output_embedding"])
    with rpc_client(service) as embed:
        np.testing.assert_allclose(json.loads(content["value"][0]), embed(["水稻", "小麦"]), atol=TOLERANCE)


def test_every_answer_under_load_is_the_right_one(service: Service, serving_server: Path) -> None:
    """16 concurrent clients over both protocols, one to five texts per request; some are computed together."""
    exported = load_exported(serving_server)
    texts = [*TITLES, *TEXTS]
    expected = encode_texts(exported.embed, texts, exported.tokenizer, 32)

    def work(seed: int) -> int:
        order = random.Random(seed)
        with CLIENTS[order.choice(list(CLIENTS))](service) as embed:
            for _ in range(20):
                rows = order.sample(range(len(texts)), order.randint(1, 5))
                vectors = embed([texts[row] for row in rows])
                np.testing.assert_allclose(vectors, expected[rows], atol=TOLERANCE, rtol=0)
        return 20

    before = read_metrics(service)["semantic_index_batch_size_texts_count"]
    with ThreadPoolExecutor(16) as pool:
        calls = sum(pool.map(work, range(16)))
    assert calls == 320
    assert read_metrics(service)["semantic_index_batch_size_texts_count"] - before < 320 / 2


def test_metrics_count_what_happened(service: Service) -> None:
    before = read_metrics(service)
    with http_client(service) as http, rpc_client(service) as rpc:
        http(["水稻", "水稻产量" * 40, "龘靐"])
        rpc(["水稻"])
        with pytest.raises(ServiceError):
            rpc([""])
    after = read_metrics(service)
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert changed['semantic_index_requests_total{protocol="http"}'] == 1
    assert changed['semantic_index_requests_total{protocol="grpc"}'] == 2
    assert changed[f'semantic_index_errors_total{{err_no="{BAD_REQUEST}"}}'] == 1
    assert changed["semantic_index_request_duration_seconds_count"] == 3
    assert changed["semantic_index_batch_size_texts_count"] == 2
    assert changed["semantic_index_batch_size_texts_sum"] == 4
    assert changed['semantic_index_batch_size_texts_bucket{le="1.0"}'] == 1
    assert changed["semantic_index_cut_texts_total"] == changed["semantic_index_unknown_texts_total"] == 1
    assert after['semantic_index_queue_size{unit="texts"}'] == 0


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

BAD_BODIES = [
    (b"", 400, "the body is empty"),
    (b"{", 400, "isn't JSON at character 1"),
    (b'{"key": ["0"], "value": ["\xff\xfe"]}', 400, "isn't UTF-8"),
    (b"[" * 100_000 + b"]" * 100_000, 400, "nested too deeply"),
    (b'{"key": ["0"], "value": [NaN]}', 400, "isn't JSON"),
    (b'["0"]', 400, "isn't an object"),
    (b"{}", 400, "no texts"),
    (as_json(key=[], value=[]), 400, "no texts"),
    (as_json(key=["0"], value=[""]), 400, "text 0 is empty"),
    (as_json(key=["0", "1"], value=["水稻", " \n"]), 400, "text 1 is empty"),
    (as_json(key=["0"], value=["\u200b\ufeff"]), 400, "text 0 holds only invisible characters"),
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
    (as_json(key=["0"], value=["水稻"], tensors=[{"name": "0"}]), 400, "tensors aren't accepted"),
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
        (tensor.SerializeToString(), "tensors aren't accepted"),
    ]:
        response = call(service, data)
        assert response.err_no == BAD_REQUEST and message in response.err_msg and not response.value
    assert call(service, Request(name="other").SerializeToString()).err_no == NO_SUCH_SERVICE
    with pytest.raises(grpc.RpcError) as error:
        call(service, Request(key=["0"], value=["水" * 10_000_000]).SerializeToString())
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


class _Touch:
    """Unpickling it creates a file."""

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
    assert "tensors aren't accepted" in call(service, request.SerializeToString()).err_msg
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
        (b"POST /ernie/prediction HTTP/1.1\r\nTransfer-Encoding: gzip, chunked", b"400"),
        (b"POST /ernie/prediction HTTP/1.1\r\nHost: b", b"400"),
        (b"POST /ernie/prediction HTTP/1.1\r\nContent-Length: -1", b"400"),
        (b"POST /ernie/prediction HTTP/1.1\r\nContent-Length: " + b"9" * 5000, b"400"),
        (b"POST /other HTTP/1.1\r\nContent-Length: 0", b"404"),
        (b"DELETE /ernie/prediction HTTP/1.1", b"405"),
        (b"BREW /ernie/prediction HTTP/1.1", b"405"),
        (b"GET /other HTTP/1.1", b"404"),
        (b"nonsense", b"400"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1", b""),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_http_heads(service: Service, head: bytes, status: bytes) -> None:
    """One answer, in JSON, never HTML or what was sent; none to an endless head."""
    with socket.create_connection((HOST, service.http_port), timeout=30) as connection:
        connection.sendall(head + b"\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 " + status) if status else not answer
    if status:
        fields, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["err_msg"] and b"\r\nContent-Length: %d" % len(body) in fields


def test_a_head_without_a_host_is_told_so(service: Service) -> None:
    """As HAProxy's checks send it."""
    with socket.create_connection((HOST, service.http_port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"it needs a Host" in answer


@pytest.mark.usefixtures("answers")
def test_other_ways_to_send_a_request(service: Service) -> None:
    """In chunks, from HTTP/1.0, and in chunks that exceed the limit."""
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


GOOD = json.dumps({"key": ["0"], "value": ["水稻"]}, ensure_ascii=False).encode()
ASCII, BOM = as_json(key=["0"], value=["水稻"]), b"\xef\xbb\xbf"
GZIP = {"Content-Encoding": "gzip"}
H2C = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQBAAAAAAIAAAAA"}
WAYS = {  # headers and body of a request to PREDICTION_PATH, and status and words of the answer
    "a BOM": ({}, BOM + GOOD, 200, ""),
    "a BOM alone": ({}, BOM, 400, "isn't JSON"),
    "UTF-16": ({}, GOOD.decode().encode("utf-16"), 400, "isn't UTF-8"),
    "curl -d": ({"Content-Type": "application/x-www-form-urlencoded"}, GOOD, 200, ""),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, b"key=0&value=a", 400, "isn't JSON"),
    "upper case": ({"Content-Type": 'Application/JSON; Charset="UTF-8"'}, GOOD, 200, ""),
    "GBK": ({"Content-Type": "application/json; charset=gbk"}, GOOD.decode().encode("gbk"), 415, "send UTF-8"),
    "not as Latin-1": ({"Content-Type": "text/plain; charset=ISO-8859-1"}, GOOD, 415, "send UTF-8"),
    "ASCII as Latin-1": ({"Content-Type": "text/plain; charset=ISO-8859-1"}, ASCII, 200, ""),
    "gzip": (GZIP, gzip.compress(GOOD), 200, ""),
    "gzip with a BOM": (GZIP, gzip.compress(BOM + GOOD), 200, ""),
    "its old name": ({"Content-Encoding": "X-GZIP"}, gzip.compress(GOOD), 200, ""),
    "gzip in chunks": (GZIP, [gzip.compress(GOOD)[:9], gzip.compress(GOOD)[9:]], 200, ""),
    "no gzip": (GZIP, GOOD, 400, "the compressed body is damaged"),
    "half a gzip": (GZIP, gzip.compress(GOOD)[:-9], 400, "the compressed body is damaged"),
    "more than a gzip": (GZIP, gzip.compress(GOOD) + b"x", 400, "the compressed body is damaged"),
    "zlib as gzip": (GZIP, zlib.compress(GOOD), 400, "the compressed body is damaged"),
    "a gzip that blows up": (GZIP, gzip.compress(bytes(100_000_000)), 413, "at most 4194304 bytes"),
    "nothing in a gzip": (GZIP, gzip.compress(b""), 400, "the body is empty"),
    "deflate": ({"Content-Encoding": "deflate"}, zlib.compress(GOOD), 415, "has to be gzip, or nothing"),
    "gzip twice": ({"Content-Encoding": "gzip, gzip"}, gzip.compress(gzip.compress(GOOD)), 415, "has to be gzip"),
    "identity": ({"Content-Encoding": "identity"}, GOOD, 200, ""),
    "chunks": ({}, [GOOD[:20], GOOD[20:]], 200, ""),
    "Java's HttpClient": (H2C, GOOD, 200, ""),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_clients_send(service: Service, way: str) -> None:
    headers, body, status, words = WAYS[way]
    connection = http.client.HTTPConnection(HOST, service.http_port, timeout=30)
    connection.request("POST", "/ernie/prediction", body, headers, encode_chunked=isinstance(body, list))
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    assert (answer.status, words in content["err_msg"]) == (status, True), content
    assert bool(content["value"]) == (status == 200)


TARGETS = [  # method, target, body, status, and words of the body or of the header Allow
    ("POST", "/ernie/prediction?a=b", GOOD, 200, '"err_no": 0'),
    ("POST", "/ernie/prediction/", GOOD, 200, '"err_no": 0'),
    ("POST", "http://service:80/ernie/prediction", GOOD, 200, '"err_no": 0'),
    ("POST", "HTTPS://service/ernie/prediction?a", GOOD, 200, '"err_no": 0'),
    ("POST", "/prediction", GOOD, 404, "/ernie/prediction"),
    ("POST", "http://service", GOOD, 405, "GET, HEAD"),
    ("post", "/ernie/prediction", GOOD, 405, "POST"),
    ("PUT", "/ernie/prediction", GOOD, 405, "POST"),
    ("GET", "/ernie/prediction", None, 405, "POST"),
    ("OPTIONS", "/ernie/prediction", None, 405, "POST"),
    ("POST", "/health", b"", 405, "GET, HEAD"),
    ("GET", "/health/?a", None, 200, "ok"),
    ("GET", "http://service/health", None, 200, "ok"),
    ("HEAD", "/health", None, 200, ""),
    ("HEAD", "/metrics", None, 200, ""),
    ("HEAD", "/ernie/prediction", None, 405, "POST"),
    ("HEAD", "/other", None, 404, ""),
]


@pytest.mark.parametrize(("method", "target", "body", "status", "words"), TARGETS)
def test_where_clients_send_it(
    service: Service, method: str, target: str, body: bytes | None, status: int, words: str
) -> None:
    connection = http.client.HTTPConnection(HOST, service.http_port, timeout=30)
    for _ in range(2):  # the connection stays usable, or the answer says that it doesn't
        connection.request(method, target, body)
        answer = connection.getresponse()
        content = answer.read().decode()
        assert answer.status == status
        assert words in (answer.headers["Allow"] if status == 405 else content)
        names = ("err_msg", "error", "status")
        assert not content if method == "HEAD" else any(name in content for name in names)
    connection.close()


def test_clients_that_wait_before_they_send_a_body(service: Service) -> None:
    """As curl and .NET do with large ones; "100-continue" ignores case."""
    for spelling in ("100-continue", "100-Continue"):
        head = f"POST /ernie/prediction HTTP/1.1\r\nHost: a\r\nContent-Length: {len(GOOD)}\r\nExpect: {spelling}\r\n"
        with socket.create_connection((HOST, service.http_port), timeout=30) as connection:
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(GOOD)
            assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_idle_connections_stay_open_as_long_as_the_setting_says(serving_server: Path) -> None:
    with (
        running_service(serving_server, "--threads", "1", "--idle_timeout_s", "2") as service,
        socket.create_connection((HOST, service.http_port), timeout=30) as connection,
    ):
        for _ in range(2):
            time.sleep(1.2)  # together more than the setting
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert connection.recv(1000) == b""


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.usefixtures("answers")
def test_a_killed_encoder_is_started_again(service: Service) -> None:
    """Whether it dies while idle or while encoding."""
    (encoder,) = children(service.process.pid)
    os.kill(encoder, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{encoder}").exists() or "Z" in Path(f"/proc/{encoder}/stat").read_text())
    with http_client(service) as embed:
        assert embed(["水稻"]).shape == (1, 16)
    (successor,) = children(service.process.pid)
    assert successor != encoder


def test_sigterm_answers_what_is_in_flight_and_leaves_no_process(serving_server: Path) -> None:
    """Clients that continue get right answers, then errors; no answer is wrong or cut off."""
    exported = load_exported(serving_server)
    texts = TITLES[:64]
    expected = encode_texts(exported.embed, texts, exported.tokenizer, 32)
    with running_service(serving_server, "--threads", "1") as service:
        processes = [service.process.pid, *children(service.process.pid)]
        assert len(processes) == 2
        signalled = threading.Event()
        counts = {"before": 0, "after": 0}
        failures: list[tuple[bool, Exception]] = []  # whether it was before the signal, and what happened

        def work(way: str) -> None:
            with CLIENTS[way](service) as embed:
                while True:
                    in_time = not signalled.is_set()
                    try:
                        vectors = embed(texts)
                    except (ServiceError, grpc.RpcError, OSError) as error:
                        failures.append((in_time and not signalled.is_set(), error))
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
        assert not [error for is_early, error in failures if is_early]
        assert {error.number for _, error in failures if isinstance(error, ServiceError)} <= {STOPPING}
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


def test_a_killed_service_leaves_no_process(serving_server: Path) -> None:
    """Even without a chance to clean up."""
    with running_service(serving_server, "--threads", "1") as service:
        processes = children(service.process.pid)
        service.process.kill()
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


def refusal(*options: str | Path) -> str:
    """The error line of a service that doesn't start."""
    done = run_script(ROOT / "deploy/python/web_service.py", *options)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    return done.stderr


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    assert "export_model.py" in refusal("--model_dir", tmp_path / "missing", "--rpc_port", "0", "--http_port", "0")


WITHOUT_PACKAGES = [
    ("web_service.py", "paddle_serving_server"),
    ("web_service.py", "prometheus_client"),
    ("web_service.py", "tornado"),
    ("rpc_client.py", "paddle_serving_server"),
    ("rpc_client.py", "prometheus_client"),
]


@pytest.mark.parametrize(("script", "package"), WITHOUT_PACKAGES)
def test_missing_packages(serving_server: Path, tmp_path: Path, script: str, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    options = ["--model_dir", serving_server, "--rpc_port", "0", "--http_port", "0"]
    done = subprocess.run(
        [sys.executable, script, *(options if script == "web_service.py" else [])],
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
def test_a_port_in_use(service: Service, which: str) -> None:
    """Reported before the model is loaded."""
    port = getattr(service, which)
    ports = {"rpc_port": 0, "http_port": 0, which: port}
    line = refusal(*(str(word) for name, number in ports.items() for word in (f"--{name}", number)))
    assert f"--{which} {port}" in line and "name another" in line


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
    """New connections wait, open ones keep working."""
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
