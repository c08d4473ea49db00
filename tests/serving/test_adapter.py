import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.service_clients import HOST
from common.errors import InputError
from service_helpers import LIMITS, SECRET, FakeEncoder, ask, until
from serving import adapter
from serving.adapter import PROXY_VARIABLES, PipelineService, ServiceOptions, embed_remotely, remedy_without_answer
from serving.limits import OVERLOADED, STOPPING

PING, GOAWAY = 6, 7  # types of HTTP/2's frames (RFC 9113)


def test_overload_is_an_error_at_once(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    """Above queued_texts, and only while those texts wait."""
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, fake_service, "a", "b", "c") for _ in range(2)]
        until(lambda: fake_service.admission.texts == 6)
        refused = ask(fake_service, "d")
        assert refused.err_no == OVERLOADED and "try again later" in refused.err_msg
        encoder.go.set()
        assert [future.result().err_no for future in futures] == [0, 0]
    assert ask(fake_service, "d").err_no == 0


def test_an_unforeseen_error_is_an_answer(
    fake_service: PipelineService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the client nor the log gets its message, which could contain texts."""

    def fail(*_: object) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(adapter, "check_texts", fail)
    assert ask(fake_service, "a").err_msg == "the service failed: try again"
    assert capsys.readouterr().err == "error: ValueError in answering a request\n"


def test_stopping_answers_what_is_there(encoder: FakeEncoder) -> None:
    """And rejects later requests."""
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


def test_a_busy_service_over_rpc(encoder: FakeEncoder) -> None:
    service = PipelineService([encoder], ServiceOptions(4, 0.0, 1, LIMITS))
    endpoint = f"{HOST}:{service.listen(HOST, 0)}"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(embed_remotely, endpoint, {"0": "a"})
        until(lambda: service.admission.requests == 1)
        with pytest.raises(InputError, match="the service is busy: try again later"):
            embed_remotely(endpoint, {"0": "b"})
        encoder.go.set()
        assert waiting.result().err_no == 0
    assert service.stop(30)


def test_too_many_texts_over_rpc(fake_service: PipelineService) -> None:
    endpoint = f"{HOST}:{fake_service.listen(HOST, 0)}"
    with pytest.raises(InputError, match="send fewer texts"):
        embed_remotely(endpoint, {"0": "a" * LIMITS.bytes})


def test_no_service_over_rpc(encoder: FakeEncoder) -> None:
    service = PipelineService([encoder], ServiceOptions(4, 0.0, 1, LIMITS))
    endpoint = f"{HOST}:{service.listen(HOST, 0)}"
    assert service.stop(30)
    with pytest.raises(InputError, match=r"start deploy/python/web_service\.py"):
        embed_remotely(endpoint, {"0": "a"})


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "127.1.2.3"])
def test_this_machine_is_called_without_a_proxy(
    encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch, variable: str, host: str
) -> None:
    monkeypatch.setenv(variable, f"http://{HOST}:1")  # where no proxy is
    service = PipelineService([encoder], ServiceOptions(4, 0.0, 1, LIMITS))
    encoder.go.set()
    assert embed_remotely(f"{host}:{service.listen('0.0.0.0', 0)}", {"0": "a"}).err_no == 0
    assert service.stop(30)


def test_a_service_on_an_ipv6_address(encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{HOST}:1")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    service = PipelineService([encoder], ServiceOptions(4, 0.0, 1, LIMITS))
    encoder.go.set()
    assert embed_remotely(f"[::1]:{service.listen('::1', 0)}", {"0": "a"}).err_no == 0
    assert service.stop(30)


@pytest.mark.parametrize(
    ("endpoint", "environment", "remedy"),
    [
        ("192.0.2.1:8080", {"http_proxy": f"http://{HOST}:1"}, "http_proxy is set: .* add 192.0.2.1 to no_proxy"),
        ("192.0.2.1:8080", {"grpc_proxy": f"http://{HOST}:1", "http_proxy": "x"}, "grpc_proxy is set"),
        ("[2001:db8::1]:8080", {"https_proxy": f"http://{HOST}:1"}, "https_proxy is set: .* add 2001:db8::1 to"),
        (f"{HOST}:1", {"http_proxy": f"http://{HOST}:1"}, r"start deploy/python/web_service\.py"),
        (f"{HOST}:1", {}, r"start deploy/python/web_service\.py"),
        ("8080", {}, "isn't host:port"),
        ("127.0.0.1", {}, "isn't host:port"),
        ("http://127.0.0.1:8080", {}, "isn't host:port"),
        ("::1:8080", {}, r"isn't host:port, such as 127\.0\.0\.1:8080 or \[::1\]:8080"),
        (f"{HOST}:99999", {}, "isn't host:port"),
    ],
)
def test_why_a_service_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, environment: dict[str, str], remedy: str
) -> None:
    for name in (*PROXY_VARIABLES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"^--endpoint .*{remedy}"):
        embed_remotely(endpoint, {"0": "a"})


def test_a_proxy_that_is_not_used_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{HOST}:1")
    for variable, is_named in (("192.0.2.2", True), ("192.0.2.1", False), ("*", False)):
        monkeypatch.setenv("no_proxy", variable)
        assert ("_proxy is set" in remedy_without_answer("192.0.2.1")) == is_named


def test_clients_that_ping_keep_their_connections(
    fake_service: PipelineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go's and Java's may do so every 10 s, where gRPC's servers by default end connections."""
    monkeypatch.setattr(adapter, "MIN_PING_MS", 50)
    preface, settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", struct.pack(">HBBBI", 0, 0, 4, 0, 0)
    with socket.create_connection((HOST, fake_service.listen(HOST, 0)), timeout=30) as connection:
        connection.sendall(preface + settings)
        answers = connection.makefile("rb")
        acknowledged = 0
        while acknowledged < 5:
            time.sleep(0.1)
            connection.sendall(struct.pack(">HBBBI", 0, 8, PING, 0, 0) + bytes(8))
            kind = None
            while kind != PING:
                high, low, kind, _, _ = struct.unpack(">HBBBI", answers.read(9))
                answers.read((high << 8) + low)
                assert kind != GOAWAY
            acknowledged += 1


def test_a_port_that_another_program_took(fake_service: PipelineService) -> None:
    """After `check_ports` found it free."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--rpc_port {port}: can't listen on {HOST}:{port}; name another"):
            fake_service.listen(HOST, port)
