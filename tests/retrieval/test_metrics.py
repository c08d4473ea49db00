"""Recall@K, MRR and nDCG: hand-made cases and an independent implementation."""

import math
import random
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, Qrel, R, ScoredDoc, nDCG

from common.errors import InputError
from data import Hit
from retrieval.corpus import read_corpus
from retrieval.metrics import (
    evaluate,
    format_lines,
    judge,
    judge_hits,
    metric_names,
    metrics,
    mrr_at_k,
    ndcg_at_k,
    query_metrics,
    recall_at_k,
    report_missing_positives,
)


def random_case(seed: int) -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """120 queries with 1 to 70 positives; every sixth has no results, the others 1 to 60 distinct documents."""
    rng = random.Random(seed)
    documents = [f"文献{i}" for i in range(150)]
    positives = {f"查询{i}": set(rng.sample(documents, rng.choice([1, 1, 2, 5, 70]))) for i in range(120)}
    hits = {query: rng.sample(documents, rng.randint(1, 60)) for i, query in enumerate(positives) if i % 6}
    return positives, hits


@pytest.mark.parametrize("recall_num", [1, 3, 10, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_ir_measures(recall_num: int, seed: int) -> None:
    positives, hits = random_case(seed)
    evaluation = evaluate(positives, hits, recall_num)
    qrels = [Qrel(query, title, 1) for query, titles in positives.items() for title in titles]
    run = [ScoredDoc(query, title, -rank) for query, titles in hits.items() for rank, title in enumerate(titles)]
    measures = [R @ k for k in evaluation.recall] + [RR @ recall_num, nDCG @ recall_num]
    expected = ir_measures.calc_aggregate(measures, qrels, run)
    found = [*evaluation.recall.values(), evaluation.mrr, evaluation.ndcg]
    assert found == pytest.approx([expected[measure] for measure in measures], abs=1e-9)


def test_each_query_s_metrics_equal_ir_measures() -> None:
    positives, hits = random_case(2)
    judgement = judge(positives, hits, 20)
    qrels = [Qrel(query, title, 1) for query, titles in positives.items() for title in titles]
    run = [ScoredDoc(query, title, -rank) for query, titles in hits.items() for rank, title in enumerate(titles)]
    measures = [R @ 1, R @ 5, R @ 10, R @ 20, RR @ 20, nDCG @ 20]
    expected = {(each.query_id, each.measure): each.value for each in ir_measures.iter_calc(measures, qrels, run)}
    for judged, values in zip(judgement.queries, query_metrics(judgement), strict=True):
        assert values == pytest.approx([expected[judged.query, measure] for measure in measures], abs=1e-9)


def test_scores_stay_with_their_documents() -> None:
    """Where repeated documents and the query's own text are left out."""
    hits = [Hit("q", document, score) for score, document in enumerate(["a", "Q", "a", "b", "c"])]
    (judged,) = judge_hits({"q": {"B"}}, hits, 3).queries
    assert (judged.documents, judged.scores) == (["a", "B", "c"], [0, 3, 4])
    assert (judged.first_rank, judged.has_own_text) == (2, True)


def test_metrics_of_one_query_by_hand() -> None:
    documents, titles = ["a", "x", "b", "c"], {"b", "c", "d"}
    assert recall_at_k(documents, titles, 2) == 0
    assert recall_at_k(documents, titles, 3) == pytest.approx(1 / 3)
    assert recall_at_k(documents, titles, 50) == pytest.approx(2 / 3)
    assert mrr_at_k(documents, titles, 2) == 0
    assert mrr_at_k(documents, titles, 3) == pytest.approx(1 / 3)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at_k(documents, titles, 4) == pytest.approx((1 / 2 + 1 / math.log2(5)) / ideal)
    assert ndcg_at_k(["b"], titles, 1) == 1


def test_every_title_of_a_query_is_a_positive_and_each_query_counts_once() -> None:
    positives = {"q1": {"a", "b"}, "q2": {"c"}}
    evaluation = evaluate(positives, {"q1": ["a", "x", "b"], "q2": ["x"]}, 5)
    assert evaluation.recall == {1: pytest.approx(0.25), 5: pytest.approx(0.5)}
    assert evaluation.mrr == pytest.approx(0.5)


def test_a_repeated_document_keeps_its_first_rank_and_later_ones_move_up() -> None:
    evaluation = evaluate({"q": {"a", "b"}}, {"q": ["a", "a", "a", "a", "a", "b"]}, 5)
    assert (evaluation.recall[1], evaluation.recall[5], evaluation.ndcg) == (0.5, 1, 1)
    moved_up = evaluate({"q": {"b"}}, {"q": ["x", "x", "b"]}, 5)
    assert moved_up.mrr == 0.5


def test_a_query_without_results_counts_zero_and_is_named() -> None:
    evaluation = evaluate({"q1": {"a"}, "q2": {"b"}, "q3": {"c"}, "q4": {"d"}}, {"q1": ["a"], "q3": ["c"]}, 1)
    assert evaluation.recall == {1: 0.5}
    assert (evaluation.mrr, evaluation.ndcg) == (0.5, 0.5)
    assert evaluation.queries_without_results == ["q2", "q4"]


def test_a_query_that_the_pairs_lack_is_left_out_and_named() -> None:
    evaluation = evaluate({"q1": {"a"}}, {"q1": ["a"], "other": ["a"]}, 1)
    assert (evaluation.recall, evaluation.unknown_queries) == ({1: 1}, ["other"])


def test_a_document_equal_to_its_query_counts_like_any_other() -> None:
    assert evaluate({"q": {"q"}}, {"q": ["q"]}, 1).recall == {1: 1}


def test_documents_after_recall_num_do_not_count() -> None:
    evaluation = evaluate({"q": {"b"}}, {"q": ["x", "y", "b"]}, 2)
    assert (evaluation.recall, evaluation.mrr, evaluation.ndcg) == ({1: 0}, 0, 0)


@pytest.mark.parametrize(
    ("recall_num", "cutoffs"),
    [(1, [1]), (4, [1]), (10, [1, 5, 10]), (49, [1, 5, 10, 20]), (10**30, [1, 5, 10, 20, 50])],
)
def test_cutoffs_go_up_to_recall_num(recall_num: int, cutoffs: list[int]) -> None:
    lines = format_lines(evaluate({"q": {"a"}}, {"q": ["a"]}, recall_num))
    expected = [*(f"recall@{k}" for k in cutoffs), f"mrr@{recall_num}", f"ndcg@{recall_num}"]
    assert lines == [f"{name}=100.0" for name in expected]


def test_numbers_are_rounded_as_the_original_rounds_them() -> None:
    positives = {str(i): {"a"} for i in range(1500)}
    hits = {str(i): ["a"] if i < 769 else ["x"] for i in range(1500)}
    lines = format_lines(evaluate(positives, hits, 1))
    assert lines[0] == f"recall@1={round(100 * 769 / 1500, 3)}" == "recall@1=51.267"


def test_no_queries_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no queries"):
        evaluate({}, {"q": ["a"]}, 10)


def test_metrics_have_the_names_that_are_printed() -> None:
    evaluation = evaluate({"q1": {"a", "b"}, "q2": {"c"}}, {"q1": ["a", "x", "b"], "q2": ["x"]}, 5)
    found = metrics(evaluation)
    assert list(found) == metric_names(5) == ["recall@1", "recall@5", "mrr@5", "ndcg@5"]
    assert list(found.values()) == [*evaluation.recall.values(), evaluation.mrr, evaluation.ndcg]


def test_positives_that_the_corpus_lacks_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.csv").write_text("甲\n丁\n", encoding="utf-8")
    corpus = read_corpus(tmp_path / "corpus.csv")
    report_missing_positives(corpus, {"q1": {"甲"}})
    assert capsys.readouterr() == ("", "")
    report_missing_positives(corpus, {"q1": {"甲", "乙"}, "q2": {"乙", "丙"}})
    assert (
        capsys.readouterr().err == f"{corpus.path}: lacks 2 titles of the pairs, which can't be recalled; first: 乙\n"
    )
