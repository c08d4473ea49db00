"""An index that is changed while it is searched: against a dict, with kills, full disks, threads and other runs."""

import contextlib
import itertools
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ann_util import HnswIndex, IndexOptions, build_index
from common.errors import InputError
from common.texts import text_key
from helpers import ROOT, V1, file_size_limit, unit_vectors, write_pairs
from retrieval import live_index, saved_index
from retrieval.corpus import Corpus, read_corpus
from retrieval.documents import DocumentFinder, Documents
from retrieval.journal import JOURNAL_FILE
from retrieval.live_index import Added, LiveIndex
from retrieval.saved_index import (
    LocalDocumentIndex,
    index_version,
    load_index,
    load_with_version,
    locked_index,
    save_index,
)

DIM = 8


@pytest.fixture(params=["hnswlib", "exact"])
def ann(request: pytest.FixtureRequest) -> str:
    return request.param


def vectors_of(texts: list[str]) -> np.ndarray:
    """A unit vector for each text, which depends on its key alone."""
    seeds = [list(text_key(text).encode()) for text in texts]
    return np.concatenate([unit_vectors(1, DIM, seed=seed) for seed in seeds] or [np.empty((0, DIM), np.float32)])


def texts_from(start: int, count: int) -> list[str]:
    return [f"文献{row}" for row in range(start, start + count)]


