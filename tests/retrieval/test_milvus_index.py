"""What Milvus has beside the contract of all indexes (test_index_contract.py): embedded, and on a real server."""

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ann_util import IndexOptions, build_index, recall_vs_exact
from common.errors import InputError
from helpers import unit_vectors
from milvus_helpers import Milvus
from retrieval import milvus_index
from retrieval.milvus_collection import CollectionInfo, build_parameters, document_id
from retrieval.milvus_index import MilvusIndex
from retrieval.milvus_server import CollectionMissing, MilvusServer, connect

pytestmark = pytest.mark.milvus

DIM = 16


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.server)])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> MilvusServer:
    if request.param == "embedded":
        return MilvusServer(str(tmp_path / "milvus.db"))
    milvus: Milvus = request.getfixturevalue("milvus")
    return MilvusServer(milvus.uri, token_file=str(milvus.token_file))


@pytest.fixture
def embedded(tmp_path: Path) -> MilvusServer:
    """For what doesn't depend on the server, each collection of which takes seconds."""
    return MilvusServer(str(tmp_path / "milvus.db"))


@pytest.fixture
def alias() -> str:
    """A name that no other test uses."""
    return f"test_{uuid.uuid4().hex[:12]}"


def texts(rows: int) -> list[str]:
    return [f"文档 {row}" for row in range(rows)]


def info_of(corpus: str = "c", **settings: Any) -> CollectionInfo:
    return CollectionInfo("m" * 64, corpus, "fp32", True, DIM, **settings)


def build(
    server: MilvusServer,
    alias: str,
    vectors: np.ndarray,
    documents: Sequence[str] | None = None,
    info: CollectionInfo | None = None,
    options: IndexOptions | None = None,
) -> MilvusIndex:
    documents = documents or texts(len(vectors))
    index = MilvusIndex.create(server, alias, info or info_of(), options or IndexOptions(), len(vectors))
    index.add(vectors, documents)
    index.finish(documents)
    index.publish(alias)
    return index


def rows_of(index: MilvusIndex, ids: np.ndarray) -> list[list[int]]:
    """The numbers in the documents with these ids."""
    return [[int(index.documents[each].split()[1]) for each in row] for row in ids.tolist()]


def test_searches_exactly_like_the_exact_index_and_tunes_its_ef(server: MilvusServer, alias: str) -> None:
    vectors, queries = unit_vectors(3000, DIM), unit_vectors(50, DIM, seed=1)
    build(server, alias, vectors, info=info_of(ef=1))
    index = MilvusIndex.open(server, alias)  # which has no vectors of its own
    ids, similarities = index.search_exactly(queries, 10)
    expected_ids, expected = build_index(IndexOptions("exact"), vectors).search(queries, 10)
    assert rows_of(index, ids) == expected_ids.tolist()
    np.testing.assert_allclose(similarities, expected, atol=1e-6)
    index.tune_ef(queries, 10, 0.99)
    assert recall_vs_exact(index.search(queries, 10)[1], expected) >= 0.99
    index.target_recall = 0.99
    index.save_settings()
    again = MilvusIndex.open(server, alias)
    assert (again.ef, again.target_recall) == (index.ef, 0.99) and again.ef >= 10


def test_k_above_the_corpus_gives_every_document(embedded: MilvusServer, alias: str) -> None:
    index = build(embedded, alias, unit_vectors(1500, DIM))
    ids, _ = index.search(unit_vectors(2, DIM, seed=1), 2000)
    assert [sorted(row) for row in rows_of(index, ids)] == [list(range(1500))] * 2
    with pytest.raises(InputError, match="16384"):
        MilvusIndex.open(embedded, alias)._search(unit_vectors(1, DIM), 20_000)


def test_deleted_documents_are_never_found_and_others_see_it(server: MilvusServer, alias: str) -> None:
    vectors = unit_vectors(200, DIM)
    index = build(server, alias, vectors)
    gone = index.ids_of(["文档 3", "文档 5"])
    assert index.delete([*gone, gone[0], 12345]) == 2
    assert not index.is_live(gone[0]) and index.is_live(document_id("文档 4"))
    assert index.live_count == len(index) == len(index.documents) == 198
    for each in (index, MilvusIndex.open(server, alias)):
        deadline = time.monotonic() + 10
        while each is not index and each.live_count != 198 and time.monotonic() < deadline:
            time.sleep(0.1)
        ids, _ = each.search(vectors[[3, 5]], 198)
        assert not {3, 5} & set(np.ravel(rows_of(each, ids)).tolist())
    assert index.delete(gone) == 0


