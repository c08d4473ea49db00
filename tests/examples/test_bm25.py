import math
from pathlib import Path

import pytest

from data import positives_by_query, read_hits, read_text_pairs
from examples import bm25
from retrieval.metrics import recall_at_k


def test_bm25_finds_between_30_and_80_percent_first(dataset: Path, tmp_path: Path) -> None:
    options = ["--similar_text_pair", str(dataset / "test.csv"), "--corpus_file", str(dataset / "corpus.csv")]
    options += ["--recall_result_dir", str(tmp_path), "--recall_result_file", "bm25.txt", "--recall_num", "10"]
    assert bm25.main(options) == 0
    positives = positives_by_query(read_text_pairs(dataset / "test.csv"))
    hits = read_hits(tmp_path / "bm25.txt")
    assert set(hits) <= set(positives)
    assert max(map(len, hits.values())) == 10
    ranked = [hits.get(query, []) for query in positives]
    assert 0.3 < recall_at_k(ranked, list(positives.values()), 1) < 0.8


def test_bm25_ranks_by_the_formula() -> None:
    """Against BM25 as Lucene computes it, spelled out for a query of one bigram and its two characters."""
    corpus = ["水稻产量", "水稻", "小麦产量产量"]
    hits = list(bm25.bm25_search(["产量"], corpus, k=3))
    lengths = [len(bm25.unigrams_and_bigrams(text)) for text in corpus]
    mean = sum(lengths) / 3
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))  # each token of the query is in two documents of three
    norms = {text: 1.2 * (1 - 0.75 + 0.75 * length / mean) for text, length in zip(corpus, lengths, strict=True)}
    expected = {text: 3 * idf * n / (n + norms[text]) for text, n in (("水稻产量", 1), ("小麦产量产量", 2))}
    assert [hit.document for hit in hits] == sorted(expected, key=expected.get, reverse=True)
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected.values(), reverse=True), rel=1e-5)


def test_bm25_of_a_tiny_corpus_and_an_unknown_query() -> None:
    hits = list(bm25.bm25_search(["水稻", "海洋"], ["水稻产量"], k=50))
    assert [(hit.query, hit.document) for hit in hits] == [("水稻", "水稻产量")]