def new_index(folder: Path, count: int = 20, ann: str = "hnswlib") -> Path:
    """A saved index of `texts_from(0, count)`, whose HNSW graph finds all that exact search does."""
    texts = texts_from(0, count)
    corpus = read_corpus(write_pairs(folder / "corpus.csv", [(text,) for text in texts]))
    index = build_index(IndexOptions(ann, hnsw_ef=500, target_recall=0), vectors_of(texts))
    save_index(folder / "index", LocalDocumentIndex(index, Documents(corpus), "model", corpus.sha256))
    return folder / "index"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Twin:
    """What an index should be: a dict from ids to texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = dict(enumerate(texts))
        self.size = len(texts)

    def add(self, texts: list[str]) -> Added:
        added = Added([], [])
        for text in texts:
            same = [row for row, known in self.texts.items() if text_key(known) == text_key(text)]
            added.is_new.append(not same)
            added.ids.append(same[0] if same else self.size)
            if not same:
                self.texts[self.size] = text
                self.size += 1
        return added

    def delete(self, ids: list[int]) -> int:
        return sum(self.texts.pop(row, None) is not None for row in dict.fromkeys(ids))

    def is_that_of(self, found: LocalDocumentIndex) -> bool:
        """Whether ids and documents are the same, and searches find what a sort of all finds."""
        documents = [self.texts.get(row, "") for row in range(self.size)]
        rows = np.array(list(self.texts), np.int64)
        assert list(found.documents) == documents
        assert found.index.live_ids().tolist() == rows.tolist() and len(found.index) == self.size
        if not len(rows):
            with pytest.raises(InputError, match="corpus is empty"):
                found.index.search(unit_vectors(1, DIM), 1)
            return True
        queries = unit_vectors(3, DIM, seed=self.size)
        similarities = queries @ vectors_of(list(self.texts.values())).T
        order = np.argsort(-similarities, axis=1)[:, :9]
        for ids, cosines in (found.index.search(queries, 9), found.index.search_exactly(queries, 9)):
            np.testing.assert_array_equal(ids, rows[order])
            np.testing.assert_allclose(cosines, np.take_along_axis(similarities, order, axis=1), atol=1e-6)
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Adding, deleting, opening again


@pytest.mark.usefixtures("fast_disk")
@pytest.mark.parametrize("seed", range(4))
def test_an_index_is_that_of_a_dict(tmp_path: Path, ann: str, seed: int) -> None:
    """After each of 60 random changes, in memory and for another reader; opened again, compacted and closed."""
    numbers = random.Random(seed)
    folder, twin = new_index(tmp_path, 20, ann), Twin(texts_from(0, 20))
    live = LiveIndex(folder)
    for _ in range(60):
        match numbers.choice(["add", "add", "add", "delete", "delete", "compact", "close", "abandon"]):
            case "add":
                texts = [f"{numbers.choice(['文献', '新', 'new', 'NEW '])}{numbers.randrange(60)}" for _ in range(5)]
                assert live.add(texts, vectors_of(texts)) == twin.add(texts)
            case "delete":
                ids = [numbers.randrange(-3, twin.size + 3) for _ in range(numbers.choice([1, 2, 9]))]
                assert live.delete(ids) == twin.delete(ids)
            case "compact":
                live.compact()
            case how:
                live.close(compact=how == "close")
                live = LiveIndex(folder)
        with live.reading() as document_index:
            assert twin.is_that_of(document_index)
        assert twin.is_that_of(load_index(folder))
    live.compact()
    with live.reading() as document_index:  # no longer in memory
        assert list(document_index.documents.saved) == list(document_index.documents)
    live.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.csv", "index"]


def test_what_is_there_is_not_added_again(tmp_path: Path) -> None:
    """Nor what is in the same call twice. What was deleted is."""
    with LiveIndex(new_index(tmp_path)) as live:
        texts = ["文献3", "新 A", "新A", "新 a", "新B"]
        assert live.add(texts, vectors_of(texts)) == Added([3, 20, 20, 20, 21], [False, True, False, False, True])
        assert live.find(["文 献3", "新a", "nichts", ""]) == [3, 20, None, None]
        size = (live.folder / JOURNAL_FILE).stat().st_size
        assert live.add(texts, vectors_of(texts)) == Added([3, 20, 20, 20, 21], [False] * 5)
        assert live.add([], vectors_of([])) == Added([], [])
        assert live.delete([]) == live.delete([99, -1]) == 0
        assert (live.folder / JOURNAL_FILE).stat().st_size == size
        assert live.delete([3, 20, 3]) == 2 and live.find(["文献3", "新A"]) == [None, None]
        assert live.add(["新A", "文献3"], vectors_of(["新A", "文献3"])) == Added([22, 23], [True, True])


def test_case_makes_a_difference_for_a_cased_model(tmp_path: Path) -> None:
    with LiveIndex(new_index(tmp_path), lowercase=False) as live:
        texts = ["新A", "新a", "新A"]
        assert live.add(texts, vectors_of(texts)).ids == [20, 21, 20]


def test_added_documents_are_kept_as_a_corpus_would_keep_them(tmp_path: Path) -> None:
    """Without white space and BOMs around them."""
    folder = new_index(tmp_path)
    for is_closed in (False, True):
        with LiveIndex(folder) as live:
            live.add([f" \ufeff新 {is_closed} \r"], vectors_of(["新"]))
            if not is_closed:
                assert load_index(folder).documents[20] == "新 False"
    assert list(load_index(folder).documents)[20:] == ["新 False", "新 True"]


@pytest.mark.parametrize(
    ("texts", "vectors", "message"),
    [
        (["新", "甲\n乙"], unit_vectors(2, DIM), r"document 1 \(counted from 0\): has more than one line"),
        ([" "], unit_vectors(1, DIM), r"document 0 \(counted from 0\): the line is empty"),
        (["新"], unit_vectors(2, DIM), "there are 1 documents and 2 vectors"),
        (["新"], unit_vectors(1, DIM + 1), r"the document vectors have the shape \(1, 9\), where \[rows, 8\]"),
        (["新"], np.zeros((1, DIM)), r"document vector 0 \(counted from 0\) has norm 0 instead of 1"),
        (["新"], np.full((1, DIM), np.nan), "document vector 0 .* norm nan"),
    ],
)
def test_what_can_t_be_added_is_refused_as_a_whole(
    tmp_path: Path, texts: list[str], vectors: np.ndarray, message: str
) -> None:
    folder = new_index(tmp_path)
    live = LiveIndex(folder)
    before = files(folder)
    with pytest.raises(InputError, match=f"^{message}"):
        live.add(texts, vectors)
    assert files(folder) == before
    assert Twin(texts_from(0, 20)).is_that_of(load_index(folder))


@pytest.mark.parametrize("ids", [["3"], [3.0], [None]])
def test_ids_are_whole_numbers(tmp_path: Path, ids: list) -> None:
    with LiveIndex(new_index(tmp_path)) as live, pytest.raises(TypeError):
        live.delete(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Folders: compacting, locks, replacement, faults


def test_a_closed_index_has_its_changes_in_its_files(tmp_path: Path, ann: str) -> None:
    """Deleted texts are nowhere any more, and without deletions, earlier versions read the folder."""
    folder = new_index(tmp_path, ann=ann)
    with LiveIndex(folder) as live:
        live.add(["机密"], vectors_of(["机密"]))
    assert all("机密".encode() in files(folder)[name] for name in ["documents.txt"])
    earlier = [line for line in (folder / "index.json").read_text().splitlines() if "deleted" in line]
    assert earlier == [] and len(Corpus(folder / "documents.txt")) == 21
    with LiveIndex(folder) as live:
        live.delete([5, 20])
        assert "机密".encode() in files(folder)["documents.txt"]
    for content in files(folder).values():
        assert "机密".encode() not in content and "文献5\n".encode() not in content
    with pytest.raises(InputError, match=r"documents\.txt:6: the line is empty"):
        Corpus(folder / "documents.txt")


def test_an_index_of_version_1_is_changed(tmp_path: Path, ann: str) -> None:
    folder = shutil.copytree(V1 / f"index_{ann}", tmp_path / "index")
    saved = load_index(folder)
    vectors = unit_vectors(1, saved.index.dim)
    with LiveIndex(folder, saved.model) as live:
        assert live.add(["新", saved.documents[3]], np.repeat(vectors, 2, axis=0)) == Added([48, 3], [True, False])
        assert live.delete([3, 4]) == 2
    changed = load_index(folder, saved.model)
    assert changed.index.search(vectors, 1)[0].tolist() == [[48]]
    assert list(changed.documents) == [
        "" if row in (3, 4) else text for row, text in enumerate([*saved.documents, "新"])
    ]


def test_a_model_or_corpus_that_the_index_doesn_t_fit_is_refused(tmp_path: Path) -> None:
    """And the index isn't locked then."""
    folder = new_index(tmp_path)
    other = read_corpus(write_pairs(tmp_path / "other.csv", [("别的",)]))
    for arguments in (["other"], ["model", other]):
        with pytest.raises(InputError, match=r"its vectors come from another model|was built from another corpus"):
            LiveIndex(folder, *arguments)
    LiveIndex(folder, "model").close()