def test_adding_again_adds_nothing_twice(server: MilvusServer, alias: str) -> None:
    vectors = unit_vectors(100, DIM)
    build(server, alias, vectors)
    other = MilvusIndex.open(server, alias)
    other.add(vectors, texts(100))
    more = unit_vectors(120, DIM, seed=3)
    other.add(more, texts(120))
    assert other.live_count == 120 and sorted(other.documents) == sorted(other.ids_of(texts(120)))
    assert other.texts([document_id("文档 110"), 7]) == {document_id("文档 110"): "文档 110"}
    ids, _ = other.search(more[110:], 1)
    assert rows_of(other, ids) == [[row] for row in range(110, 120)]


def test_documents_that_can_not_be_added_are_refused(embedded: MilvusServer, alias: str) -> None:
    index = build(embedded, alias, unit_vectors(10, DIM))
    with pytest.raises(InputError, match="1 documents and 2 vectors"):
        index.add(unit_vectors(2, DIM), texts(1))
    with pytest.raises(InputError, match=r"document 1 \(counted from 0\) has 66000 bytes"):
        index.add(unit_vectors(2, DIM, seed=9), ["short", "长" * 22_000])
    assert index.live_count == 10


def test_a_collection_is_searched_only_when_it_is_complete(server: MilvusServer, alias: str) -> None:
    with pytest.raises(CollectionMissing, match=f"no complete collection {alias}"):
        MilvusIndex.open(server, alias)
    first = build(server, alias, unit_vectors(100, DIM), info=info_of("first"))
    second = MilvusIndex.create(server, alias, info_of("second"), IndexOptions(), 200)
    second.add(unit_vectors(200, DIM, seed=1), texts(200))
    assert MilvusIndex.open(server, alias).name == first.name
    second.finish(texts(200))
    assert MilvusIndex.open(server, alias).name == first.name
    second.publish(alias)
    assert MilvusIndex.open(server, alias).name == second.name
    assert not connect(server).has_collection(first.name)  # its memory goes back
    again = MilvusIndex.create(server, alias, info_of("second"), IndexOptions(), 200)
    assert again.name != second.name  # a rebuild of the same corpus, too, is a collection of its own


def test_missing_documents_are_named_and_sent_again(
    embedded: MilvusServer, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_index, "RANGE_ROWS", 100)
    vectors, documents = unit_vectors(250, DIM), texts(250)
    index = MilvusIndex.create(embedded, alias, info_of(), IndexOptions(), 250)
    index.add(vectors, documents)
    index.finish(documents)
    index.delete(index.ids_of(documents[105:107]))
    with pytest.raises(InputError, match=r"has 248 of 250 documents; rows 100 to 199 lack some"):
        index.finish(documents)
    sent: list[int] = []
    again = MilvusIndex.create(embedded, alias, info_of(), IndexOptions(), 250)
    send = again._send
    monkeypatch.setattr(again, "_send", lambda ids, *rest: sent.append(len(ids)) or send(ids, *rest))
    again.add(vectors, documents)
    again.finish(documents)
    assert sent == [100]  # the range that lacked two, and no other
    build_more = [*documents, "another"]
    again.add(unit_vectors(1, DIM, seed=5), build_more[250:])
    with pytest.raises(InputError, match="has 251 of 250 documents; it has documents that aren't of this corpus"):
        again.finish(documents)


def test_batches_are_bounded_by_bytes_and_lose_nothing(
    embedded: MilvusServer, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_index, "BATCH_BYTES", 1000)
    documents = [f"文档 {row} {'长' * (row % 50) * 10}" for row in range(300)]
    index = build(embedded, alias, unit_vectors(300, DIM), documents)
    assert index.texts(index.ids_of(documents)) == dict(zip(index.ids_of(documents), documents, strict=True))
    sizes = [
        sum(len(text.encode()) + 4 * DIM + 8 for text in documents[part])
        for part in milvus_index._batches(documents, DIM)
    ]
    assert len(sizes) > 50 and sum(1 for size in sizes if size > 1000) <= sum(len(d.encode()) > 900 for d in documents)


def test_a_collection_of_others_is_refused(server: MilvusServer, alias: str) -> None:
    client = connect(server)
    client.create_collection(f"{alias}_x", dimension=DIM)
    client.create_alias(f"{alias}_x", alias)
    with pytest.raises(InputError, match=r"wasn't built by recall\.py"):
        MilvusIndex.open(server, alias)


