import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.service_clients import HOST
from common.errors import InputError
from service_helpers import LIMITS, SECRET, FakeEncoder, ask, until
from serving import adapter
from serving.adapter import PipelineService, ServiceOptions, embed_remotely
from serving.limits import OVERLOADED, STOPPING


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


def test_overload_over_rpc(encoder: FakeEncoder) -> None:
    """The client tells apart a busy service, too many texts, and no service."""
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


def test_a_port_that_another_program_took(fake_service: PipelineService) -> None:
    """After `check_ports` found it free."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--rpc_port {port}: can't listen on {HOST}:{port}; name another"):
            fake_service.listen(HOST, port)
