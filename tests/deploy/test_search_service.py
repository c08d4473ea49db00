"""A real search service over an index that recall.py wrote: its hits, OpenAI's client, keys, and new indexes."""

import base64
import contextlib
import ctypes
import http.client
import itertools
import json
import re
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import openai
import pytest

import recall
from benchmarks.service_clients import HOST, Service, read_metrics, running_service
from common.errors import InputError
from encoding.encoder import load_encoder
from helpers import ROOT, all_pairs, refuses, run_script, write_pairs
from retrieval.saved_index import index_version, load_index
from service_helpers import as_json, get, post, until
from serving.adapter import METHOD, Request, Response

pytestmark = pytest.mark.server
TITLES = [title for _, title in all_pairs()]
QUERIES = [query for query, _ in all_pairs()][:40]
SWAPS = 20


def build_index(checkpoint: Path, folder: Path, documents: Sequence[str], *options: str) -> None:
    """With recall.py."""
    corpus = write_pairs(folder.with_suffix(".csv"), [(document,) for document in documents])
    arguments = ["--params_path", str(checkpoint), "--device", "cpu", "--corpus_file", str(corpus), "--ann", "exact"]
    assert recall.main([*arguments, "--index_dir", str(folder), *options]) == 0


@pytest.fixture(scope="module")
def index_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "index"
    build_index(checkpoint, folder, TITLES)
    return folder


@pytest.fixture(scope="module")
def service(exported: Path, index_dir: Path) -> Iterator[Service]:
    """One for the tests that don't change its index."""
    with running_service(exported, "--index_dir", str(index_dir), "--threads", "1") as service:
        yield service
    assert service.process.returncode == 0
    log = "".join(service.log)
    assert f"/, {len(TITLES)} documents, version {index_version(index_dir)}" in service.log[0]
    assert "Traceback" not in log and "水稻" not in log


@pytest.fixture(scope="module")
def expected(checkpoint: Path, index_dir: Path) -> dict[str, list[tuple[str, float]]]:
    """The hits of each query, as recall.py finds them."""
    vectors = load_encoder(checkpoint).encode(QUERIES, role="query")
    saved = load_index(index_dir)
    rows, cosines = saved.index.search(vectors, 5)
    return {
        query: [(saved.documents[row], cosine) for row, cosine in zip(*hits, strict=True)]
        for query, *hits in zip(QUERIES, rows.tolist(), cosines.tolist(), strict=True)
    }


def check_hits(hits: Sequence[dict[str, Any]], expected: Sequence[tuple[str, float]]) -> None:
    """Documents whose cosines differ by rounding alone may change places."""
    assert [hit["score"] for hit in hits] == pytest.approx([cosine for _, cosine in expected], abs=1e-5)
    assert {TITLES[hit["id"]] for hit in hits} == {hit["document"] for hit in hits}
    assert hits[0]["document"] == expected[0][0] or hits[0]["score"] == pytest.approx(hits[1]["score"], abs=1e-5)


def test_hits_are_those_of_recall_py(
    service: Service, index_dir: Path, expected: dict[str, list[tuple[str, float]]]
) -> None:
    """One query, all queries in one request, and in the query string."""
    model = load_index(index_dir).model[:12]
    index = {"version": index_version(index_dir), "documents": len(TITLES), "model": model, "modes": ["vector"]}
    status, content = post(service, as_json(query=QUERIES, top_k=5), "/search")
    assert (status, content["index"], len(content["results"])) == (200, index, len(QUERIES))
    for query, result in zip(QUERIES, content["results"], strict=True):
        check_hits(result["hits"], expected[query])
    for query in QUERIES[:3]:
        _, body = get(service, f"/search?q={quote(query)}&top_k=5")
        check_hits(json.loads(body)["results"][0]["hits"], expected[query])
    assert json.loads(get(service, "/health")[1]) == {"status": "ok", "index": index}


