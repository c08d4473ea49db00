"""Searching an index together for several requests, and taking another version of it into service."""

import gc
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from retrieval import hybrid_search, saved_index
from retrieval.hybrid_search import MODES
from retrieval.saved_index import load_index
from service_helpers import DOCUMENTS, MODEL, text_vectors, until, write_index
from serving import search
from serving.limits import BAD_REQUEST, Admission, RequestError
from serving.metrics import Metrics
from serving.search import Hits, SearchIndex
from serving.search_batching import SearchBatcher

OTHERS = [f"另{row}" for row in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of an index."""
    return tmp_path / "index"


def found(hits: Hits) -> list[list[str]]:
    """The documents of each query."""
    return [[hits.documents[row] for row in rows] for rows in hits.found.ids]


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_hits_are_those_of_an_index(folder: Path, ann: str) -> None:
    """Whether or not other queries are searched for at the same time, with other numbers of hits."""
    write_index(folder, DOCUMENTS, ann)
    index = SearchIndex(folder, MODEL, "fp32")
    batcher = SearchBatcher(index, Metrics(Admission(100), index))
    queries = text_vectors([f"查{row}" for row in range(40)])

    def work(number: int) -> None:
        rows, top_k = slice(number, number + 1 + number % 3), 1 + number % 4
        hits = batcher.search(queries[rows], top_k)
        ids, scores = saved_index.load_index(folder).index.search(queries[rows], top_k)
        np.testing.assert_array_equal(hits.found.ids, ids)
        np.testing.assert_allclose(hits.found.scores, scores, atol=1e-6)
        assert hits.state == index.state == (index.state.version, 50, MODEL[:12], ["vector"])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(37)))
    batcher.stop()


@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_modes_are_those_of_recall(folder: Path, mode: str | None) -> None:
    """The default is both ways if the index has words; queries of several modes may wait together."""
    write_index(folder, DOCUMENTS, has_words=True)
    index = SearchIndex(folder, MODEL, "fp32")
    batcher = SearchBatcher(index, Metrics(Admission(100), index))
    texts = [DOCUMENTS[3], DOCUMENTS[7] + DOCUMENTS[8], "没有"]
    expected = hybrid_search.search(load_index(folder), texts, text_vectors(texts), 4, mode or "hybrid")

    def work(other: str | None) -> Hits:
        return batcher.search(text_vectors(texts), 4, texts, other)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, [mode, "vector", mode, "lexical", mode]))
    for hits in answers[::2]:
        assert hits.mode == (mode or hits.state.modes[-1]) and hits.state.modes == list(MODES)
        for ours, theirs in zip(hits.found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert (answers[1].mode, answers[3].mode) == ("vector", "lexical")
    batcher.stop()


@pytest.mark.parametrize("mode", ["lexical", "hybrid"])
def test_a_mode_that_needs_words_is_refused_without_them(index: SearchIndex, mode: str) -> None:
    batcher = SearchBatcher(index, Metrics(Admission(100), index))
    with pytest.raises(RequestError, match="the index has no words: leave mode out") as refused:
        batcher.search(text_vectors(["文3"]), 2, ["文3"], mode)
    assert (refused.value.number, refused.value.param) == (BAD_REQUEST, "mode")
    assert batcher.search(text_vectors(["文3"]), 2, ["文3"], None).mode == "vector"
    batcher.stop()


def test_waiting_queries_are_searched_together(index: SearchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for the same number of hits, while another search is running."""
    calls, go = [], threading.Event()
    original = index.search

    def slow(queries: np.ndarray, top_k: int, *how: object) -> Hits:
        calls.append((len(queries), top_k))
        assert go.wait(30)
        return original(queries, top_k, *how)

    monkeypatch.setattr(index, "search", slow)
    metrics = Metrics(Admission(100), index)
    batcher = SearchBatcher(index, metrics)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(batcher.search, text_vectors(["文0"]), 1)
        until(lambda: len(calls) == 1)
        others = [
            pool.submit(batcher.search, text_vectors(texts), top_k)
            for texts, top_k in [(["文1", "文2"], 3), (["文3"], 2), (["文4"], 3)]
        ]
        until(lambda: batcher._jobs.qsize() == 3)
        go.set()
        assert found(first.result()) == [["文0"]]
        assert [[rows[0] for rows in found(other.result())] for other in others] == [["文1", "文2"], ["文3"], ["文4"]]
    assert calls[0] == (1, 1) and sorted(calls[1:]) == [(1, 2), (3, 3)]
    batcher.stop()
    values = dict(line.rsplit(" ", 1) for line in metrics.text().decode().splitlines() if line[0] != "#")
    assert float(values["semantic_index_searches_total"]) == 5
    assert float(values["semantic_index_search_candidates_total"]) == 1 + 2 * 3 + 2 + 3
    assert float(values["semantic_index_search_duration_seconds_count"]) == 3
    assert float(values["semantic_index_index_documents"]) == 50
    assert float(values[f'semantic_index_index_info{{version="{index.state.version}"}}']) == 1


def test_a_failing_search_is_an_error(index: SearchIndex, capsys: pytest.CaptureFixture[str]) -> None:
    """And the next one works."""
    batcher = SearchBatcher(index, Metrics(Admission(100), index))
    with pytest.raises(RequestError, match="the search failed: try again"):
        batcher.search(np.full((1, 8), np.nan, np.float32), 1)
    assert found(batcher.search(text_vectors(["文7"]), 1)) == [["文7"]]
    assert capsys.readouterr().err == "error: InputError in searching the index\n"
    batcher.stop()


def test_a_new_index_is_taken_into_service(
    folder: Path, index: SearchIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its documents and a version of its own; what was found before stays readable; the old index is freed."""
    before, version = index.search(text_vectors(["文3"]), 2), index.state.version
    old = weakref.ref(index._loaded._index.index)
    write_index(folder, OTHERS)
    index.reload()
    after = index.search(text_vectors(["另3"]), 2)
    assert found(before)[0][0] == "文3" and found(after)[0][0] == "另3"
    assert before.state == (version, 50, MODEL[:12], ["vector"]) and after.state == index.state
    assert index.state.documents == 20 and index.state.version != version
    gc.collect()
    assert old() is None
    assert capsys.readouterr().err == f"search: 20 documents, version {index.state.version}\n"


def test_the_same_index_is_not_read_again(folder: Path, index: SearchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it was written again."""
    monkeypatch.setattr(search, "load_with_version", None)
    write_index(folder, DOCUMENTS)
    index.reload()


def spoil(folder: Path, how: str) -> str:
    """Changes an index's folder; returns what the log says."""
    if how == "missing":
        shutil.rmtree(folder)
        return "isn't a saved index"
    if how == "another model":
        write_index(folder, OTHERS, model="another")
        return "another model"
    write_index(folder, OTHERS)
    if how == "changed":
        (folder / "documents.txt").write_text("x\n" * 20)
        return "isn't as it was written"
    (folder / "index.json").unlink()
    return "has no index.json"


@pytest.mark.parametrize("how", ["missing", "another model", "changed", "incomplete"])
def test_the_index_in_service_stays_if_the_new_one_is_broken(
    folder: Path, index: SearchIndex, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    """The log says why; after a repair the next reload takes it."""
    version = index.state.version
    reason = spoil(folder, how)
    with pytest.raises(RequestError, match="stays in service") as error:
        index.reload()
    assert index.problem == str(error.value) and str(folder) not in index.problem
    assert found(index.search(text_vectors(["文3"]), 1)) == [["文3"]] and index.state.version == version
    line = capsys.readouterr().err
    assert reason in line and f"version {version} of the index stays in service" in line and line.count("\n") == 1
    write_index(folder, OTHERS)
    index.reload()
    assert index.problem is None and found(index.search(text_vectors(["另3"]), 1)) == [["另3"]]


def test_a_reload_in_the_background_only_logs_an_error(
    folder: Path, index: SearchIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder, "changed")
    index.reload_in_background()
    until(lambda: index.problem is not None)
    assert "isn't as it was written" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["missing", "another model", "changed", "incomplete"])
@pytest.mark.usefixtures("index")
def test_a_broken_index_is_refused_at_the_start(folder: Path, how: str) -> None:
    reason = spoil(folder, how)
    with pytest.raises(InputError, match=reason):
        SearchIndex(folder, MODEL, "fp32")


def test_every_answer_is_of_the_version_that_it_names(folder: Path, index: SearchIndex) -> None:
    """While the index is replaced again and again."""
    versions = {index.state.version: DOCUMENTS}
    batcher, is_done = SearchBatcher(index, Metrics(Admission(100), index)), threading.Event()

    def work(seed: int) -> list[tuple[str, Hits]]:
        texts = np.random.default_rng(seed)
        answers = []
        while not is_done.is_set():
            query = str(texts.choice(DOCUMENTS))
            answers.append((query, batcher.search(text_vectors([query]), 3)))
        return answers

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, seed) for seed in range(4)]
        for number in range(10):
            write_index(folder, documents := DOCUMENTS[number:] + OTHERS[: 2 * number])
            index.reload()
            versions[index.state.version] = documents
        is_done.set()
        answers = [answer for future in futures for answer in future.result()]
    batcher.stop()
    assert (
        len(versions) == 10 and len({hits.state.version for _, hits in answers}) > 1
    )  # the first one is DOCUMENTS again
    for query, hits in answers:
        documents = versions[hits.state.version]
        scores = text_vectors(documents) @ text_vectors([query])[0]
        assert found(hits)[0] == [documents[row] for row in np.argsort(-scores)[:3]]


