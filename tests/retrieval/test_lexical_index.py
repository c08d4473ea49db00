"""The terms of a text, BM25 against its formula, and the files of a BM25 index."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.texts import text_key
from helpers import VARIED_TEXTS, Calls, file_size_limit
from retrieval.lexical_index import DEFAULT_FUSION, Fusion, LexicalIndex, split_terms

K1, B = 1.2, 0.75
SETTINGS = {"documents": 2, "mean_length": 1.0}


def built(documents: Sequence[str]) -> LexicalIndex:
    return LexicalIndex.build(documents, len(documents))


def bm25_scores(query: str, documents: Sequence[str]) -> list[float]:
    """A query's score with each document by Lucene's formula: Kamphuis et al. 2020, table 1, "Lucene (accurate)"."""
    counts = [Counter(split_terms(document)) for document in documents]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(documents)
    scores = [0.0] * len(documents)
    for term in split_terms(query):
        frequency = sum(term in count for count in counts)
        idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        for row, count in enumerate(counts):
            norm = K1 * (1 - B + B * lengths[row] / mean)
            scores[row] += idf * count[term] / (count[term] + norm)
    return scores


def random_documents(count: int, seed: int = 0) -> list[str]:
    """Texts of Chinese characters and English words, some of them empty of terms."""
    rng = random.Random(seed)
    units = [*"水稻产量土壤模型", " rice ", " Soil ", " 2024 ", "，", "!"]
    return ["".join(rng.choices(units, k=rng.randrange(1, 12))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Terms


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("水稻产量", "水 稻 产 量 水稻 稻产 产量"),
        ("水稻,产量", "水 稻 水稻 产 量 产量"),  # no pair across punctuation
        ("水 稻", "水 稻 水稻"),  # nor does `text_key` tell them apart from 水稻
        ("Symptoms of the X-linked type", "symptoms of the x linked type"),
        ("基于BERT的QA, 2019年", "基 于 基于 bert 的 qa 2019 年"),
        ("GB/T 7714-2015", "gb t 7714 2015"),
        ("ＡＢＣ１２３ ﬁne H₂O 20℃", "abc123 fine h2o 20 °c"),
        ("naïve CAFÉ", "naive cafe"),
        ("हिन्दी भाषा", "हिनदी भाषा"),
        ("한국어", "한 국 어 한국 국어"),
        ("ข้อมูล", "ข อ ม ล ขอ อม มล"),  # without the marks, which the tokenizer strips
        ("!?。…", ""),
        ("", ""),
    ],
)
def test_terms_are_words_or_characters_and_pairs(text: str, terms: str) -> None:
    assert split_terms(text) == terms.split()


@pytest.mark.parametrize("text", VARIED_TEXTS)
def test_texts_that_are_the_same_have_the_same_terms(text: str) -> None:
    key = text_key(text)
    for other in (key, f"\u200b {text}\u00a0", key.upper()):
        if text_key(other) == key:
            assert split_terms(other) == split_terms(text)
    assert text_key(key) == key


# ---------------------------------------------------------------------------------------------------------------------
# Searching


def test_scores_are_those_of_the_formula() -> None:
    """Of equal scores the smaller id comes first; documents without a term of the query aren't hits."""
    documents, queries = random_documents(60), random_documents(40, seed=1)
    index = built(documents)
    for k in (1, 7, 60, 100):
        ids, scores = index.search(queries, k)
        assert ids.shape == scores.shape == (40, min(k, 60))
        for query, found, found_scores in zip(queries, ids.tolist(), scores, strict=True):
            expected = np.float32(bm25_scores(query, documents))
            hits = [row for row in found if row >= 0]
            assert len(hits) == min(k, np.count_nonzero(expected))
            assert found[len(hits) :] == [-1] * (len(found) - len(hits)) and not found_scores[len(hits) :].any()
            np.testing.assert_allclose(found_scores[: len(hits)], expected[hits], rtol=1e-5)
            np.testing.assert_allclose(found_scores[: len(hits)], -np.sort(-expected)[: len(hits)], rtol=1e-5)
            for place, row in enumerate(hits[1:]):
                assert found_scores[place] > found_scores[place + 1] or hits[place] < row


def test_a_document_has_the_same_score_alone() -> None:
    documents = random_documents(60)
    index = built(documents)
    for query in random_documents(40, seed=1):
        expected = bm25_scores(query, documents)
        np.testing.assert_allclose([index.score(query, document) for document in documents], expected, rtol=1e-5)
    assert index.score("unknown words", "other unknown words") > index.score("unknown words", "other words") > 0