@pytest.mark.parametrize("kind", ["FLAT", "IVF_SQ8"])
def test_index_types(server: MilvusServer, alias: str, kind: str) -> None:
    vectors, queries = unit_vectors(2000, DIM), unit_vectors(20, DIM, seed=1)
    index = build(server, alias, vectors, info=info_of(index_type=kind, ef=64))
    exact = build_index(IndexOptions("exact"), vectors).search(queries, 10)[1]
    similarities = index.search(queries, 10)[1]
    assert np.mean(similarities >= exact[:, -1:] - 0.02) > 0.9  # SQ8 rounds


@pytest.mark.parametrize(("m", "fits"), [(64, True), (2, False)])
def test_the_graph_has_the_links_of_the_options(embedded: MilvusServer, alias: str, m: int, fits: bool) -> None:
    """With 2 links a vector, a search misses what it finds with 64, and with the 16 of Milvus Lite itself."""
    vectors, queries = unit_vectors(2000, DIM), unit_vectors(100, DIM, seed=1)
    options = IndexOptions(hnsw_m=m, hnsw_ef=10)
    index = build(embedded, alias, vectors, info=info_of(ef=100), options=options)
    exact = build_index(IndexOptions("exact"), vectors).search(queries, 10)[1]
    assert (recall_vs_exact(index.search(queries, 10)[1], exact) > 0.97) is fits


@pytest.mark.server
def test_a_server_reads_the_options_of_the_graph(milvus: Milvus, alias: str) -> None:
    server = MilvusServer(milvus.uri, token_file=str(milvus.token_file))
    with pytest.raises(InputError, match=r"\(M out of range\); lower --hnsw_m"):
        build(server, alias, unit_vectors(10, DIM), options=IndexOptions(hnsw_m=100_000))


def test_an_index_type_that_a_version_lacks_is_refused(server: MilvusServer, alias: str) -> None:
    info = info_of(index_type="DISKANN" if server.is_embedded else "HNSW_SQ")
    with pytest.raises(InputError, match="lacks the index type; give another --milvus_index_type"):
        build(server, alias, unit_vectors(10, DIM), info=info)
    assert not connect(server).has_collection(f"{alias}_{info.fingerprint}")


@pytest.mark.server
def test_an_index_that_is_never_ready_is_an_error(milvus: Milvus, alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server in the wheel takes DISKANN, fails to build it, and tries again for ever."""
    monkeypatch.setattr(milvus_index, "STALLED_SECONDS", 3.0)
    server = MilvusServer(milvus.uri, token_file=str(milvus.token_file))
    with pytest.raises(InputError, match="doesn't get on with the index of"):
        build(server, alias, unit_vectors(1100, DIM), info=info_of(index_type="DISKANN"))
    client = connect(server)
    client.drop_collection(f"{alias}_{info_of(index_type='DISKANN').fingerprint}")


def test_documents_are_read_once_and_then_kept(
    embedded: MilvusServer, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build(embedded, alias, unit_vectors(20, DIM))
    ids, _ = index.search(unit_vectors(1, DIM), 5)
    with monkeypatch.context() as patch:
        patch.setattr(index, "texts", None)
        assert len({index.documents[each] for each in ids[0].tolist()}) == 5
    missing = document_id("not there")
    with pytest.raises(KeyError):
        index.documents[missing]
    monkeypatch.setattr(milvus_index, "CACHED_DOCUMENTS", 3)
    index.search(unit_vectors(1, DIM), 5)
    assert len(index.documents._found) == 3


def test_an_id_is_the_same_for_texts_that_the_tokenizer_can_not_tell_apart() -> None:
    assert document_id("Hello  World") == document_id("hello world") != document_id("hello", lowercase=True)
    assert document_id("Hello", lowercase=False) != document_id("hello", lowercase=False)
    assert 0 <= document_id("文档") < 1 << 63
    assert len({document_id(text) for text in texts(100_000)}) == 100_000


def test_build_parameters_follow_the_options_and_the_rows() -> None:
    options = IndexOptions(hnsw_m=48, hnsw_ef=200)
    assert build_parameters("HNSW", options, 10) == {"M": 48, "efConstruction": 200}
    assert build_parameters("HNSW_SQ", options, 10) == {"M": 48, "efConstruction": 200, "sq_type": "SQ8"}
    assert build_parameters("IVF_SQ8", options, 1_000_000) == {"nlist": 4000}
    assert build_parameters("IVF_FLAT", options, 10**12) == {"nlist": 65_536}
    assert build_parameters("FLAT", options, 10) == build_parameters("DISKANN", options, 10) == {}
