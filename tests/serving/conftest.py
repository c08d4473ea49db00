"""A Pipeline service in this process, with an encoder that the tests control."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.service_clients import HOST
from common.texts import QUERY
from helpers import small_tokenizer
from service_helpers import DOCUMENTS, LIMITS, MODEL, FakeEncoder, VectorEncoder, write_index
from serving import http_gateway
from serving.adapter import PipelineService, ServiceOptions
from serving.api_keys import ApiKeys
from serving.http_gateway import HttpGateway
from serving.search import SearchIndex


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def fake_service(encoder: FakeEncoder) -> Iterator[PipelineService]:
    """A service in this process."""
    service = PipelineService(
        [encoder], ServiceOptions(batch_size=4, max_queue_delay=0.2, rpc_threads=16, limits=LIMITS)
    )
    yield service
    encoder.go.set()
    assert service.stop(30)


@pytest.fixture
def index(tmp_path: Path) -> SearchIndex:
    """An exact index of DOCUMENTS."""
    write_index(tmp_path / "index", DOCUMENTS)
    return SearchIndex(tmp_path / "index", MODEL, "fp32")


@pytest.fixture
def search_gateway(index: SearchIndex, request: pytest.FixtureRequest) -> Iterator[HttpGateway]:
    """A service over HTTP with an index. A test's parameter: the keys and the origin of CORS."""
    keys, cors = getattr(request, "param", ((), ""))
    limits = LIMITS._replace(top_k=20)
    options = ServiceOptions(
        batch_size=4, max_queue_delay=0.0, rpc_threads=16, limits=limits, keys=ApiKeys(keys) if keys else None
    )
    tokenizer = small_tokenizer(24)
    tokenizer.prefixes = {QUERY: "问:"}
    service = PipelineService([VectorEncoder()], options, tokenizer, index)
    gateway = HttpGateway(service, HOST, 0, requests=8, idle_timeout=30.0, cors=cors)
    yield gateway
    assert service.stop(30)
    gateway.stop()


@pytest.fixture
def gateway(fake_service: PipelineService, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpGateway]:
    """The fake service over HTTP, with short timeouts, for two concurrent requests and six connections."""
    monkeypatch.setattr(http_gateway, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(http_gateway, "OTHER_CONNECTIONS", 4)
    gateway = HttpGateway(fake_service, HOST, 0, requests=2, idle_timeout=1.0)
    yield gateway
    gateway.stop()