def test_clients_are_encoded_together_and_get_their_own_hits(
    service: Service, expected: dict[str, list[tuple[str, float]]]
) -> None:
    def work(number: int) -> None:
        for query in QUERIES[number % 5 :: 5]:
            _, content = post(service, as_json(query=query, top_k=5), "/search")
            check_hits(content["results"][0]["hits"], expected[query])

    before = read_metrics(service)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    after = read_metrics(service)
    changed = {name: after[name] - before.get(name, 0) for name in after}
    assert changed["semantic_index_searches_total"] == 16 * 8
    assert changed["semantic_index_search_candidates_total"] == 16 * 8 * 5
    assert changed["semantic_index_batch_duration_seconds_count"] < 16 * 8 / 2
    assert changed['semantic_index_requests_total{protocol="http"}'] == 16 * 8


def test_a_search_that_asks_for_more_than_there_is(service: Service) -> None:
    _, content = post(service, as_json(query="水稻", top_k=1000), "/search")
    hits = content["results"][0]["hits"]
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert sorted(hit["document"] for hit in hits) == sorted(TITLES)


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's client


def openai_client(service: Service, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{HOST}:{service.http_port}/v1", api_key=key, max_retries=0)


@pytest.mark.parametrize("encoding_format", ["float", "base64", openai.omit])
def test_openais_client_gets_the_models_vectors(service: Service, checkpoint: Path, encoding_format: Any) -> None:
    client, vectors = openai_client(service), load_encoder(checkpoint).encode(QUERIES[:3])
    answer = client.embeddings.create(input=QUERIES[:3], model="ernie", encoding_format=encoding_format)
    embeddings = [data.embedding for data in answer.data]
    if encoding_format == "base64":  # the client decodes it only if it chose it
        embeddings = [np.frombuffer(base64.b64decode(text), "<f4") for text in embeddings]
    np.testing.assert_allclose(embeddings, vectors, atol=1e-5)
    assert [data.index for data in answer.data] == [0, 1, 2] and answer.model == "ernie"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6
    single = client.embeddings.create(input=QUERIES[0], model="ernie", extra_body={"input_type": "query"})
    np.testing.assert_allclose(single.data[0].embedding, vectors[0], atol=1e-5)
    assert [model.id for model in client.models.list()] == ["ernie"]


def test_openais_client_understands_the_errors(service: Service) -> None:
    client = openai_client(service)
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(input="水稻", model="text-embedding-3-small")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="the model's vectors have 16 dimensions") as bad:
        client.embeddings.create(input="水稻", model="ernie", dimensions=8)
    assert (bad.value.type, bad.value.param) == ("invalid_request_error", "dimensions")


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_a_service_with_keys(exported: Path, index_dir: Path, tmp_path: Path) -> None:
    """It may listen on all addresses; over gRPC, the key is the metadata `authorization`."""
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    keys.chmod(stat.S_IRUSR)
    options = ["--index_dir", index_dir, "--api_key_file", keys, "--host", "0.0.0.0", "--threads", "1"]
    with running_service(exported, *map(str, options)) as service:
        assert get(service, "/health")[0] == 200 and get(service, "/search?q=a")[0] == 401
        assert post(service, as_json(query="水稻"), "/search", {"Authorization": "Bearer second"})[0] == 200
        assert len(openai_client(service, "first").embeddings.create(input="水稻", model="ernie").data) == 1
        with pytest.raises(openai.AuthenticationError) as refused:
            openai_client(service, "third").embeddings.create(input="水稻", model="ernie")
        assert refused.value.code == "invalid_api_key"
        data = Request(key=["0"], value=["水稻"]).SerializeToString()
        with grpc.insecure_channel(f"{HOST}:{service.rpc_port}", [("grpc.enable_http_proxy", 0)]) as channel:
            call = channel.unary_unary(f"/{METHOD}/inference", response_deserializer=Response.FromString)
            assert call(data, timeout=30, metadata=[("authorization", "Bearer first")]).err_no == 0
            for metadata in ([], [("authorization", "Bearer third")]):
                with pytest.raises(grpc.RpcError) as error:
                    call(data, timeout=30, metadata=metadata)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        client = run_script(ROOT / "deploy/python/rpc_client.py", "--endpoint", f"{HOST}:{service.rpc_port}")
        assert refuses(client, "UNAUTHENTICATED", "call the service over HTTP")
    assert "first" not in "".join(service.log) and "note:" not in "".join(service.log)