@pytest.mark.usefixtures("fast_disk")
def test_a_journal_of_many_small_changes_is_read_in_large_ones(
    tmp_path: Path, ann: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_index(tmp_path, ann=ann)
    live, twin = LiveIndex(folder), Twin(texts_from(0, 20))
    for row in range(30):
        texts = texts_from(100 + row, 1)
        live.add(texts, vectors_of(texts))
        twin.add(texts)
        if row in (0, 1, 25):
            assert live.delete([row, 20 + row]) == twin.delete([row, 20 + row]) == 2
    live.close(compact=False)
    monkeypatch.setattr(saved_index, "HNSW_BLOCK", 10)
    added = []
    apply = saved_index.apply_change
    monkeypatch.setattr(saved_index, "apply_change", lambda *of: added.append(len(of[1].documents)) or apply(*of))
    assert twin.is_that_of(load_index(folder))
    assert added == [1, 1, 10, 10, 4, 4]


def test_after_an_error_an_index_is_closed_without_delay(tmp_path: Path) -> None:
    folder = new_index(tmp_path)
    live = LiveIndex(folder)
    live.add(["新"], vectors_of(["新"]))
    with pytest.raises(KeyError), live:
        raise KeyError
    assert "新".encode() not in files(folder)["documents.txt"]
    assert load_index(folder).documents[20] == "新"
    for change in (lambda: live.add(["b"], vectors_of(["b"])), lambda: live.delete([1]), live.compact):
        with pytest.raises(InputError, match=f"^{folder}: it was closed; open it again"):
            change()
    live.close()
    with live.reading() as document_index:
        assert len(document_index.index.search(unit_vectors(1, DIM), 30)[0][0]) == 21


@pytest.mark.usefixtures("fast_disk")
def test_a_large_journal_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the index is in use, and when it is opened after a kill."""
    folder = new_index(tmp_path)
    live = LiveIndex(folder)
    monkeypatch.setattr(live_index, "SMALL_JOURNAL", 2000)
    monkeypatch.setattr(live_index, "JOURNAL_SHARE", 0)
    sizes = []
    live._journal_limit = live._largest_journal()
    for row in range(100):
        live.add([f"新{row}"], vectors_of([f"新{row}"]))
        sizes.append((folder / JOURNAL_FILE).stat().st_size)
    assert 1900 < max(sizes) <= 2000 and min(sizes) < 100
    assert 3 < sum(after < before for before, after in itertools.pairwise(sizes)) < 10
    live.close(compact=False)
    monkeypatch.setattr(live_index, "SMALL_JOURNAL", 200)
    with LiveIndex(folder):
        assert (folder / JOURNAL_FILE).stat().st_size < 200
        assert Twin([*texts_from(0, 20), *(f"新{row}" for row in range(100))]).is_that_of(load_index(folder))


def test_one_at_a_time_changes_an_index(tmp_path: Path) -> None:
    """Also after it was compacted, which replaces the folder; others can read."""
    folder = new_index(tmp_path)
    with LiveIndex(folder) as live:
        for _ in range(3):
            for attempt in (lambda: LiveIndex(folder), lambda: locked_index(folder).__enter__()):
                with pytest.raises(InputError, match=f"^{folder}: another run is changing it; run this again when"):
                    attempt()
            live.add(["新"], vectors_of(["新"]))
            live.compact()
            assert len(load_index(folder).documents) == 21
    with locked_index(folder), pytest.raises(InputError, match="another run is changing it"):
        LiveIndex(folder)


def test_no_other_run_gets_in_while_the_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each rename."""
    folder = new_index(tmp_path)
    rename, attempts = Path.rename, []

    def rename_and_try(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        if saved_index.has_index(folder):
            with pytest.raises(InputError, match="another run is changing it"):
                locked_index(folder).__enter__()
            attempts.append(path.name)
        return renamed

    with LiveIndex(folder) as live:
        live.add(["新"], vectors_of(["新"]))
        monkeypatch.setattr(Path, "rename", rename_and_try)
        live.compact()
        monkeypatch.undo()
    assert len(attempts) == 3


def test_open_files_don_t_increase(tmp_path: Path, ann: str) -> None:
    live = LiveIndex(new_index(tmp_path, ann=ann))
    counts = []
    for row in range(4):
        live.add([f"新{row}"], vectors_of([f"新{row}"]))
        live.compact()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    live.close()
    assert len(set(counts[1:])) == 1


def test_an_index_that_was_replaced_takes_no_changes(tmp_path: Path) -> None:
    """Else they would be gone with the old folder, or the new one would be overwritten."""
    folder = new_index(tmp_path)
    new_index(tmp_path / "new", 3)
    live = LiveIndex(folder)
    live.add(["新"], vectors_of(["新"]))
    folder.rename(tmp_path / "old")
    (tmp_path / "new" / "index").rename(folder)
    for change in (lambda: live.add(["b"], vectors_of(["b"])), lambda: live.delete([1]), live.compact):
        with pytest.raises(InputError, match=f"^{folder}: was replaced while it was in use; open it again"):
            change()
    live.close()
    assert list(load_index(folder).documents) == texts_from(0, 3)
    assert list(load_index(tmp_path / "old").documents) == [*texts_from(0, 20), "新"]


def test_searches_and_deletions_go_on_while_all_documents_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when a document is looked for first; others that look for documents wait."""
    folder, is_reading, go = new_index(tmp_path), threading.Event(), threading.Event()
    finders = []

    def build_late(*arguments: object) -> DocumentFinder:
        finders.append(arguments)
        is_reading.set()
        assert go.wait(30)
        return DocumentFinder(*arguments)

    monkeypatch.setattr(live_index, "DocumentFinder", build_late)
    texts = texts_from(0, 3)
    with LiveIndex(folder) as live, ThreadPoolExecutor(3) as pool:
        assert not finders
        found = [pool.submit(live.find, texts) for _ in range(2)]
        assert is_reading.wait(30)
        assert live.delete([1]) == 1
        with live.reading() as document_index:
            assert document_index.index.live_count == 19
        live.compact()
        added = pool.submit(live.add, texts, vectors_of(texts))
        go.set()
        assert added.result() == ([0, 20, 2], [False, True, False])
        assert [each.result()[::2] for each in found] == [[0, 2]] * 2
        assert len(finders) == 1
        assert live.find(texts) == [0, 20, 2]


def test_an_index_whose_replacement_was_interrupted_is_opened(tmp_path: Path) -> None:
    """With its journal; what killed runs left is removed."""
    folder = new_index(tmp_path)
    live = LiveIndex(folder)
    live.add(["新"], vectors_of(["新"]))
    live.close(compact=False)
    shutil.copytree(folder, tmp_path / ".index.0123abcd.tmp")
    folder.rename(tmp_path / ".index.replaced")
    with LiveIndex(folder) as live:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.csv", "index"]
        live.add(["新2"], vectors_of(["新2"]))
    assert list(load_index(folder).documents)[20:] == ["新", "新2"]


def test_a_reader_reads_again_if_the_index_is_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ann: str
) -> None:
    """After any of its files: it gets the old index or the new one, with its version."""
    folder = new_index(tmp_path, ann=ann)
    live = LiveIndex(folder)
    twin, reads = Twin(texts_from(0, 20)), []
    for name in ("journal_state", "check_manifest", "read_json", "SavedDocuments", "read_journal"):
        read = getattr(saved_index, name)
        texts = [f"{name} {row}" for row in range(2)]

        def read_late(*arguments: object, read: object = read, texts: list[str] = texts, **more: object) -> object:
            monkeypatch.undo()
            reads.append(read)
            found = read(*arguments, **more)
            live.add(texts[:1], vectors_of(texts[:1]))
            live.compact()
            live.add(texts[1:], vectors_of(texts[1:]))
            return found

        monkeypatch.setattr(saved_index, name, read_late)
        version, found = load_with_version(folder)
        twin.add(texts)
        assert twin.is_that_of(found)
        assert version == index_version(folder)
    assert len(reads) == 5


def test_the_version_is_that_of_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a journal that grows meanwhile, too; one without changes has no part in it, nor has a torn record."""
    folder = new_index(tmp_path)
    version = index_version(folder)
    live, twin = LiveIndex(folder), Twin(texts_from(0, 20))
    assert index_version(folder) == version
    live.add(["新"], vectors_of(["新"]))
    twin.add(["新"])
    version = index_version(folder)
    read_journal = saved_index.read_journal

    def read_late(*arguments: object) -> object:
        live.add(["新2"], vectors_of(["新2"]))
        return read_journal(*arguments)

    monkeypatch.setattr(saved_index, "read_journal", read_late)
    found_version, found = load_with_version(folder)
    assert found_version == version != index_version(folder)
    assert twin.is_that_of(found)
    monkeypatch.undo()
    live.close(compact=False)
    version = index_version(folder)
    with open(folder / JOURNAL_FILE, "ab") as journal:
        journal.write(b"torn")
    assert load_with_version(folder)[0] == index_version(folder) == version
    (folder / JOURNAL_FILE).unlink()
    assert index_version(folder) != version


def test_a_folder_that_is_missing_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As between the two commands that move another index into its place; also by who wants to change it."""
    folder, calls = new_index(tmp_path), []

    def sleep(_: float) -> None:
        calls.append(folder.exists())
        (tmp_path / "moved").rename(folder)

    monkeypatch.setattr(saved_index.time, "sleep", sleep)
    for opens in (load_index, LiveIndex):
        folder.rename(tmp_path / "moved")
        opens(folder)
    assert calls == [False, False]


def test_an_index_that_is_always_replaced_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_index(tmp_path)
    monkeypatch.setattr(saved_index, "_is_still", lambda *_: False)
    with pytest.raises(InputError, match=f"^{folder}: is replaced again and again; try again later"):
        load_index(folder)


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path: Path, ann: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Adding, deleting, compacting and closing; it takes changes again when there is room."""
    folder, twin = new_index(tmp_path, 100, ann), Twin(texts_from(0, 100))
    live = LiveIndex(folder)
    texts = texts_from(200, 30)
    live.add(texts[:2], vectors_of(texts[:2]))
    twin.add(texts[:2])
    before = files(folder)
    with file_size_limit(len(before[JOURNAL_FILE]) + 30):
        for change in (lambda: live.add(texts, vectors_of(texts)), lambda: live.delete(range(50)), live.compact):
            with pytest.raises(InputError, match=f"^{folder}/.*: can't be written"):
                change()
        with live.reading() as document_index:
            assert twin.is_that_of(document_index)
        assert files(folder) == before
    assert live.add(texts, vectors_of(texts)) == twin.add(texts)
    assert live.delete(range(50)) == twin.delete(list(range(50)))
    with file_size_limit(1000):
        live.close()
    assert "can't be written" in capsys.readouterr().err.splitlines()[-1]
    assert twin.is_that_of(load_index(folder))
    with LiveIndex(folder):
        pass
    assert twin.is_that_of(load_index(folder))


@pytest.mark.usefixtures("fast_disk")
def test_a_journal_that_can_t_be_compacted_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An addition that is on disk succeeds; the next attempt is made when the journal has doubled."""
    folder = new_index(tmp_path)
    live = LiveIndex(folder)
    live._journal_limit = 100
    attempts = []

    def fail(*_: object, **__: object) -> None:
        attempts.append(live._journal.size)
        raise InputError("the disk is full")

    monkeypatch.setattr(live_index, "save_index", fail)
    for row in range(30):
        assert live.add([f"新{row}"], vectors_of([f"新{row}"])).is_new == [True]
    assert 2 < len(attempts) < 6 and all(after > 2 * before for before, after in itertools.pairwise(attempts))
    assert capsys.readouterr().err == len(attempts) * "the disk is full; the changes are in journal.bin\n"
    assert len(load_index(folder).documents) == 50


def test_an_interrupted_change_is_whole_when_the_index_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while it was indexed. The index in memory may lack a part, so it takes no more changes and isn't saved."""
    folder = new_index(tmp_path)
    live = LiveIndex(folder)
    texts = texts_from(100, 200)
    add = HnswIndex._add

    def interrupted(index: HnswIndex, vectors: np.ndarray, documents: Sequence[str]) -> None:
        if len(index) > 100:
            raise KeyboardInterrupt
        add(index, vectors, documents)

    monkeypatch.setattr(HnswIndex, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        live.add(texts, vectors_of(texts))
    monkeypatch.undo()
    with pytest.raises(InputError, match=f"^{folder}: a change was interrupted; open it again"):
        live.delete([1])
    assert set(live.find(texts)) == {*range(20, 148), None}
    with live.reading() as document_index:
        assert all(
            document_index.documents[row] for row in document_index.index.search(unit_vectors(1, DIM), 999)[0][0]
        )
    live.close()
    assert Twin([*texts_from(0, 20), *texts]).is_that_of(load_index(folder))


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@contextlib.contextmanager
def running(*targets: object) -> Iterator[None]:
    """Runs functions in threads, again and again, until the block ends; a failure in one fails the test."""
    is_over, failures = threading.Event(), []

    def repeat(target: object) -> None:
        try:
            while not is_over.is_set():
                target()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=repeat, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    assert not failures


def test_searches_go_on_while_documents_come_and_go(tmp_path: Path, ann: str) -> None:
    """Four searching threads, two that change the index, one that compacts it; every answer fits the index of then."""
    folder = new_index(tmp_path, 300, ann)
    searches, numbers = itertools.count(), itertools.count(1000)
    with LiveIndex(folder) as live:

        def search() -> None:
            text = f"文献{random.randrange(300)}"
            queries = vectors_of([text])
            with live.reading() as document_index:
                ids, cosines = document_index.index.search(queries, 10)
                found = [document_index.documents[row] for row in ids[0]]
                assert all(found) and len(found) == 10
                np.testing.assert_allclose(cosines[0], (vectors_of(found) @ queries[0]), atol=1e-5)
                _, exact = document_index.index.search_exactly(queries, 10)
                np.testing.assert_allclose(cosines, exact, atol=1e-5)
                assert (found[0] == text) == (live._finder.find(text, document_index.documents) is not None)
            next(searches)

        def change() -> None:
            texts = [f"新{next(numbers)}" for _ in range(random.choice([1, 3, 100]))]
            added = live.add(texts, vectors_of(texts))
            assert all(added.is_new) and live.find(texts) == added.ids
            assert live.delete(added.ids[1:]) == len(texts) - 1
            live.delete([random.randrange(300)])
            text = f"文献{random.randrange(300)}"
            live.add([text], vectors_of([text]))

        def compact() -> None:
            live.compact()
            time.sleep(0.05)

        with running(search, search, search, search, change, change, compact):
            time.sleep(5)
        with live.reading() as document_index:
            expected = list(document_index.documents)
    assert next(searches) > 100 and next(numbers) > 1020
    assert list(load_index(folder).documents) == expected


def test_a_search_doesn_t_wait_for_a_large_addition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its turn between two parts of it."""
    live = LiveIndex(new_index(tmp_path))
    texts = texts_from(1000, 640)
    seen = []
    add = HnswIndex._add

    def search() -> None:
        with live.reading() as document_index:
            seen.append(len(document_index.documents))

    threads = []

    def add_while_one_waits(index: HnswIndex, vectors: np.ndarray, documents: Sequence[str]) -> None:
        threads.append(threading.Thread(target=search))
        threads[-1].start()
        while not live._threads._waiting_readers:
            time.sleep(0.001)
        add(index, vectors, documents)

    monkeypatch.setattr(HnswIndex, "_add", add_while_one_waits)
    live.add(texts, vectors_of(texts))
    for thread in threads:
        thread.join()
    live.close()
    assert seen == [20 + 64 * part for part in range(1, 11)]


# ---------------------------------------------------------------------------------------------------------------------
# Kills

CHANGING = """
import random, sys, zlib
from pathlib import Path
sys.path[:0] = [sys.argv[4], sys.argv[4] + "/tests"]
import numpy as np
from ann_util import HnswIndex
from retrieval import live_index
from retrieval.live_index import LiveIndex

folder, seed, dim = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
numbers = random.Random(seed)
live_index.SMALL_JOURNAL, live_index.JOURNAL_SHARE = 3000, 0
live = LiveIndex(folder)
for step in range(10**9):
    if numbers.random() < 0.6:
        texts = [f"新{seed} {step} {row}" for row in range(numbers.choice([1, 2, 40]))]
        vectors = np.random.default_rng(zlib.crc32(repr(texts).encode())).standard_normal((len(texts), dim), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        print("add", len(live._document_index.documents), *texts, sep="\\t", flush=True)
        live.add(texts, vectors)
    else:
        ids = [numbers.randrange(len(live._document_index.documents)) for _ in range(3)]
        print("delete", *ids, sep="\\t", flush=True)
        live.delete(ids)
    print("done", flush=True)
"""


def kill_while_changing(folder: Path, seed: int, expected: list[str], delay: float) -> list[str]:
    """Kills a process that changes an index after a time; the documents that the index should have, and has.

    expected: those at first. The change that was under way may be there as a whole.
    """
    command = [sys.executable, "-c", CHANGING, folder, str(seed), str(DIM), ROOT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        first = process.stdout.readline()
        assert first, "the process could not open the index"
        time.sleep(delay)
        process.kill()
        lines = [first, *process.stdout.read().splitlines(keepends=True)]
    states = [list(expected)]
    for line in lines:
        if not line.endswith("\n"):  # of a change that hadn't begun
            break
        kind, *fields = line.rstrip("\n").split("\t")
        state = list(states[-1])
        if kind == "add":
            assert int(fields[0]) == len(state)
            states.append([*state, *fields[1:]])
        elif kind == "delete":
            states.append(["" if str(row) in fields else text for row, text in enumerate(state)])
        else:
            states = states[-1:]
    found = load_index(folder)
    assert list(found.documents) in states, f"of {len(states)} possible states none is there"
    assert found.index.live_ids().tolist() == [row for row, text in enumerate(found.documents) if text]
    return list(found.documents)


@pytest.mark.process
def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path, ann: str) -> None:
    """Again and again, under additions, deletions and compactions; nothing else comes in, and nothing is left over."""
    folder, documents = new_index(tmp_path, ann=ann), texts_from(0, 20)
    numbers = random.Random(0)
    for seed in range(5):
        before = documents
        documents = kill_while_changing(folder, seed, documents, numbers.uniform(0, 0.5))
        assert documents != before or seed == 0
    LiveIndex(folder).close()
    assert list(load_index(folder).documents) == documents
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.csv", "index"]
