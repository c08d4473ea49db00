"""The log lines of a training: speed, time left, learning rate, metrics."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from visualdl import LogReader

import train_batch_neg
from batch_negative import training_log
from batch_negative.trainer import Step
from batch_negative.training_log import TrainingLog, format_duration
from helpers import train_options
from retrieval.metrics import evaluate


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "00:00:00"), (86_399, "23:59:59"), (299_700, "83:15:00"), (360_001, "100:00:01")]
)
def test_duration_of_any_number_of_hours(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_speed_and_time_left_count_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ten seconds a step; the steps before a resumption, and pauses, don't count."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training_log.time, "monotonic", lambda: clock.now)
    log = TrainingLog(tmp_path, 2, 107, 100)
    for number in range(101, 108):
        clock.now += 10
        log.step(Step(number, 1, 0.5, 1e-3, 16, False))
        if number in (102, 103):
            clock.now += 1000
            log.exclude(1000)
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"step (\d+)/107", line)[1] for line in lines] == ["102", "104", "106", "107"]
    assert [re.search(r"left: (.*)", line)[1] for line in lines] == ["00:00:50", "00:00:30", "00:00:10", "00:00:00"]
    assert all("speed: 0.10 step/s, 1.6 pairs/s" in line for line in lines)


def test_visualdl_has_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    log = TrainingLog(tmp_path, 1, 2, 0)
    for number, loss in ((1, 0.5), (2, 0.25)):
        log.step(Step(number, 1, loss, 1e-3, 16, False))
    log.evaluation(evaluate({"query": {"title"}}, {"query": ["other", "title"]}, 5), 2)
    log.close()
    out = capsys.readouterr().out
    assert "loss: 0.50000, " in out and "loss: 0.25000, " in out and "\nmrr@5=50.0\n" in out
    (file,) = tmp_path.iterdir()
    curves = LogReader(file_path=str(file))
    assert [(record.id, record.value) for record in curves.get_data("scalar", "train/loss")] == [(1, 0.5), (2, 0.25)]
    assert [(record.id, record.value) for record in curves.get_data("scalar", "evaluate/mrr@5")] == [(2, 50.0)]


def test_the_learning_rate_of_a_line_is_its_steps_own(
    model_folder: Path, recall_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--max_steps", "4", "--log_steps", "1", "--learning_rate", "0.004"]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert re.findall("lr: ([^,]+)", capsys.readouterr().out) == ["0.004", "0.003", "0.002", "0.001"]
