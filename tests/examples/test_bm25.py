from pathlib import Path

from data import positives_by_query, read_hits, read_text_pairs
from examples import bm25
from retrieval.metrics import evaluate


def test_bm25_finds_between_30_and_80_percent_first(dataset: Path, tmp_path: Path) -> None:
    options = ["--similar_text_pair", str(dataset / "test.csv"), "--corpus_file", str(dataset / "corpus.csv")]
    options += ["--recall_result_dir", str(tmp_path), "--recall_result_file", "bm25.txt", "--recall_num", "10"]
    assert bm25.main(options) == 0
    positives = positives_by_query(read_text_pairs(dataset / "test.csv"))
    hits = read_hits(tmp_path / "bm25.txt")
    assert set(hits) <= set(positives)
    assert max(map(len, hits.values())) == 10
    assert 0.3 < evaluate(positives, hits, 10).recall[1] < 0.8
