import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service_helpers import LIMITS, FakeEncoder, ask, until
from serving.adapter import PipelineService, Response, ServiceOptions
from serving.limits import INTERNAL_ERROR


def test_waiting_requests_are_computed_together(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    """The first one alone, then up to batch_size texts of those that arrived meanwhile; each gets its own vectors."""
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


def test_a_lone_client_never_waits(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    encoder.go.set()
    start = time.monotonic()
    for _ in range(20):
        assert ask(fake_service, "a").err_no == 0
    assert time.monotonic() - start < 20 * 0.2


def test_two_encoders_work_at_a_time() -> None:
    """A request doesn't wait for the batch before it if another encoder is free."""
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


def test_a_failing_encoder_fails_its_batch_alone(fake_service: PipelineService, encoder: FakeEncoder) -> None:
    encoder.go.set()
    response = ask(fake_service, "fail")
    assert response.err_no == INTERNAL_ERROR and response.err_msg == "the encoder failed: try again"
    assert ask(fake_service, "a").err_no == 0


def test_an_unforeseen_error_fails_its_batch_alone(
    fake_service: PipelineService, encoder: FakeEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoding thread continues."""
    encoder.go.set()
    answers: list[Response] = []
    threading.Thread(
        target=lambda: answers.extend(ask(fake_service, text) for text in ("crash", "a")), daemon=True
    ).start()
    until(lambda: len(answers) == 2)
    assert [answer.err_no for answer in answers] == [INTERNAL_ERROR, 0]
    assert capsys.readouterr().err == "error: ValueError in encoding a batch\n"
