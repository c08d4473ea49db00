import contextlib
import http.client
import json
import socket
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from benchmarks.service_clients import HOST, read_metrics, urlopen
from common.errors import InputError
from service_helpers import SECRET, FakeEncoder, as_json, ask, at, get, post, read_all, until
from serving import http_gateway
from serving.adapter import PipelineService
from serving.http_gateway import HttpGateway
from serving.http_routes import PREDICTION_PATH
from serving.limits import INTERNAL_ERROR, OVERLOADED

INNER = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"


def post_to(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and content, over a connection that stays open."""
    connection.request("POST", PREDICTION_PATH, body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_an_unforeseen_error_over_http(
    gateway: HttpGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gateway.service.metrics, "text", Mock(side_effect=ValueError(SECRET)))
    status, body = get(at(gateway), "/metrics")
    assert (status, json.loads(body)["err_no"]) == (500, INTERNAL_ERROR)
    assert capsys.readouterr().err == "error: ValueError in answering over HTTP\n"


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
    """Nor if a proxy may see the end of the body elsewhere."""
    with socket.create_connection((HOST, gateway.server_port), timeout=10) as connection:
        connection.sendall(f"{head}\r\nHost: a\r\n\r\n{body}".encode())
        answers = read_all(connection)  # one that stays open is closed as idle after a second
    assert answers.count(b"HTTP/1.1 ") == 1


def test_slow_clients_lose_their_connection(gateway: HttpGateway) -> None:
    """One that sends nothing, and those that send a byte of a head or body from time to time."""
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
    """Even if it hasn't been read yet when a new connection needs room."""
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
    """Until they are answered, or until their clients disconnect."""
    encoder.go.set()
    service, body = at(gateway), as_json(key=["0"], value=["a"])
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
    """An answer after the stop is its connection's last one; requests without an answer by then get none."""
    monkeypatch.setattr(http_gateway, "SENDING_SECONDS", 0.1)
    gateway = HttpGateway(fake_service, HOST, 0, requests=2, idle_timeout=60.0)
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
        with pytest.raises(ConnectionError):
            connection.getresponse()
        connection.close()


def test_idle_connections_make_room(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """The one that has been idle longest is closed for a new one; the others keep working."""
    encoder.go.set()
    connections = [http.client.HTTPConnection(HOST, gateway.server_port, timeout=10) for _ in range(8)]
    for connection in connections:
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status": "ok"}'
    connections[0].request("GET", "/health")
    with pytest.raises(ConnectionError):
        connections[0].getresponse()
    status, answer = post_to(connections[-1], as_json(key=["0"], value=["a"]))
    assert (status, answer["err_no"]) == (200, 0)
    for connection in connections:
        connection.close()


def test_more_connections_at_work_are_refused(gateway: HttpGateway) -> None:
    """At once, and accepted again after others have disconnected."""
    service = at(gateway)
    slow = [socket.create_connection((HOST, gateway.server_port)) for _ in range(6)]
    for connection in slow:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
    until(lambda: gateway.server.open == 6 and not gateway.server.idle)
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        get(service, "/health")
    for connection in slow:
        connection.close()
    until(lambda: gateway.server.open == 0)
    assert get(service, "/health")[0] == 200


def test_more_requests_are_refused_at_once(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """Over a connection that stays open; /health and /metrics still answer."""
    service = at(gateway)
    body = as_json(key=["0"], value=["a"])
    refused = http.client.HTTPConnection(HOST, gateway.server_port, timeout=10)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(post, service, body) for _ in range(2)]
        until(lambda: gateway.service.admission.requests == 2)
        status, answer = post_to(refused, body + b" " * 9000)
        assert (status, answer["err_no"], "try again later" in answer["err_msg"]) == (503, OVERLOADED, True)
        assert get(service, "/health")[0] == 200
        assert read_metrics(service)[f'semantic_index_errors_total{{err_no="{OVERLOADED}"}}'] == 1
        encoder.go.set()
        assert [future.result()[0] for future in waiting] == [200, 200]
    assert post_to(refused, body)[0] == 200
    refused.close()


def test_overload_over_http(gateway: HttpGateway, fake_service: PipelineService, encoder: FakeEncoder) -> None:
    """503 with Retry-After, which proxies and clients understand."""
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, fake_service, "a", "b", "c") for _ in range(2)]
        until(lambda: fake_service.admission.texts == 6)
        with pytest.raises(urllib.error.HTTPError) as error:
            urlopen(f"http://{HOST}:{gateway.server_port}{PREDICTION_PATH}", as_json(key=["0"], value=["d"]))
        assert error.value.code == 503 and error.value.headers["Retry-After"] == "1"
        assert json.loads(error.value.read())["err_no"] == OVERLOADED
        encoder.go.set()
        assert [future.result().err_no for future in waiting] == [0, 0]


def test_health_is_bad_where_no_encoder_can_be_started(gateway: HttpGateway, encoder: FakeEncoder) -> None:
    encoder.broken = True
    assert get(at(gateway), "/health") == (503, '{"status": "no encoder"}')


def test_a_port_that_another_program_took(fake_service: PipelineService) -> None:
    """After `check_ports` found it free."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--http_port {port}: can't listen on {HOST}:{port} .*; name another"):
            HttpGateway(fake_service, HOST, port, requests=1, idle_timeout=60.0)
