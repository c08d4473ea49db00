from pathlib import Path

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


def test_bm25_of_a_tiny_corpus_and_an_unknown_query() -> None:
    hits = list(bm25.bm25_search(["水稻", "海洋"], ["水稻产量"], k=50))
    assert [(hit.query, hit.document) for hit in hits] == [("水稻", "水稻产量")]
