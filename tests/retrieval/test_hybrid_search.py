"""The ways of searching, their fusion against an obvious loop, and the choice of its weight."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ann_util import IndexOptions, build_index
from common.errors import InputError
from data import ranking_by_query
from helpers import unit_vectors, write_pairs
from retrieval import hybrid_search
from retrieval.corpus import read_corpus
from retrieval.hybrid_search import (
    HYBRID,
    LEXICAL,
    VECTOR,
    SearchHits,
    bm25_search,
    fuse,
    hits_of,
    search,
    tune_fusion,
    way_of,
)
from retrieval.lexical_index import Fusion, LexicalIndex
from retrieval.metrics import evaluate
from retrieval.saved_index import DocumentIndex

DIM = 8


def ranked_ids(rng: np.random.Generator, queries: int, depth: int) -> np.ndarray:
    """Distinct ids below 30 in each row, of which some at the end are missing."""
    ids = np.array([rng.permutation(30)[:depth] for _ in range(queries)])
    for row in ids:
        row[rng.integers(depth + 1) :] = -1
    return ids


def fused_by_a_loop(by_vectors: Sequence[int], by_words: Sequence[int], weight: float, rrf_k: int) -> list[tuple]:
    """(id, score, rank by vectors, rank by words) of all documents, best first."""
    hits = []
    for document in {*by_vectors, *by_words} - {-1}:
        ranks = [list(ids).index(document) + 1 if document in ids else 0 for ids in (by_vectors, by_words)]
        parts = [1 / (rrf_k + rank) if rank else 0.0 for rank in ranks]
        hits.append((parts[0] + weight * parts[1], parts, document, ranks))
    hits.sort(key=lambda hit: (hit[0], hit[1]), reverse=True)
    return [(document, score, *ranks) for score, _, document, ranks in hits]


@pytest.fixture
def document_index(tmp_path: Path) -> DocumentIndex:
    """40 documents, random vectors, and words of which each query of `queries` has some."""
    texts = [f"rice{number % 7} soil{number % 5} straw{number}" for number in range(40)]
    corpus = read_corpus(write_pairs(tmp_path / "corpus.csv", [(text,) for text in texts]))
    index = build_index(IndexOptions("exact"), unit_vectors(40, DIM))
    return DocumentIndex(index, corpus, "model", corpus.sha256, None, LexicalIndex.build(corpus, 40), Fusion(0.7, 3))


@pytest.fixture
def queries() -> list[str]:
    return [f"rice{number} straw{3 * number}" for number in range(6)]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("rrf_k", "k"), [(0, 1), (10, 5), (60, 40)])
def test_fusion_equals_a_loop(weight: float, rrf_k: int, k: int) -> None:
    """Equal scores, which a weight of 1 has many of, are in the order of the ranks by vectors."""
    rng = np.random.default_rng(1)
    by_vectors, by_words = ranked_ids(rng, 50, 12), ranked_ids(rng, 50, 9)
    found = fuse(by_vectors, by_words, Fusion(weight, rrf_k), k)
    assert found.ids.shape == (50, min(k, 21))
    for row in range(50):
        expected = fused_by_a_loop(by_vectors[row].tolist(), by_words[row].tolist(), weight, rrf_k)[:k]
        missing = [(-1, 0, 0, 0)] * (found.ids.shape[1] - len(expected))
        ids, scores, *ranks = zip(*expected, *missing, strict=True)
        assert found.ids[row].tolist() == list(ids)
        np.testing.assert_allclose(found.scores[row], scores, rtol=1e-6)
        assert [found.vector_ranks[row].tolist(), found.lexical_ranks[row].tolist()] == [list(each) for each in ranks]


def test_a_document_beyond_the_first_k_of_both_ways_may_be_the_best() -> None:
    """Since more than k hits of each are fused."""
    found = fuse(np.array([[1, 2, 7]]), np.array([[3, 4, 7]]), Fusion(1.0, 10), 1)
    assert found.ids.tolist() == [[7]]
    assert hybrid_search.search_depth(HYBRID, 1) == 100 and hybrid_search.search_depth(HYBRID, 500) == 500
    assert hybrid_search.search_depth(VECTOR, 1) == hybrid_search.search_depth(LEXICAL, 1) == 1


def test_each_mode_searches_its_way(document_index: DocumentIndex, queries: list[str]) -> None:
    vectors = unit_vectors(6, DIM, seed=1)
    found = {mode: search(document_index, queries, vectors, 10, mode) for mode in (VECTOR, LEXICAL, HYBRID)}
    for mode, expected in (
        (VECTOR, document_index.index.search(vectors, 10)),
        (LEXICAL, document_index.lexical.search(queries, 10)),
    ):
        np.testing.assert_array_equal(found[mode].ids, expected[0])
        np.testing.assert_array_equal(found[mode].scores, expected[1])
    all_ids = [index.search(given, 40)[0] for index, given in _both(document_index, vectors, queries)]
    for values, expected in zip(found[HYBRID], fuse(*all_ids, Fusion(0.7, 3), 10), strict=True):
        np.testing.assert_array_equal(values, expected)


def _both(document_index: DocumentIndex, vectors: np.ndarray, queries: list[str]) -> list[tuple]:
    return [(document_index.index, vectors), (document_index.lexical, queries)]


def test_hits_say_which_way_found_them(document_index: DocumentIndex) -> None:
    assert [way_of(*ranks) for ranks in ((3, 0), (0, 2), (1, 1))] == [VECTOR, LEXICAL, HYBRID]
    for mode in (VECTOR, LEXICAL):
        found = search(document_index, ["straw3"], unit_vectors(1, DIM), 5, mode)
        assert {way for _, way, _ in found.of(0, document_index.documents)} == {mode}


def test_hits_are_in_the_order_of_queries_and_ranks() -> None:
    """Missing ones are left out."""
    ids, scores, ranks = np.array([[2, 0], [1, -1]]), np.array([[0.5, 0.25], [1, 0]], np.float32), np.ones((2, 2))
    hits = list(hits_of(SearchHits(ids, scores, ranks, ranks), ["a", "b", "c"], ["x", "y"]))
    assert hits == [("x", "c", 0.5), ("x", "a", 0.25), ("y", "b", 1.0)]


def test_words_that_an_index_lacks_are_an_error(tmp_path: Path, queries: list[str]) -> None:
    corpus = read_corpus(write_pairs(tmp_path / "corpus.csv", [("rice",)]))
    without = DocumentIndex(build_index(IndexOptions("exact"), unit_vectors(1, DIM)), corpus, "model", corpus.sha256)
    for mode in (LEXICAL, HYBRID):
        with pytest.raises(InputError, match=f"^mode {mode}: the index has no words to search; build them with"):
            search(without, queries, unit_vectors(6, DIM), 10, mode)
    with pytest.raises(InputError, match="no words to search"):
        tune_fusion(without, {"rice": {"rice"}}, unit_vectors(1, DIM), 10)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_each_weight_and_k_and_both_ways_are_judged_as_evaluate_judges_their_results(
    document_index: DocumentIndex, queries: list[str], k: int
) -> None:
    """Best first; a query's own text doesn't count."""
    documents = document_index.documents
    positives = {query: {documents[(11 * row) % 40]} for row, query in enumerate([*queries[1:], documents[0]], 1)}
    vectors = unit_vectors(6, DIM, seed=2)
    judged = tune_fusion(document_index, positives, vectors, k)
    assert len({(each.mode, each.fusion) for each in judged}) == len(judged) == 37
    for mode, fusion, recall, mrr in judged:
        assert (fusion is None) == (mode != HYBRID)
        changed = replace(document_index, fusion=fusion or Fusion())
        found = search(changed, list(positives), vectors, k, mode)
        expected = evaluate(positives, ranking_by_query(hits_of(found, documents, list(positives))), k)
        assert (recall, mrr) == (expected.recall[{1: 1, 7: 5, 20: 20}[k]], expected.mrr)
    scores = [(each.recall, each.mrr) for each in judged]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


def test_bm25_of_a_tiny_corpus_and_an_unknown_query() -> None:
    hits = list(bm25_search(["水稻", "海洋"], ["水稻产量"], k=50))
    assert [(hit.query, hit.document) for hit in hits] == [("水稻", "水稻产量")]
