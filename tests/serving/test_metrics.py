import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.service_clients import read_metrics
from helpers import ROOT
from service_helpers import FakeEncoder, as_json, ask, at, get, post, until
from serving.adapter import PipelineService
from serving.http_gateway import HttpGateway
from serving.limits import BAD_REQUEST


def test_metrics_over_http(fake_service: PipelineService, gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """Their names, labels and values after a text over HTTP, two over gRPC, and a refused request."""
    encoder.go.set()
    assert post(at(gateway), as_json(key=["0"], value=["a"]))[0] == 200
    assert ask(fake_service, "a", "b").err_no == 0
    assert ask(fake_service, "").err_no == BAD_REQUEST
    status, text = get(at(gateway), "/metrics")
    assert status == 200
    assert dict(line.split()[2:] for line in text.splitlines() if line.startswith("# TYPE")) == {
        "semantic_index_requests_total": "counter",
        "semantic_index_errors_total": "counter",
        "semantic_index_queue_size": "gauge",
        "semantic_index_request_duration_seconds": "histogram",
        "semantic_index_cut_texts_total": "counter",
        "semantic_index_unknown_texts_total": "counter",
        "semantic_index_batch_size_texts": "histogram",
        "semantic_index_batch_duration_seconds": "histogram",
    }
    values = read_metrics(at(gateway))
    assert values['semantic_index_requests_total{protocol="http"}'] == 1
    assert values['semantic_index_requests_total{protocol="grpc"}'] == 2
    assert values[f'semantic_index_errors_total{{err_no="{BAD_REQUEST}"}}'] == 1
    assert values["semantic_index_request_duration_seconds_count"] == 3
    assert values["semantic_index_batch_size_texts_sum"] == 3
    assert values["semantic_index_batch_size_texts_count"] == values["semantic_index_batch_duration_seconds_count"] == 2
    assert values['semantic_index_batch_size_texts_bucket{le="1.0"}'] == 1


def test_the_queue_is_counted(fake_service: PipelineService, gateway: HttpGateway, encoder: FakeEncoder) -> None:
    """In requests and in texts, while they wait."""
    sizes = [f'semantic_index_queue_size{{unit="{unit}"}}' for unit in ("requests", "texts")]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, fake_service, "a", "b")
        until(lambda: fake_service.admission.requests == 1)
        during = read_metrics(at(gateway))
        encoder.go.set()
        assert waiting.result().err_no == 0
    after = read_metrics(at(gateway))
    assert [during[size] for size in sizes] == [1, 2]
    assert [after[size] for size in sizes] == [0, 0]


@pytest.mark.process
def test_metrics_do_not_use_the_folder_for_several_processes(tmp_path: Path) -> None:
    """Prometheus's folder for several processes, even if it doesn't exist."""
    code = "from serving.limits import Admission; from serving.metrics import Metrics; Metrics(Admission(1)).text()"
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "none")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