def test_a_term_counts_as_often_as_the_query_has_it() -> None:
    index = built(["rice", "soil", "soil rice"])
    once, twice = index.search(["rice", "rice rice"], 1)[1].ravel()
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize("documents", [["!"], ["?", "。"]])
def test_documents_and_queries_without_terms_have_no_hits(documents: list[str]) -> None:
    assert built(documents).search(["rice", "!"], 5)[0].tolist() == [[-1] * len(documents)] * 2
    assert built(["rice"]).search(["!", "soil"], 5)[0].tolist() == [[-1], [-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Changes


def test_added_documents_are_found_with_the_statistics_of_the_others() -> None:
    """If the added ones have the same lengths and frequencies as the others, with the scores of an index of all."""
    documents = random_documents(60)
    changed, expected = built(documents), built([*documents, *documents])
    changed.add(documents)
    assert len(changed) == 120 and changed.has_changes and not expected.has_changes
    queries = random_documents(20, seed=1)
    ids, scores = changed.search(queries, 120)
    expected_ids, expected_scores = expected.search(queries, 120)
    assert np.array_equal(ids < 0, expected_ids < 0)
    for query, row, found in zip(queries, ids, scores, strict=True):
        base = np.float32(bm25_scores(query, documents))
        np.testing.assert_allclose(found[row >= 0], np.tile(base, 2)[row[row >= 0]], rtol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, rtol=0.05, atol=0.05)


def test_a_term_of_added_documents_alone_counts_as_a_rare_one() -> None:
    index = built(["rice straw", "soil straw", "straw"])
    index.add(["gb7714 straw", "straw rice"])
    ids, scores = index.search(["gb7714 straw", "rice"], 5)
    assert ids[0, 0] == 3 and set(ids[0].tolist()) == {0, 1, 2, 3, 4}
    assert ids[1].tolist() == [0, 4, -1, -1, -1] and scores[1, 0] == pytest.approx(scores[1, 1])
    empty = built(["!"])
    empty.add(["rice"])
    assert empty.search(["rice"], 2)[0].tolist() == [[1, -1]]


def test_deleted_documents_are_not_found() -> None:
    """Whether they were there when the index was built or added later; the others keep their ids and scores."""
    index = built(["rice", "rice", "rice soil"])
    index.add(["rice"])
    before = dict(zip(*(values[0].tolist() for values in index.search(["rice"], 4)), strict=True))
    index.delete([1, 3])
    ids, scores = index.search(["rice"], 4)
    assert ids.tolist() == [[0, 2, -1, -1]] and index.has_changes and len(index) == 4
    assert scores[0, :2].tolist() == [before[0], before[2]]


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("documents", [random_documents(50), ["!"]])
def test_a_saved_index_finds_the_same(tmp_path: Path, documents: list[str]) -> None:
    """Its arrays stay on the disk."""
    index = built(documents)
    index.save(tmp_path)
    loaded = LexicalIndex.load(tmp_path, index.settings)
    assert len(loaded) == len(documents)
    for found, expected in zip(loaded.search(documents, 9), index.search(documents, 9), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert all(isinstance(values, np.memmap) for values in list(loaded._bm25.scores.values())[:3])


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    built(["rice", "soil"]).save(tmp_path)
    with (tmp_path / "bm25_terms.txt").open("a", encoding="utf-8") as file:
        file.write("straw\n")
    with pytest.raises(InputError, match=rf"^{tmp_path}: the files of its BM25 index don't fit together; build"):
        LexicalIndex.load(tmp_path, SETTINGS)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """An array of objects is refused; so is a missing file."""
    built(["rice", "soil"]).save(tmp_path)
    np.save(tmp_path / "bm25_scores.npy", np.array([Calls(pytest.fail, "unpickled")]), allow_pickle=True)
    with pytest.raises(InputError, match=rf"^{tmp_path}: its BM25 index can't be read .*build the index again"):
        LexicalIndex.load(tmp_path, SETTINGS)
    (tmp_path / "bm25_scores.npy").unlink()
    with pytest.raises(InputError, match=r"can't be read .*bm25_scores\.npy"):
        LexicalIndex.load(tmp_path, SETTINGS)


@pytest.mark.parametrize("size", [1000, 30_000])
def test_a_full_disk_is_named(tmp_path: Path, size: int) -> None:
    """Whether it is full at the terms or at the last bytes of an array."""
    index = built([f"rice{number} straw" for number in range(5000)])
    with file_size_limit(size), pytest.raises(InputError, match=rf"^{tmp_path}/bm25_.*: can't be written"):
        index.save(tmp_path)


def test_a_fusion_is_kept(tmp_path: Path) -> None:
    assert Fusion.load(tmp_path) == DEFAULT_FUSION
    Fusion(0.5, 60).save(tmp_path)
    assert Fusion.load(tmp_path) == Fusion(0.5, 60)


@pytest.mark.parametrize(
    "content", ["{}", '{"lexical_weight": -1, "rrf_k": 10}', '{"lexical_weight": NaN, "rrf_k": 1}']
)
def test_a_wrong_fusion_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "fusion.json").write_text(content)
    with pytest.raises(InputError, match=rf"^{tmp_path}/fusion\.json: isn't a weight and a k; remove it"):
        Fusion.load(tmp_path)