def refusal(*options: str | Path) -> str:
    """The one line of a service that doesn't start."""
    done = run_script(ROOT / "deploy/python/web_service.py", "--rpc_port", "0", "--http_port", "0", *options)
    assert refuses(done, "error: "), done.stderr
    return done.stderr


def test_other_machines_search_with_a_key_alone(exported: Path, index_dir: Path) -> None:
    """Without an index, the service opens as before, and a line says what that means."""
    line = refusal("--model_dir", exported, "--index_dir", index_dir, "--host", "0.0.0.0")
    assert "--host 0.0.0.0: other machines could search" in line and "give --api_key_file" in line
    with running_service(exported, "--host", "0.0.0.0", "--threads", "1") as service:
        assert get(service, "/health")[0] == 200
    assert "note: --host 0.0.0.0: other machines may call without a key" in service.log[0]


# ---------------------------------------------------------------------------------------------------------------------
# Indexes that don't fit, and new ones


def test_indexes_that_cannot_be_searched(exported: Path, checkpoint: Path, index_dir: Path, tmp_path: Path) -> None:
    serve = ["--model_dir", exported, "--index_dir"]
    assert "isn't a saved index" in refusal(*serve, tmp_path / "missing")
    assert "texts that are cut to 24 tokens" in refusal(*serve, index_dir, "--max_seq_length", "16")
    build_index(checkpoint, tmp_path / "short", TITLES, "--max_seq_length", "16")
    assert "from another model or --max_seq_length" in refusal(*serve, tmp_path / "short")


