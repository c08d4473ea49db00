"""Real search services over a real Milvus server: one collection, two services, and a server that goes away."""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import recall
from benchmarks.service_clients import HOST, Service, running_service
from encoding.encoder import load_encoder
from helpers import ROOT, all_pairs, refuses, run_script, write_pairs
from milvus_helpers import PASSWORD, Milvus, running_milvus
from service_helpers import as_json, get, post, until
from serving.adapter import METHOD, Request, Response
from serving.milvus_search import NO_ANSWER

pytestmark = [pytest.mark.server, pytest.mark.milvus]
TITLES = [title for _, title in all_pairs()]
QUERIES = [query for query, _ in all_pairs()][:20]
KEY = {"Authorization": "Bearer key"}


def build(checkpoint: Path, milvus: Milvus, corpus: Path, documents: Sequence[str], *options: str) -> None:
    """With recall.py."""
    write_pairs(corpus, [(document,) for document in documents])
    arguments = ["--params_path", checkpoint, "--device", "cpu", "--ann", "milvus", "--corpus_file", corpus]
    arguments += ["--recall_result_dir", corpus.parent / "results", *place_options(milvus)]
    assert recall.main([*map(str, arguments), *options]) == 0


def place_options(milvus: Milvus) -> list[str]:
    return ["--milvus_uri", milvus.uri, "--milvus_token_file", str(milvus.token_file)]


def search(service: Service, *queries: str) -> tuple[int, dict[str, Any]]:
    return post(service, as_json(query=queries, top_k=5), "/search", KEY)


