"""Encoding a corpus, building, opening, tuning and changing an index, and searching it."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ann_util import DEFAULT_TARGET_RECALL, HnswIndex, IndexOptions, VectorIndex, build_index
from common.errors import InputError
from common.files import read_json
from encoding.encoder import Encoder, load_encoder
from helpers import unit_vectors, write_pairs
from retrieval import pipeline
from retrieval.corpus import Corpus, read_corpus
from retrieval.embedding_store import Embeddings, EmbeddingsMetadata
from retrieval.lexical_index import Fusion, LexicalIndex
from retrieval.saved_index import DocumentIndex, has_lexical_index, load_index, locked_index, save_index


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> Encoder:
    return load_encoder(checkpoint, batch_size=8)


@pytest.fixture(scope="module")
def corpus(recall_data: Path) -> Corpus:
    return read_corpus(recall_data / "corpus.csv")


@pytest.fixture(scope="module")
def query_vectors(encoder: Encoder) -> np.ndarray:
    return encoder.encode(["水稻的产量", "土壤的模型", "隧道的评价"])


def documents(folder: Path, *texts: str) -> Corpus:
    """A corpus file of these texts."""
    return read_corpus(write_pairs(folder / "more.csv", [(text,) for text in texts]))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def test_a_corpus_is_encoded_in_shards_that_are_kept(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing shard alone is encoded again."""
    monkeypatch.setattr(EmbeddingsMetadata.__new__, "__defaults__", (16, "float32"))
    expected = encoder.encode(list(corpus))
    for removed, texts in ((False, list(corpus)), (False, []), (True, corpus[48:64])):
        if removed:
            (tmp_path / "embeddings_000003.json").unlink()
        encoded.clear()
        stored = pipeline.encode_corpus(encoder, corpus, tmp_path)
        assert type(stored) is Embeddings and encoded == texts
        np.testing.assert_allclose(stored[:], expected, atol=1e-6)


