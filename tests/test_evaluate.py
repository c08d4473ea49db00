"""The metrics: hand-made cases, an independent implementation, and the command."""

import math
import random
import subprocess
import sys
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, Qrel, R, ScoredDoc, nDCG

from common.errors import InputError
from data import Hit, write_hits
from retrieval.metrics import evaluate, format_lines, mrr_at_k, ndcg_at_k, recall_at_k

ROOT = Path(__file__).resolve().parent.parent


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


def test_metrics_of_one_query_by_hand() -> None:
    ranked, positives = [["a", "x", "b", "c"]], [{"b", "c", "d"}]
    assert recall_at_k(ranked, positives, 2) == 0
    assert recall_at_k(ranked, positives, 3) == pytest.approx(1 / 3)
    assert recall_at_k(ranked, positives, 50) == pytest.approx(2 / 3)
    assert mrr_at_k(ranked, positives, 2) == 0
    assert mrr_at_k(ranked, positives, 3) == pytest.approx(1 / 3)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at_k(ranked, positives, 4) == pytest.approx((1 / 2 + 1 / math.log2(5)) / ideal)
    assert ndcg_at_k([["b"]], positives, 1) == 1


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


def command(*options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "evaluate.py", *map(str, options)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two queries, the first with two titles; the result answers the first and a third query."""
    pairs, result = tmp_path / "dev.csv", tmp_path / "result" / "recall_result.txt"
    pairs.write_text("查询一\t标题甲\n查询二\t标题丙\n查询一\t标题乙\n", encoding="utf-8")
    write_hits(result, [Hit("查询一", "标题乙", 0.9), Hit("查询一", "标题丁", 0.8), Hit("查询三", "标题甲", 0.7)])
    return pairs, result


@pytest.mark.parametrize("option", ["--similar_text_pair", "--similar_text_pair_file"])
def test_command_prints_the_metrics_and_reports_queries_of_one_file_alone(
    option: str, files: tuple[Path, Path]
) -> None:
    pairs, result = files
    done = command(option, pairs, "--recall_result_file", result, "--recall_num", 5)
    assert done.returncode == 0
    assert done.stdout == "recall@1=25.0\nrecall@5=25.0\nmrr@5=50.0\nndcg@5=30.657\n"
    without_results, unknown = done.stderr.splitlines()
    assert "1 of 2 queries have no result" in without_results and "查询二" in without_results
    assert "left out 1 queries" in unknown and "查询三" in unknown


def test_command_skips_bad_lines_of_the_pairs_if_told_to(files: tuple[Path, Path]) -> None:
    pairs, result = files
    with open(pairs, "a", encoding="utf-8") as file:
        file.write("没有标题\n")
    options = ("--similar_text_pair", pairs, "--recall_result_file", result)
    refused, skipped = command(*options), command(*options, "--skip_bad_lines")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{pairs}:4" in refused.stderr
    assert skipped.returncode == 0
    assert skipped.stdout.startswith("recall@1=25.0\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recall_num": 0}, "0 is out of range"),
        ({"--recall_num": "ten"}, "'ten'"),
        ({"--similar_text_pair": "missing.csv"}, "missing.csv: no such file"),
        ({"--recall_result_file": "missing.txt"}, "missing.txt: no such file"),
        ({"--recall_result_file": "tests"}, "is a folder"),
    ],
)
def test_command_refuses_bad_input_in_one_line(
    change: dict[str, object], message: str, files: tuple[Path, Path]
) -> None:
    options = {"--similar_text_pair": files[0], "--recall_result_file": files[1]} | change
    done = command(*(part for option in options.items() for part in option))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_needs_both_files(files: tuple[Path, Path]) -> None:
    for options in (("--similar_text_pair", files[0]), ("--recall_result_file", files[1])):
        done = command(*options)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "required" in done.stderr


def test_imports_no_paddle() -> None:
    code = "import sys, evaluate; sys.exit(bool({'paddle', 'paddlenlp'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
