"""What training says: scores that are kept, the log, and the metrics that it evaluates."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import monitor
import pytest

import train_batch_neg
from ann_util import IndexOptions
from batch_negative.evaluator import Evaluator
from batch_negative.trainer import Step
from batch_negative.training_log import TrainingLog
from helpers import train_options


def make_evaluator(folder: Path) -> Evaluator:
    """With a corpus that is never searched."""
    return Evaluator(
        SimpleNamespace(sha256="of the corpus"),
        {},
        batch_size=1,
        recall_num=5,
        index_options=IndexOptions(),
        embedding_parent=folder,
        result_file=folder / "hits.txt",
        report_file=folder / "report.txt",
        best_metric="recall@5",
    )


def test_an_evaluator_goes_on_where_another_was(tmp_path: Path) -> None:
    first, second = make_evaluator(tmp_path), make_evaluator(tmp_path)
    for step, score in ((2, 0.5), (4, 0.4)):
        first._judge(step, score)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    for evaluator in (first, second):
        evaluator._judge(6, 0.5)
        assert (evaluator.is_best, evaluator.evals_without_improvement, evaluator.last_step) == (False, 2, 6)


def test_speed_and_time_left_are_those_of_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ten seconds a step; a resumed run's first steps and a pause don't count."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(monitor.time, "monotonic", lambda: clock.now)
    log = TrainingLog(tmp_path, 2, 107, 100)
    for number in range(101, 108):
        clock.now += 10
        log.step(Step(number, 1, 0.5, 1e-3, 16, False))
        if number in (102, 103):
            clock.now += 1000
            log.resume_clock(1000)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)/107", line)[1] for line in lines] == ["102", "104", "106", "107"]
    assert [re.search(r"left: (.*)", line)[1] for line in lines] == ["00:00:50", "00:00:30", "00:00:10", "00:00:00"]
    assert all("speed: 0.10 step/s, 1.6 pairs/s" in line for line in lines)


def test_metrics_are_those_at_recall_num(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--max_steps", "1", "--evaluate", "--recall_num", "7", "--best_metric", "ndcg@7", "--ann", "exact"]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options += ["--recall_result_dir", str(tmp_path / "results")]
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options)) == 0
    report = (tmp_path / "results" / "evaluate_result.txt").read_text()
    assert re.findall("([a-z]+@[0-9]+)=", report) == ["recall@1", "recall@5", "mrr@7", "ndcg@7"]
