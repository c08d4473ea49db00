"""The collection in Milvus that a service searches: here Milvus Lite, in this process."""

import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

from ann_util import IndexOptions
from common.errors import InputError
from retrieval import milvus_index
from retrieval.milvus_collection import CollectionInfo, document_id
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_place import EMBEDDED_FOLDER, MilvusPlace
from retrieval.milvus_server import MilvusServer
from service_helpers import (
    DOCUMENTS,
    MODEL,
    SECRET,
    as_json,
    at,
    get,
    post,
    running_search_gateway,
    text_vectors,
    until,
)
from serving import milvus_search
from serving.limits import BAD_REQUEST, NO_SEARCH, Admission, RequestError
from serving.metrics import Metrics
from serving.milvus_search import NO_ANSWER, NOT_USABLE, MilvusSearch
from serving.search import Hits
from serving.search_batching import SearchBatcher

pytestmark = pytest.mark.milvus
OTHERS = [f"另{row}" for row in range(20)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[MilvusPlace]:
    """An embedded Milvus with a collection of DOCUMENTS."""
    server = MilvusServer(str(tmp_path / EMBEDDED_FOLDER))
    place = MilvusPlace(server, "texts")
    build(place, DOCUMENTS)
    from milvus_lite.server_manager import server_manager_instance  # noqa: TID251 - `build` has connected

    yield place
    server_manager_instance.release_server(server.uri)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def index(place: MilvusPlace, opened: ExitStack) -> MilvusSearch:
    return serve(place, opened)


def build(place: MilvusPlace, documents: Sequence[str], model: str = MODEL, index_type: str = "FLAT") -> str:
    """Builds a collection of the documents' `text_vectors`, to which the alias moves; its name."""
    info = CollectionInfo(model, f"corpus of {documents[0]}", "fp32", True, 8, index_type)
    built = MilvusIndex.create(place.server, place.collection, info, IndexOptions(), len(documents))
    built.add(text_vectors(documents), documents)
    built.finish(documents)
    built.publish(place.collection)
    return built.name


def serve(place: MilvusPlace, opened: ExitStack, writable: bool = False) -> MilvusSearch:
    index = MilvusSearch(place, MODEL, "fp32", writable=writable)
    opened.callback(index.close)
    return index


def found(hits: Hits) -> list[list[str]]:
    """The documents of each query."""
    return [[hits.documents[row] for row in rows if row >= 0] for rows in hits.found.ids.tolist()]


def no_answer(*_: object, **__: object) -> None:
    """What gRPC raises for a server that is gone."""

    class Gone(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

    raise Gone(SECRET)


def test_hits_are_the_most_similar_documents(place: MilvusPlace, index: MilvusSearch) -> None:
    """With their texts, for queries of several requests; ids are those of the texts."""
    batcher = SearchBatcher(index, Metrics(Admission(100), index))
    queries = [f"查{row}" for row in range(12)]

    def work(number: int) -> None:
        texts, top_k = queries[number : number + 1 + number % 3], 1 + number % 4
        hits = batcher.search(text_vectors(texts), top_k)
        cosines = text_vectors(texts) @ text_vectors(DOCUMENTS).T
        best = np.argsort(-cosines)[:, :top_k]
        assert found(hits) == [[DOCUMENTS[row] for row in rows] for rows in best]
        np.testing.assert_allclose(hits.found.scores, np.take_along_axis(cosines, best, 1), atol=1e-5)
        assert hits.found.ids.tolist() == [[document_id(DOCUMENTS[row]) for row in rows] for rows in best]
        assert (hits.state, hits.mode) == (index.state, "vector")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    batcher.stop()
    assert index.state == (place.open().name, 50, MODEL[:12], ["vector"])
    assert str(index) == f"50 documents, version {index.state.version}"


def test_fewer_documents_than_top_k(index: MilvusSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing hits have the id -1, also where an answer holds the hits of a few queries alone."""
    monkeypatch.setattr(milvus_index, "ANSWER_HITS", 130)
    hits = index.search(text_vectors(["文3", "文4", "文5"]), 60)
    assert (hits.found.ids >= 0).sum(axis=1).tolist() == [50, 50, 50]
    assert [texts[0] for texts in found(hits)] == ["文3", "文4", "文5"]
    assert sorted(found(hits)[2]) == sorted(DOCUMENTS)


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
def test_a_mode_that_needs_words_is_refused(index: MilvusSearch, mode: str) -> None:
    with pytest.raises(RequestError, match="has no words: leave mode out") as refused:
        index.search(text_vectors(["文3"]), 2, ["文3"], mode)
    assert (refused.value.number, refused.value.param) == (BAD_REQUEST, "mode")
    assert index.search(text_vectors(["文3"]), 2, ["文3"], None).mode == "vector"


def test_the_start_refuses_what_it_cannot_search(place: MilvusPlace) -> None:
    with pytest.raises(InputError, match="come from another model"):
        MilvusSearch(place, "another", "fp32")
    with pytest.raises(InputError, match="has no complete collection other"):
        MilvusSearch(place._replace(collection="other"), MODEL, "fp32")


def test_a_rebuilt_collection_is_taken_into_service(
    place: MilvusPlace, index: MilvusSearch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By /reload, by the thread that looks after it, and by a search that finds the one before dropped."""
    first = index.state
    build(place, OTHERS)
    hits = index.search(text_vectors(["另3"]), 1)  # the collection of `first` is gone
    assert found(hits) == [["另3"]] and hits.state == index.state
    assert hits.state.documents == 20 and hits.state.version != first.version
    build(place, DOCUMENTS)
    index.reload()
    assert index.state == first
    build(place, OTHERS)
    index._wake.set()
    until(lambda: index.state.documents == 20)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("search:")] == [
        f"search: {hits.state.documents} documents, version {hits.state.version}",
        f"search: 50 documents, version {first.version}",
        f"search: 20 documents, version {hits.state.version}",
    ]


def test_the_thread_looks_by_itself(place: MilvusPlace, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milvus_search, "WATCH_SECONDS", 0.05)
    index = serve(place, opened)
    build(place, OTHERS)
    until(lambda: index.state.documents == 20)


def test_settings_that_others_changed_are_read(place: MilvusPlace, opened: ExitStack) -> None:
    build(place, OTHERS, index_type="HNSW")
    index, other = serve(place, opened), place.open()
    other.ef = 77
    other.save_settings()
    index.reload()
    assert index._collection.index.ef == 77


def test_every_answer_is_of_the_collection_that_it_names(place: MilvusPlace, index: MilvusSearch) -> None:
    """While the alias moves and the collection before is dropped, again and again; nothing is refused."""
    names = {index.state.version: DOCUMENTS}
    is_done = threading.Event()

    def work(seed: int) -> list[Hits]:
        texts = np.random.default_rng(seed)
        answers = []
        while not is_done.is_set():
            answers.append(index.search(text_vectors([str(texts.choice(DOCUMENTS))]), 3))
        return answers

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work, seed) for seed in range(2)]
        try:
            for number in range(1, 7):
                documents = DOCUMENTS[number:] + OTHERS[:number]
                names[build(place, documents)] = documents
        finally:
            is_done.set()
        answers = [answer for future in futures for answer in future.result()]
    assert len({hits.state.version for hits in answers}) > 2
    for hits in answers:
        assert hits.state.documents == 50 and set(found(hits)[0]) <= set(names[hits.state.version])