def test_a_writable_index_takes_and_deletes_documents(folder: Path) -> None:
    """Each change is a version; what is there isn't added again; another opening finds the changes."""
    write_index(folder, DOCUMENTS, has_words=True)
    index = SearchIndex(folder, MODEL, "fp32", writable=True)
    first = index.state
    with pytest.raises(InputError, match="another run is changing it"):
        SearchIndex(folder, MODEL, "fp32", writable=True)
    state, added = index.add(["新一", DOCUMENTS[3], "新一"], text_vectors(["新一", DOCUMENTS[3], "新一"]))
    assert (added.ids, added.is_new) == ([50, 3, 50], [True, False, False])
    assert state.version == f"{first.version}+1" and state.documents == 51
    assert found(index.search(text_vectors(["新一"]), 1)) == [["新一"]]
    assert found(index.search(text_vectors(["新一"]), 1, ["新一"], "lexical")) == [["新一"]]
    assert index.delete([50, 77], [DOCUMENTS[4], "没有"])[1] == 2
    assert index.state.documents == 49
    hits = index.search(text_vectors(["新一", DOCUMENTS[4]]), 49)
    assert not {"新一", DOCUMENTS[4], ""} & set(hits.documents.values())
    index.reload()
    assert index.state.documents == 49
    index.close()
    again = SearchIndex(folder, MODEL, "fp32")
    assert again.state.documents == 49 and "+" not in again.state.version
    for refused in (lambda: again.add(["a"], text_vectors(["a"])), lambda: again.delete([1])):
        with pytest.raises(RequestError, match="the service is read-only"):
            refused()


def test_a_writable_index_is_replaced_by_one_that_is_moved_into_place(folder: Path) -> None:
    write_index(folder, DOCUMENTS)
    index = SearchIndex(folder, MODEL, "fp32", writable=True)
    index.add(["新一"], text_vectors(["新一"]))
    write_index(folder.with_name("new"), OTHERS)
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)
    with pytest.raises(RequestError, match="couldn't be written"):
        index.add(["新二"], text_vectors(["新二"]))
    index.reload()
    assert index.state.documents == 20
    assert index.add(["新二"], text_vectors(["新二"]))[0].documents == 21
    index.close()