def test_shards_that_another_machine_wrote_elsewhere_are_missed(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with two machines that don't share the folder: this process encodes its own shards only."""
    monkeypatch.setattr(EmbeddingsMetadata.__new__, "__defaults__", (16, "float32"))
    monkeypatch.setattr(pipeline, "init_ranks", lambda: (0, 2))
    message = f"^{tmp_path}: lacks vectors of other processes; all machines must see the same folder"
    with pytest.raises(InputError, match=message):
        pipeline.encode_corpus(encoder, corpus, tmp_path)


@pytest.mark.parametrize("is_kept", [False, True])
def test_vectors_of_a_new_index_are_kept_on_request(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, is_kept: bool
) -> None:
    """Else until the block ends."""
    kept = tmp_path / "kept" if is_kept else None
    with pipeline.new_index(encoder, corpus, IndexOptions("exact"), tmp_path / "parent", kept) as saved:
        assert (saved.model, saved.corpus) == (encoder.fingerprint, corpus.sha256)
        assert list(saved.documents) == list(corpus)
        (folder,) = [kept] if is_kept else (tmp_path / "parent").iterdir()
        assert (folder / "embeddings_000000.npy").is_file()
        ids, _ = saved.index.search(encoder.encode(corpus[:3]), 1)
        assert ids.tolist() == [[0], [1], [2]]
    assert folder.exists() == is_kept
    if not is_kept:
        assert not list((tmp_path / "parent").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Samples and searching


@pytest.mark.parametrize("count", [1, 200, 400, 1000, 12_345])
def test_ef_is_tuned_on_other_queries_than_the_recall_is_measured_on(count: int) -> None:
    measured, tuned = (pipeline.sample_of(np.arange(count), other=other) for other in (False, True))
    assert min(count, pipeline.SAMPLE) <= len(measured) <= 2 * pipeline.SAMPLE
    if count >= 2 * pipeline.SAMPLE:
        assert not set(measured) & set(tuned)


def test_the_recall_is_measured_on_a_sample_of_many_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact search finds all; an index that finds the best hit alone finds a tenth of ten."""
    vectors, queries = unit_vectors(500, 8), unit_vectors(1500, 8, seed=1)
    index = build_index(IndexOptions(ann="exact"), vectors)
    assert pipeline.measure_recall(index, queries, 10) == 1

    def find_the_best_alone(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        assert len(queries) <= 2 * pipeline.SAMPLE
        ids, similarities = index.search_exactly(queries, 1)
        return ids.repeat(k, axis=1), np.c_[similarities, np.full((len(queries), k - 1), -1)]

    monkeypatch.setattr(index, "search", find_the_best_alone)
    assert pipeline.measure_recall(index, queries, 10) == pytest.approx(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Tuning


class Opened:
    """Opens, builds or changes the index `index` in a folder, again and again."""

    def __init__(self, encoder: Encoder, corpus: Corpus, query_vectors: np.ndarray, folder: Path) -> None:
        self.encoder, self.corpus, self.query_vectors, self.folder = encoder, corpus, query_vectors, folder
        self.index_dir = folder / "index"

    def __call__(self, *added: str, k: int = 20, words: Fusion | None = None, **options: object) -> DocumentIndex:
        """added: new documents; words: of `open_or_build_index`; options: of IndexOptions."""
        with pipeline.open_or_build_index(
            self.encoder,
            self.query_vectors,
            k,
            corpus=self.corpus,
            options=IndexOptions(**options),
            parent=self.folder,
            added=documents(self.folder, *added) if added else None,
            index_dir=self.index_dir,
            words=words,
        ) as saved:
            return saved

    @property
    def ef(self) -> int:
        """As it was saved."""
        return read_json(self.index_dir / "index.json")["ef"]


@pytest.fixture
def opened(encoder: Encoder, corpus: Corpus, query_vectors: np.ndarray, tmp_path: Path) -> Opened:
    return Opened(encoder, corpus, query_vectors, tmp_path)


def test_an_index_keeps_its_ef_or_its_target_recall_when_documents_are_added(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `ef` that was given stays; one that was tuned is tuned again, for the same target recall."""
    targets = []
    monkeypatch.setattr(HnswIndex, "tune_ef", lambda *arguments: targets.append(arguments[-1]))
    opened(target_recall=0.0, hnsw_ef=300)
    assert opened.ef == 300
    opened("新的文献1")
    assert opened.ef == 300
    opened(target_recall=0.0, hnsw_ef=77)
    assert opened.ef == 77
    opened("新的文献2")
    assert opened.ef == 77
    assert not targets
    opened(target_recall=0.9)
    opened("新的文献3")
    assert targets == [0.9, 0.9]
    opened.index_dir = opened.folder / "index_2"
    opened()
    opened("新的文献1")
    opened("新的文献2", target_recall=0.8)
    assert targets[2:] == [DEFAULT_TARGET_RECALL, DEFAULT_TARGET_RECALL, 0.8]


def test_added_documents_never_lower_ef(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the `k` that it is tuned for is smaller than before; a new target recall may."""
    monkeypatch.setattr(HnswIndex, "tune_ef", lambda index, queries, k, target: setattr(index, "ef", 2 * k))
    for k, added, ef in ((30, (), 60), (5, ("新的文献1",), 60), (40, ("新的文献2",), 80)):
        opened(*added, k=k)
        assert opened.ef == ef
    opened(k=5, target_recall=0.9)
    assert opened.ef == 10


def test_without_queries_documents_are_the_sample_to_tune_on(
    encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = []
    monkeypatch.setattr(HnswIndex, "tune_ef", lambda index, queries, k, target: samples.append(len(queries)))
    vectors = encoder.encode(list(corpus))
    index = build_index(IndexOptions(), vectors)
    pipeline.tune(index, encoder, corpus, np.empty((0, encoder.embedding_size), np.float32), 5)
    pipeline.tune(index, encoder, corpus, vectors[:3], 5)
    assert samples == [len(corpus), 3]
    for not_tuned in (build_index(IndexOptions("exact"), vectors), build_index(IndexOptions(target_recall=0), vectors)):
        pipeline.tune(not_tuned, encoder, corpus, vectors[:3], 5)
    assert len(samples) == 2


def test_deleted_documents_are_no_sample(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those that the index has beyond the given ones; without any left, nothing is tuned."""
    samples = []
    monkeypatch.setattr(HnswIndex, "tune_ef", lambda index, queries, k, target: samples.append(queries))
    texts = [*corpus[:8], "新的文献"]
    index = build_index(IndexOptions(), encoder.encode(texts))
    no_queries = np.empty((0, encoder.embedding_size), np.float32)
    index.delete([0, 3])
    pipeline.tune(index, encoder, ["" if row in (0, 3) else corpus[row] for row in range(8)], no_queries, 5)
    np.testing.assert_allclose(samples.pop(), encoder.encode([texts[row] for row in (1, 2, 4, 5, 6, 7)]), atol=1e-6)
    index.delete(range(8))
    pipeline.tune(index, encoder, [""] * 8, no_queries, 5)
    index.delete([8])
    pipeline.tune(index, encoder, [""] * 8, encoder.encode(["水稻"]), 5)
    assert not samples


# ---------------------------------------------------------------------------------------------------------------------
# Saved indexes


@pytest.mark.parametrize("ann", ["exact", "hnswlib"])
def test_an_index_is_built_saved_and_opened(opened: Opened, encoder: Encoder, corpus: Corpus, ann: str) -> None:
    """With the documents to add, in a new index as in a saved one."""
    built = opened("新的文献1", ann=ann)
    assert list(built.documents) == [*corpus, "新的文献1"] and len(built.index) == len(corpus) + 1
    found = opened(ann=ann)
    assert list(found.documents) == list(built.documents)
    changed = opened("新的文献2", "新的文献1", ann=ann)
    assert list(changed.documents) == [*corpus, "新的文献1", "新的文献2"]
    for row, text in enumerate(("新的文献1", "新的文献2"), len(corpus)):
        assert row in changed.index.search(encoder.encode([text]), 2)[0]
    with pytest.raises(InputError, match=r"--add_corpus .*more\.csv: the index has all of its documents already"):
        opened("新的文献2", ann=ann)


def test_an_index_that_appears_while_another_is_built_is_not_replaced(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(ann="exact")
    opened.index_dir.rename(opened.folder / "other")

    def build_late(*arguments: object) -> VectorIndex:
        shutil.copytree(opened.folder / "other", opened.index_dir)
        return build_index(*arguments)

    monkeypatch.setattr(pipeline, "build_index", build_late)
    with pytest.raises(InputError, match=f"^{opened.index_dir}: another run has written it meanwhile"):
        opened(ann="exact")
    assert load_index(opened.index_dir)


def test_of_two_runs_that_change_an_index_one_is_refused(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the other is changing it; a search isn't, nor is a change afterwards."""
    opened(ann="exact")

    def save_late(*arguments: object) -> DocumentIndex:
        monkeypatch.undo()
        assert opened()
        for added, options in ((["文献other"], {}), ([], {"target_recall": 0.9})):
            with pytest.raises(InputError, match=f"^{opened.index_dir}: another run is changing it"):
                opened(*added, **options)
        return save_index(*arguments)

    monkeypatch.setattr(pipeline, "save_index", save_late)
    opened("文献one")
    opened("文献other")
    assert list(load_index(opened.index_dir).documents)[-2:] == ["文献one", "文献other"]


def test_an_index_is_locked_before_it_is_loaded_to_be_changed(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else documents that another run adds in between would be lost."""
    opened(ann="exact")

    def load_locked(folder: str, *expected: Any) -> DocumentIndex:
        with pytest.raises(InputError, match="another run is changing it"), locked_index(folder):
            pass
        return load_index(folder, *expected)

    monkeypatch.setattr(pipeline, "load_index", load_locked)
    opened("新的文献")


def test_another_rank_gets_no_index(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is saved or new."""

    @contextlib.contextmanager
    def as_rank_1() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "is_main_process", lambda: False)
            patch.setattr(pipeline, "broadcast_object", lambda own: own or opened.folder / "vectors")
            yield

    with as_rank_1():
        assert opened() is None
    opened()
    with as_rank_1():
        assert opened() is None and opened("新的文献") is None
    assert len(load_index(opened.index_dir).documents) == len(opened.corpus)


def test_neither_an_index_nor_a_corpus_is_an_error(opened: Opened) -> None:
    opened.corpus = None
    with pytest.raises(InputError, match="there is neither a saved index nor a corpus to search"):
        opened()


# ---------------------------------------------------------------------------------------------------------------------
# Words


def found_by_words(saved: DocumentIndex) -> list[list[int]]:
    return saved.lexical.search(["水稻的产量", "新的文献2"], 20)[0].tolist()


@pytest.mark.parametrize("is_given_first", [True, False])
def test_an_index_gets_the_words_of_its_documents_and_of_added_ones(opened: Opened, is_given_first: bool) -> None:
    """Without the option they stay, with the weight that they were given first."""
    first = Fusion(0.5, 7) if is_given_first else None
    built = opened("新的文献1", ann="exact", words=first)
    assert (built.lexical is not None) == has_lexical_index(opened.index_dir) == is_given_first
    given = opened(ann="exact", words=first or Fusion(0.5, 7))
    for saved in (given, opened("新的文献2"), opened(), load_index(opened.index_dir)):
        expected = LexicalIndex.build(saved.documents, len(saved.documents))
        assert found_by_words(saved) == found_by_words(replace(saved, lexical=expected))
        assert saved.fusion == Fusion(0.5, 7)
    again = opened(words=Fusion(2.0, 1))
    assert again.fusion == Fusion(0.5, 7) and len(again.lexical) == len(opened.corpus) + 2


def test_words_are_not_indexed_again_for_another_ef(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(words=Fusion())
    monkeypatch.setattr(LexicalIndex, "build", lambda *_: pytest.fail("indexed"))
    expected = found_by_words(opened())
    assert found_by_words(opened(target_recall=0.9, words=Fusion())) == expected == found_by_words(opened())