def test_a_collection_that_is_dropped_and_comes_back(
    place: MilvusPlace, index: MilvusSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says so; searches are refused until there is one again."""
    client = place.open()._client
    client.drop_alias(place.collection)
    client.drop_collection(index.state.version)
    for _ in range(2):
        with pytest.raises(RequestError, match=NOT_USABLE) as refused:
            index.search(text_vectors(["文3"]), 1)
        assert refused.value.number == NO_SEARCH
    assert index.problem == NOT_USABLE and not index.is_searchable
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "has no complete collection texts" in lines[0]
    build(place, OTHERS, model="another")
    with pytest.raises(RequestError, match=NOT_USABLE):
        index.reload()
    assert "come from another model" in capsys.readouterr().err
    build(place, OTHERS)
    index.reload()
    assert found(index.search(text_vectors(["另3"]), 1)) == [["另3"]] and index.problem is None


def test_a_server_that_goes_away_and_comes_back(
    index: MilvusSearch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTP: 503 with one message, and again 200 without a restart; the log says it once."""
    with running_search_gateway(index) as gateway:
        service = at(gateway)
        with monkeypatch.context() as gone:
            gone.setattr("pymilvus.MilvusClient.search", no_answer)
            gone.setattr("pymilvus.MilvusClient.describe_alias", no_answer)
            gone.setattr("pymilvus.MilvusClient.close", lambda _: None)
            for _ in range(3):
                status, content = post(service, as_json(query=SECRET), "/search")
                assert (status, content["error"]["message"]) == (503, NO_ANSWER)
            status, text = get(service, "/health")
            assert status == 503 and '"status": "no index"' in text and NO_ANSWER in text
            assert post(service, b"", "/reload")[0] == 503
            assert f'semantic_index_errors_total{{err_no="{NO_SEARCH}"}} 4.0' in get(service, "/metrics")[1]
        index._wake.set()
        until(lambda: get(service, "/health")[0] == 200)
        assert post(service, as_json(query="文3"), "/search")[0] == 200
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and SECRET not in "".join(lines)
    assert re.search(r"Milvus at .*: doesn't answer", lines[0]) and lines[1] == f"search: {index}"


def test_a_search_that_fails_once(place: MilvusPlace, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread finds that Milvus answers, without waiting for its turn."""
    monkeypatch.setattr(milvus_search, "WATCH_SECONDS", 3600.0)
    index = serve(place, opened)
    with monkeypatch.context() as gone:
        gone.setattr("pymilvus.MilvusClient.search", no_answer)
        with pytest.raises(RequestError, match=NO_ANSWER):
            index.search(text_vectors(["文3"]), 1)
        until(lambda: index.is_searchable)
    assert found(index.search(text_vectors(["文3"]), 1)) == [["文3"]]


def test_documents_are_added_and_deleted(place: MilvusPlace, opened: ExitStack) -> None:
    """By one of two services, for both; what is there isn't added again, by its `text_key`."""
    index, other = serve(place, opened, writable=True), serve(place, opened)
    texts = ["新One", DOCUMENTS[3], "新one", "新二"]
    state, added = index.add(texts, text_vectors(texts))
    assert added.is_new == [True, False, False, True]
    assert added.ids == [document_id(text) for text in texts] and added.ids[0] == added.ids[2]
    assert state == index.state == (other.state.version, 52, MODEL[:12], ["vector"])
    assert (
        found(index.search(text_vectors(["新One"]), 1))
        == found(other.search(text_vectors(["新One"]), 1))
        == [["新One"]]
    )
    assert index.add(["新二"], text_vectors(["新二"]))[1].is_new == [False]
    state, deleted = index.delete([added.ids[0], 77], ["新ONE", DOCUMENTS[4], "没有"])
    assert deleted == 2 and state.documents == 50
    assert not {"新One", DOCUMENTS[4]} & set(found(index.search(text_vectors(["新One"]), 50))[0])
    other.reload()
    assert other.state.documents == 50
    for refused in (lambda: other.add(["a"], text_vectors(["a"])), lambda: other.delete([1])):
        with pytest.raises(RequestError, match="the service is read-only"):
            refused()


def test_a_document_that_is_too_long_is_refused(place: MilvusPlace, opened: ExitStack) -> None:
    index = serve(place, opened, writable=True)
    with pytest.raises(RequestError, match=r"^document 1 has more than 65535 bytes") as refused:
        index.add(["文", long := "文" * 30_000], text_vectors(["文", long]))
    assert refused.value.number == BAD_REQUEST and index.state.documents == 50


def test_a_change_goes_to_the_collection_that_the_alias_names_now(
    place: MilvusPlace, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the one before is there."""
    monkeypatch.setattr(milvus_search, "WATCH_SECONDS", 3600.0)
    index = serve(place, opened, writable=True)
    with monkeypatch.context() as kept:
        kept.setattr("pymilvus.MilvusClient.drop_collection", lambda *_, **__: None)
        name = build(place, OTHERS)
    state, _ = index.add(["新一"], text_vectors(["新一"]))
    assert state == (name, 21, MODEL[:12], ["vector"])


def test_a_change_that_fails_is_not_acknowledged(
    place: MilvusPlace, opened: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = serve(place, opened, writable=True)
    with monkeypatch.context() as gone:
        gone.setattr("pymilvus.MilvusClient.upsert", no_answer)
        with pytest.raises(RequestError, match=NO_ANSWER):
            index.add(["新一"], text_vectors(["新一"]))
    until(lambda: index.is_searchable)
    assert index.add(["新一"], text_vectors(["新一"]))[1].is_new == [True]


def test_ids_over_http_have_63_bits(place: MilvusPlace, opened: ExitStack) -> None:
    """A hit's id deletes its document, and so does its text."""
    index = serve(place, opened, writable=True)
    with running_search_gateway(index) as gateway:
        service = at(gateway)
        _, content = post(service, as_json(query=DOCUMENTS[3], top_k=20), "/search")
        assert content["index"] == index.state._asdict() and content["mode"] == "vector"
        hits = content["results"][0]["hits"]
        assert {hit["id"] for hit in hits} == {document_id(hit["document"]) for hit in hits}
        assert max(hit["id"] for hit in hits) > 2**53
        state, deleted = gateway.service.delete([hits[0]["id"]], [hits[1]["document"]])
        assert deleted == 2 and state.documents == 48
