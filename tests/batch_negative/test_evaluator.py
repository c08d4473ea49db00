"""Evaluations during training: what they compute, the files that they write, and their history."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

import evaluate as evaluate_script
import recall
import train_batch_neg
from ann_util import IndexOptions
from batch_negative import evaluator as evaluator_module
from batch_negative.evaluator import Evaluator
from common.errors import InputError
from data import positives_by_query, read_text_pairs
from helpers import evaluation_options, file_size_limit, train_options
from modeling.checkpoint import load_checkpoint
from retrieval.corpus import read_corpus
from retrieval.metrics import Evaluation, evaluate


def make_evaluator(recall_data: Path, folder: Path, recall_num: int = 10) -> Evaluator:
    return Evaluator(
        read_corpus(recall_data / "corpus.csv"),
        positives_by_query(read_text_pairs(recall_data / "dev.csv")),
        batch_size=16,
        recall_num=recall_num,
        index_options=IndexOptions(ann="exact"),
        embedding_parent=folder,
        recall_result_dir=folder,
        recall_result_file="hits.txt",
        evaluate_result="report.txt",
        best_metric="recall@5",
    )


def with_recall(score: float) -> Evaluation:
    """An evaluation whose Recall@5 is the score."""
    nothing = evaluate({"query": {"title"}}, {}, 10)
    return nothing._replace(recall={**nothing.recall, 5: score})


def test_an_evaluation_equals_recall_and_evaluate_scripts(
    checkpoint: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, tokenizer, _, _ = load_checkpoint(checkpoint)
    evaluation = make_evaluator(recall_data, tmp_path)(model, tokenizer, 7, 2)
    options = ["--similar_text_pair_file", str(recall_data / "dev.csv")]
    recall.main(
        [
            *(*options, "--corpus_file", str(recall_data / "corpus.csv"), "--params_path", str(checkpoint)),
            *("--recall_result_dir", str(tmp_path), "--ann", "exact", "--recall_num", "10", "--device", "cpu"),
        ]
    )
    ours, theirs = (
        [line.split("\t")[:2] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("hits.txt", "recall_result.txt")
    )
    assert ours == theirs and len(ours) == 40 * 10
    capsys.readouterr()
    evaluate_script.main([*options, "--recall_result_file", str(tmp_path / "recall_result.txt"), "--recall_num", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "report.txt").read_text() == "\t".join(["global step 7, epoch 2", *lines]) + "\n"
    assert f"recall@5={round(100 * evaluation.recall[5], 3)}" in lines


def test_an_evaluation_changes_nothing_until_it_is_recorded(
    checkpoint: Path, recall_data: Path, tmp_path: Path
) -> None:
    model, tokenizer, _, _ = load_checkpoint(checkpoint)
    evaluator = make_evaluator(recall_data, tmp_path)
    evaluator.record(with_recall(0.4), 2, 1)
    before = json.dumps(evaluator.state()), evaluator.score, evaluator.is_best
    for _ in range(2):  # the second one stands for the one after an interruption
        evaluation = evaluator(model, tokenizer, 4, 1)
        assert (json.dumps(evaluator.state()), evaluator.score, evaluator.is_best) == before
        report = (tmp_path / "report.txt").read_text().splitlines()
        assert [line.split(",")[0] for line in report] == ["global step 2", "global step 4"]
    evaluator.record(evaluation, 4, 1)
    assert evaluator.state()["reports"] == report
    assert (evaluator.last_step, evaluator.score) == (4, evaluation.recall[5])


@pytest.mark.parametrize("name", ["hits.txt", "report.txt"])
def test_an_evaluation_whose_files_do_not_fit_changes_nothing(
    checkpoint: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, tokenizer, _, _ = load_checkpoint(checkpoint)
    evaluator = make_evaluator(recall_data, tmp_path)
    evaluator.record(with_recall(0.4), 2, 1)
    before = json.dumps(evaluator.state())
    (tmp_path / name).write_text("of the evaluation before\n")
    writes = "write_hits" if name == "hits.txt" else "atomic_write"
    plain = getattr(evaluator_module, writes)
    with contextlib.ExitStack() as held:

        def without_space(*arguments: Any) -> Any:
            held.enter_context(file_size_limit(20))
            return plain(*arguments)

        monkeypatch.setattr(evaluator_module, writes, without_space)
        with pytest.raises(InputError, match=rf"{name}: can't be written \(File too large\)"):
            evaluator(model, tokenizer, 4, 1)
    assert json.dumps(evaluator.state()) == before
    assert (tmp_path / name).read_text() == "of the evaluation before\n"
    assert {path.name for path in tmp_path.iterdir()} <= {"hits.txt", "report.txt"}


def test_the_best_is_the_first_of_equal_ones(recall_data: Path, tmp_path: Path) -> None:
    evaluator = make_evaluator(recall_data, tmp_path)
    seen = []
    for step, score in enumerate((0.2, 0.7, 0.7, 0.5, 0.8), 1):
        evaluator.record(with_recall(score), step, 1)
        seen.append((evaluator.is_best, evaluator.evals_without_improvement, evaluator.last_step, evaluator.score))
    assert seen == [(True, 0, 1, 0.2), (True, 0, 2, 0.7), (False, 1, 3, 0.7), (False, 2, 4, 0.5), (True, 0, 5, 0.8)]


def test_an_evaluator_continues_from_the_state_of_another(recall_data: Path, tmp_path: Path) -> None:
    first, second = (make_evaluator(recall_data, tmp_path) for _ in range(2))
    for step, score in ((2, 0.5), (4, 0.4)):
        first.record(with_recall(score), step, 1)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    for evaluator in (first, second):
        evaluator.record(with_recall(0.5), 6, 1)
        assert (evaluator.is_best, evaluator.evals_without_improvement, evaluator.last_step) == (False, 2, 6)
    assert second.state() == first.state()


def test_an_evaluator_continues_from_the_state_of_version_1(recall_data: Path, tmp_path: Path) -> None:
    evaluator = make_evaluator(recall_data, tmp_path)
    evaluator.record(with_recall(0.5), 2, 1)
    state = evaluator.state()
    state["without_gain"] = state.pop("evals_without_improvement") + 3
    evaluator.restore(state)
    assert evaluator.evals_without_improvement == 3


def test_scores_are_compared_under_equal_conditions_only(recall_data: Path, tmp_path: Path) -> None:
    evaluator, same, other = (make_evaluator(recall_data, tmp_path, k) for k in (10, 10, 20))
    assert evaluator.conditions == same.conditions
    assert evaluator.conditions | {"recall_num": 20} == other.conditions
    assert evaluator.state().items() >= evaluator.conditions.items()


def test_metrics_are_those_at_recall_num(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    options = evaluation_options(recall_data, tmp_path / "results", "--recall_num", "7", "--best_metric", "ndcg@7")
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1", *options)) == 0
    report = (tmp_path / "results" / "evaluate_result.txt").read_text()
    assert re.findall("([a-z]+@[0-9]+)=", report) == ["recall@1", "recall@5", "mrr@7", "ndcg@7"]


def test_the_best_model_s_report_is_that_of_its_hits(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the step and isn't written again for a worse one."""
    scores = iter((0.5, 0.4))
    plain = evaluator_module.evaluate

    def scored(*arguments: Any) -> Evaluation:
        evaluation = plain(*arguments)
        return evaluation._replace(recall={**evaluation.recall, 5: next(scores)})

    monkeypatch.setattr(evaluator_module, "evaluate", scored)
    options = evaluation_options(recall_data, tmp_path / "results", "--max_steps", "2", "--eval_steps", "1")
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options, "--recall_num", "10")) == 0
    report = (tmp_path / "results" / "model_best_report.html").read_text()
    assert "model_best, step 1<" in report and "model_best, step 2<" not in report
    assert "40 queries with 40 right answers; the first 10 documents" in report
    names = {"recall_result_init.txt", "evaluate_result.txt", "model_best_report.html"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