def ask_rpc(service: Service, texts: Sequence[str]) -> np.ndarray:
    data = Request(key=map(str, range(len(texts))), value=texts).SerializeToString()
    with grpc.insecure_channel(f"{HOST}:{service.rpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(f"/{METHOD}/inference", response_deserializer=Response.FromString)
        return np.array(json.loads(call(data, timeout=30, metadata=[("authorization", "Bearer key")]).value[0]))


def health(service: Service) -> tuple[int, dict[str, Any]]:
    status, body = get(service, "/health")
    return status, json.loads(body)


def check_hits(checkpoint: Path, content: dict[str, Any]) -> None:
    """The most similar titles of each query, by comparing all."""
    encoder = load_encoder(checkpoint)
    cosines = encoder.encode(QUERIES, role="query") @ encoder.encode(TITLES, role="document").T
    for row, result in zip(cosines, content["results"], strict=True):
        assert [hit["score"] for hit in result["hits"]] == pytest.approx(np.sort(row)[:-6:-1], abs=1e-5)
        assert [row[TITLES.index(hit["document"])] for hit in result["hits"]] == pytest.approx(
            [hit["score"] for hit in result["hits"]], abs=1e-5
        )


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("key\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_services_over_one_collection(
    milvus_program: Path, checkpoint: Path, exported: Path, keys: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """Both answer with the same hits, take documents for each other, and outlive a rebuild and an outage."""
    milvus = stack.enter_context(
        running_milvus(milvus_program, tmp_path / "milvus", authorization=True, session_seconds=5)
    )
    build(checkpoint, milvus, tmp_path / "corpus.csv", TITLES)
    options = [*place_options(milvus), "--writable", "--api_key_file", str(keys), "--threads", "1"]
    first, second = (stack.enter_context(running_service(exported, *options)) for _ in range(2))
    for service in (first, second):
        status, content = search(service, *QUERIES)
        assert status == 200 and content["index"]["documents"] == len(TITLES)
        check_hits(checkpoint, content)
    vectors = ask_rpc(first, QUERIES[:2])  # Paddle Serving's protocol beside Milvus' client
    np.testing.assert_allclose(vectors, load_encoder(checkpoint).encode(QUERIES[:2]), atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        bodies = [(service, as_json(documents=["新的文档"])) for service in (first, second) * 2]
        added = list(pool.map(lambda each: post(*each, "/documents", KEY), bodies))
    assert {status for status, _ in added} == {200} and len(
        {content["documents"][0]["id"] for _, content in added}
    ) == 1
    for service in (first, second):
        until(lambda service=service: health(service)[1]["index"]["documents"] == len(TITLES) + 1)
    until(lambda: search(second, "新的文档")[1]["results"][0]["hits"][0]["document"] == "新的文档")
    version = search_during_rebuild(checkpoint, milvus, tmp_path, (first, second))
    assert version != content["index"]["version"]

    milvus.process.send_signal(signal.SIGSTOP)  # it hangs; then it refuses connections
    check_outage((first, second))
    milvus.kill()
    check_outage((first, second))
    port = int(milvus.uri.rsplit(":", 1)[1])
    stack.enter_context(
        running_milvus(milvus_program, tmp_path / "milvus", authorization=True, port=port, session_seconds=5)
    )
    check_return((first, second), version)
    for service in (first, second):
        told = "".join(service.log) + "".join(
            get(service, path)[1] for path in ("/health", "/openapi.json", "/metrics")
        )
        assert PASSWORD not in told
        assert "Traceback" not in told and "新的文档" not in told
        assert 1 <= sum("doesn't answer" in line for line in service.log) <= 3, "".join(service.log)  # not per request


def search_during_rebuild(checkpoint: Path, milvus: Milvus, folder: Path, services: Sequence[Service]) -> str:
    """Rebuilds the collection while clients search: nobody is refused, each answer is of one version; the new one."""
    answers: list[dict[str, Any]] = []
    is_done = threading.Event()

    def work(service: Service) -> None:
        while not is_done.is_set():
            status, content = search(service, QUERIES[0])
            assert status == 200, content
            answers.append(content)

    with ThreadPoolExecutor(2) as pool:
        working = [pool.submit(work, service) for service in services]
        try:
            build(checkpoint, milvus, folder / "half.csv", TITLES[:84], "--milvus_rebuild")
            for service in services:
                until(lambda service=service: health(service)[1]["index"]["documents"] == 84)
        finally:
            is_done.set()
        for each in working:
            each.result()
    version = health(services[0])[1]["index"]["version"]
    for answer in answers:
        if answer["index"]["version"] == version:
            assert {hit["document"] for hit in answer["results"][0]["hits"]} <= set(TITLES[:84])
    assert len({answer["index"]["version"] for answer in answers}) == 2
    return version


def check_outage(services: Sequence[Service]) -> None:
    """All searches get one message, which names no address; vectors are still computed."""
    for service in services:
        until(lambda service=service: search(service, QUERIES[0])[0] != 200)
        status, content = search(service, QUERIES[0])
        assert (status, content["error"]["message"]) == (503, NO_ANSWER)
        status, content = health(service)
        assert (status, content["status"], content["index"]["problem"]) == (503, "no index", NO_ANSWER)
        assert post(service, as_json(input=QUERIES[0]), "/v1/embeddings", KEY)[0] == 200


def check_return(services: Sequence[Service], version: str) -> None:
    for service in services:
        until(lambda service=service: health(service)[0] == 200)
        status, content = search(service, QUERIES[0])
        assert status == 200 and content["index"]["version"] == version and len(content["results"][0]["hits"]) == 5


def test_what_a_service_refuses_at_its_start(milvus: Milvus, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """A wrong password, no collection, one of another model, and a port where nothing listens: one line each."""
    build(
        checkpoint,
        milvus,
        tmp_path / "corpus.csv",
        TITLES[:20],
        "--milvus_collection",
        "short",
        "--max_seq_length",
        "9",
    )
    (tmp_path / "wrong").write_text("root:wrong password\n")
    for options, message in [
        ([*place_options(milvus)[:3], tmp_path / "wrong"], "refuses the user or the password"),
        ([*place_options(milvus), "--milvus_collection", "missing"], "has no complete collection missing"),
        ([*place_options(milvus), "--milvus_collection", "short"], "come from another model or --max_seq_length"),
        ([*place_options(milvus), "--max_top_k", "20000"], "Milvus finds up to 16384 documents"),
        (["--milvus_uri", "http://127.0.0.1:1"], "doesn't answer"),
    ]:
        command = [
            ROOT / "deploy/python/web_service.py",
            "--model_dir",
            exported,
            "--rpc_port",
            "0",
            "--http_port",
            "0",
        ]
        done = run_script(*command, *options)
        assert refuses(done, message), done.stderr
        assert "root:" not in done.stderr