@pytest.mark.parametrize("way", ["/reload", "SIGHUP"])
def test_every_answer_is_of_the_version_that_it_names(
    exported: Path, checkpoint: Path, tmp_path: Path, way: str
) -> None:
    """While new indexes, built elsewhere, are moved into place; none of 4 clients is refused or waits."""
    corpora = [TITLES, TITLES[:84], TITLES[84:]]
    places = [tmp_path / f"built_{number}" for number in range(len(corpora))]
    for place, documents in zip(places, corpora, strict=True):
        build_index(checkpoint, place, documents)
    documents_of = {index_version(place): documents for place, documents in zip(places, corpora, strict=True)}
    current = tmp_path / "index"
    places[0].rename(current)
    answers: list[dict[str, Any]] = []
    is_done = threading.Event()
    with running_service(exported, "--index_dir", str(current), "--threads", "1") as service:

        def search(number: int) -> None:
            for query in itertools.islice(itertools.cycle(QUERIES), number, None):
                if is_done.is_set():
                    return
                status, content = post(service, as_json(query=query, top_k=3), "/search")
                assert status == 200, content
                answers.append(content)

        with ThreadPoolExecutor(4) as pool:
            searches = [pool.submit(search, number) for number in range(4)]
            try:
                for number in range(1, SWAPS + 1):
                    swap(current, places, number)
                    take_into_service(service, way, index_version(current))
                    count = len(answers)
                    until(lambda count=count: len(answers) > count or any(search.done() for search in searches))
            finally:
                is_done.set()
            for finished in searches:
                finished.result()
        swap(current, places, SWAPS + 1)
        (current / "documents.txt").write_text("x\n")
        if way == "SIGHUP":
            service.process.send_signal(signal.SIGHUP)
            until(lambda: "problem" in json.loads(get(service, "/health")[1])["index"])
        else:
            assert post(service, b"", way)[0] == 500
        assert post(service, as_json(query="水稻"), "/search")[0] == 200
    assert len({answer["index"]["version"] for answer in answers}) == len(corpora)
    for answer in answers:
        documents = documents_of[answer["index"]["version"]]
        assert answer["index"]["documents"] == len(documents)
        assert all(documents[hit["id"]] == hit["document"] for hit in answer["results"][0]["hits"])
    assert "isn't as it was written" in "".join(service.log)


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGTERM], ids=["SIGHUP", "SIGTERM"])
def test_a_signal_is_heard_whichever_thread_gets_it(
    exported: Path, checkpoint: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    """The kernel may choose any thread that doesn't block the signal."""
    for name, documents in (("index", TITLES[:20]), ("newer", TITLES[20:50])):
        build_index(checkpoint, tmp_path / name, documents)
    newer = index_version(tmp_path / "newer")
    with running_service(exported, "--index_dir", str(tmp_path / "index"), "--threads", "1") as service:
        (tmp_path / "index").rename(tmp_path / "older")
        (tmp_path / "newer").rename(tmp_path / "index")
        send_to_another_thread(service.process.pid, sent)
        if sent == signal.SIGTERM:
            assert service.process.wait(30) == 0
        else:
            until(lambda: json.loads(get(service, "/health")[1])["index"]["version"] == newer)


def send_to_another_thread(pid: int, sent: signal.Signals) -> None:
    """Sends a signal to a thread of a process other than its main thread, one that doesn't block it."""
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        blocked = int(re.search(r"SigBlk:\s+(\w+)", status.read_text()).group(1), 16)
        if int(status.parent.name) != pid and not blocked >> (sent - 1) & 1:
            assert ctypes.CDLL(None).tgkill(pid, int(status.parent.name), int(sent)) == 0
            return
    raise AssertionError("all other threads block the signal")


def swap(current: Path, places: Sequence[Path], number: int) -> None:
    """Puts the index of another corpus in the place of the current one, which goes back to its own."""
    current.rename(places[(number - 1) % len(places)])
    places[number % len(places)].rename(current)


def take_into_service(service: Service, way: str, version: str) -> None:
    if way == "SIGHUP":
        service.process.send_signal(signal.SIGHUP)
        until(lambda: json.loads(get(service, "/health")[1])["index"]["version"] == version)
    else:
        status, content = post(service, b"", way)
        assert (status, content["index"]["version"]) == (200, version)


def test_a_kill_loses_no_document_that_was_acknowledged(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """Nor can recall.py change the index meanwhile."""
    build_index(checkpoint, tmp_path / "index", TITLES[:20])
    (tmp_path / "keys").write_text("key\n")
    (tmp_path / "keys").chmod(0o600)
    options = ["--index_dir", str(tmp_path / "index"), "--writable", "--api_key_file", str(tmp_path / "keys")]
    acknowledged = set(TITLES[:20])

    def add(service: Service, documents: Sequence[str]) -> None:
        """One by one, until the service is gone."""
        for document in documents:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if post(service, as_json(documents=document), "/documents", {"Authorization": "Bearer key"})[0] == 200:
                    acknowledged.add(document)

    for kill in range(3):
        expected = len(acknowledged) + 20
        with running_service(exported, *options, "--threads", "1") as service, ThreadPoolExecutor(4) as pool:
            documents = [f"论第{kill}次{row}号水稻" for row in range(400)]
            working = [pool.submit(add, service, documents[number::4]) for number in range(4)]
            until(lambda expected=expected: len(acknowledged) >= expected)
            if not kill:
                added = ["--add_corpus", str(write_pairs(tmp_path / "other.csv", [("别的",)]))]
                with pytest.raises(InputError, match="another run is changing it"):
                    recall.main(["--params_path", str(checkpoint), "--device", "cpu", *options[:2], *added])
            service.process.kill()
            for each in working:
                each.result()
        found = set(filter(None, load_index(tmp_path / "index").documents))
        assert acknowledged <= found
        assert len(found - acknowledged) <= 4  # those that were on disk when the kill came before their answers
        acknowledged.update(found)
