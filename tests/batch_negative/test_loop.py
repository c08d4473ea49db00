"""The training loop: when it saves and evaluates, when it ends, and what signals and failures leave behind."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import train_batch_neg
from batch_negative import evaluator as evaluator_module
from batch_negative import loop as loop_module
from batch_negative.batches import epoch_batches
from batch_negative.evaluator import Evaluator
from batch_negative.resume import read_training_state
from common.errors import InputError
from common.manifest import check_manifest, read_manifest
from helpers import (
    all_pairs,
    assert_same_bits,
    assert_same_weights,
    evaluation_options,
    file_size_limit,
    latest_folder,
    poisoned,
    train_options,
    write_pairs,
)
from modeling import checkpoint as checkpoint_module
from modeling.checkpoint import load_checkpoint
from modeling.checkpoint_files import step_folders
from modeling.training_progress import EVALUATIONS_FILE
from retrieval.metrics import Evaluation


def evaluations(checkpoint: Path) -> dict[str, Any]:
    """The history of evaluations that a training resumed from a checkpoint has."""
    return read_training_state(checkpoint).progress["evaluator"]


def report_steps(result_dir: Path) -> list[str]:
    """The steps whose evaluations the report has."""
    lines = (result_dir / "evaluate_result.txt").read_text().splitlines()
    return [line.split(",")[0].removeprefix("global step ") for line in lines]


def give_scores(monkeypatch: pytest.MonkeyPatch, scores: Iterator[float]) -> None:
    """Gives the evaluations these scores, whatever the metric."""
    plain = evaluator_module.evaluate

    def scored(*arguments: Any) -> Evaluation:
        evaluation, score = plain(*arguments), next(scores)
        return evaluation._replace(recall=dict.fromkeys(evaluation.recall, score), mrr=score, ndcg=score)

    monkeypatch.setattr(evaluator_module, "evaluate", scored)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and evaluating


def test_evaluating_does_not_change_the_training(
    model_folder: Path, recall_data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = evaluation_options(recall_data, tmp_path / "results", "--max_steps", "4", "--eval_steps", "1")
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert_same_weights(tmp_path / "model_4", checkpoint)
    assert report_steps(tmp_path / "results") == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("interval", "steps"),
    [(("--max_steps", "5", "--eval_steps", "2"), ["2", "4", "5"]), (("--epochs", "2"), ["8", "16"])],
    ids=["steps", "epochs"],
)
def test_it_evaluates_at_the_interval_and_at_the_end(
    model_folder: Path, recall_data: Path, tmp_path: Path, interval: tuple[str, ...], steps: list[str]
) -> None:
    options = evaluation_options(recall_data, tmp_path / "results", *interval)
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert report_steps(tmp_path / "results") == steps
    last = step_folders(tmp_path)[-1]
    assert last.name == f"model_{steps[-1]}"
    assert evaluations(last)["last_step"] == int(steps[-1])  # a training resumed from it evaluates nothing again


def test_each_checkpoint_is_written_once_and_before_its_evaluation(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def note(target: Any, name: str, what: Callable[..., str]) -> None:
        plain = getattr(target, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            done.append(what(*arguments))
            return plain(*arguments, **options)

        monkeypatch.setattr(target, name, noted)

    note(loop_module, "save_checkpoint", lambda folder, *_: f"save {folder.name}")
    note(loop_module, "write_json", lambda path, _: f"write {path.relative_to(tmp_path)}")
    note(Evaluator, "__call__", lambda *arguments: f"evaluate {arguments[3]}")
    give_scores(monkeypatch, iter((0.5, 0.4, 0.6)))
    options = evaluation_options(recall_data, tmp_path / "results", "--max_steps", "5", "--eval_steps", "2")
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options, "--save_steps", "4"))
    assert done == [
        *("evaluate 2", "save model_best"),
        *("save model_4", "evaluate 4", f"write model_4/{EVALUATIONS_FILE}"),
        *("save model_5", "evaluate 5", "save model_best", f"write model_5/{EVALUATIONS_FILE}"),
    ]


def test_the_history_lies_beside_the_files_of_the_manifest(
    model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    options = evaluation_options(recall_data, tmp_path / "results", "--max_steps", "4", "--eval_steps", "2")
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options, "--save_steps", "2"))
    report = (tmp_path / "results" / "evaluate_result.txt").read_text().splitlines()
    for count, folder in enumerate(step_folders(tmp_path), 1):
        assert EVALUATIONS_FILE not in read_manifest(folder)["files"]
        check_manifest(folder)
        assert load_checkpoint(folder)
        assert evaluations(folder)["reports"] == report[:count]
    (tmp_path / "model_4" / EVALUATIONS_FILE).unlink()
    assert evaluations(tmp_path / "model_4")["reports"] == report[:1]  # the checkpoint itself has the earlier ones
    assert not (tmp_path / "model_best" / EVALUATIONS_FILE).exists()


def test_model_best_is_the_best(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_scores(monkeypatch, iter((0.2, 0.7, 0.7, 0.5)))
    options = evaluation_options(recall_data, tmp_path / "results", "--max_steps", "4", "--eval_steps", "1")
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options, "--save_steps", "1"))
    assert_same_weights(tmp_path / "model_best", tmp_path / "model_2")
    assert "global_step: 2, recall: 0.7" in (tmp_path / "model_best" / "train_result.txt").read_text()


@pytest.mark.parametrize(("patience", "last"), [(None, 16), (1, 4), (2, 12)])
def test_training_ends_without_improvement(
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    patience: int | None,
    last: int,
) -> None:
    """Evaluated every two steps: best at 2, worse at 4, best at 6 and 8, no better at 10 and 12."""
    scores = dict(zip(range(2, 17, 2), (0.5, 0.4, 0.55, 0.6, 0.6, 0.1, 0.9, 0.2), strict=True))
    give_scores(monkeypatch, iter(scores.values()))
    options = evaluation_options(recall_data, tmp_path / "results", "--eval_steps", "2", "--save_steps", "1000")
    options += ["--best_metric", "mrr@7", "--recall_num", "7", "--max_steps", "16"]
    options += ["--early_stop_patience", str(patience)] if patience else []
    options = train_options(model_folder, recall_data, tmp_path, *options)
    assert train_batch_neg.main(options) == 0
    assert [folder.name for folder in step_folders(tmp_path)] == [f"model_{last}"]
    best = max((step for step in scores if step <= last), key=scores.__getitem__)
    assert (tmp_path / "model_best" / "train_result.txt").read_text().split(", ")[1:] == [
        f"global_step: {best}",
        f"mrr: {scores[best]}\n",
    ]
    assert ("stopping early" in capsys.readouterr().err) == bool(patience)

    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0  # it doesn't train or evaluate again
    assert capsys.readouterr().out == f"{tmp_path / f'model_{last}'}: training is complete, nothing to do\n"


# ---------------------------------------------------------------------------------------------------------------------
# Signals

SIGNAL_STEPS = ["--max_steps", "12", "--batch_size", "8", "--save_steps", "4", "--eval_steps", "6"]


def signal_options(model_folder: Path, recall_data: Path, folder: Path) -> list[str]:
    """Twelve steps, saved after every four and evaluated after every six."""
    options = evaluation_options(recall_data, folder / "results", *SIGNAL_STEPS)
    return train_options(model_folder, recall_data, folder / "checkpoints", *options)


@pytest.fixture(scope="module")
def whole(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_batch_neg.main(signal_options(model_folder, recall_data, folder)) == 0
    return folder


def assert_same_training(ours: Path, whole: Path) -> None:
    """The same bits, the same best model, and the same history of evaluations."""
    assert_same_bits(ours / "checkpoints" / "model_12", whole / "checkpoints" / "model_12")
    assert_same_weights(ours / "checkpoints" / "model_best", whole / "checkpoints" / "model_best")
    histories = [evaluations(folder / "checkpoints" / "model_12") for folder in (ours, whole)]
    assert histories[0] == histories[1] and len(histories[0]["reports"]) == 2
    for name in ("evaluate_result.txt", "recall_result_init.txt"):
        assert (ours / "results" / name).read_text() == (whole / "results" / name).read_text()


def stop_after(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, call: int = 1) -> None:
    """Sends this process SIGTERM after some call of a function."""
    plain, calls = getattr(target, name), iter(range(1, 1000))

    def stopped(*arguments: Any, **options: Any) -> Any:
        result = plain(*arguments, **options)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(target, name, stopped)


@pytest.mark.parametrize("place", ["encode_queries", "search", "write_hits", "broadcast_object"])
@pytest.mark.parametrize(("call", "step"), [(1, 6), (2, 12)], ids=["in between", "at the end"])
def test_a_stopped_evaluation_is_made_again(
    whole: Path,
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    place: str,
    call: int,
    step: int,
) -> None:
    """Its step is saved, also the one that wouldn't be saved otherwise."""
    options = signal_options(model_folder, recall_data, tmp_path)
    with monkeypatch.context() as patched:
        stop_after(patched, evaluator_module, place, call)
        assert train_batch_neg.main(options) == 128 + signal.SIGTERM
    folder = tmp_path / "checkpoints" / f"model_{step}"
    assert latest_folder(tmp_path / "checkpoints") == folder
    said = f"stopped by SIGTERM after step {step}: wrote {folder}; go on with --resume_from latest\n"
    assert said in capsys.readouterr().err
    assert len(evaluations(folder)["reports"]) == call - 1
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert_same_training(tmp_path, whole)


def test_a_signal_after_an_evaluation_does_not_lose_it(
    whole: Path, model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training ends after the next step."""
    options = signal_options(model_folder, recall_data, tmp_path)
    with monkeypatch.context() as patched:
        stop_after(patched, Evaluator, "record")
        assert train_batch_neg.main(options) == 128 + signal.SIGTERM
    folder = latest_folder(tmp_path / "checkpoints")
    assert folder.name == "model_7" and evaluations(folder)["last_step"] == 6
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert_same_training(tmp_path, whole)


def test_a_signal_while_saving_skips_the_evaluation(
    whole: Path, model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last step, which is saved whole before the training ends."""
    options = signal_options(model_folder, recall_data, tmp_path)
    with monkeypatch.context() as patched:  # the manifests of model_4, model_best, model_8 and model_12
        stop_after(patched, checkpoint_module, "write_manifest", 4)
        assert train_batch_neg.main(options) == 128 + signal.SIGTERM
    folder = latest_folder(tmp_path / "checkpoints")
    assert folder.name == "model_12" and evaluations(folder)["last_step"] == 6
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert_same_training(tmp_path, whole)


def test_a_signal_while_the_last_step_is_saved_comes_too_late(
    whole: Path, model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an evaluation there is nothing left to stop."""
    stop_after(monkeypatch, checkpoint_module, "write_manifest")
    options = ["--max_steps", "12", "--batch_size", "8", "--save_steps", "100"]
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options)) == 0
    assert_same_weights(whole / "checkpoints" / "model_12", tmp_path / "model_12")


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(("call", "step"), [(1, 6), (2, 12)], ids=["in between", "at the end"])
def test_a_failed_evaluation_leaves_a_checkpoint_to_go_on_from(
    whole: Path,
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    call: int,
    step: int,
) -> None:
    """There is no space for the recall result."""
    plain, calls = evaluator_module.write_hits, iter(range(1, 3))

    def without_space(*arguments: Any) -> None:
        with file_size_limit(1000 if next(calls) == call else 10**6):
            plain(*arguments)

    options = signal_options(model_folder, recall_data, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(evaluator_module, "write_hits", without_space)
        with pytest.raises(InputError, match=r"recall_result_init.txt: can't be written \(File too large\)"):
            train_batch_neg.main(options)
    said = f"the evaluation after step {step} failed; it is repeated when the run is resumed\n"
    assert said in capsys.readouterr().err
    folder = latest_folder(tmp_path / "checkpoints")
    assert folder.name == f"model_{step}" and len(evaluations(folder)["reports"]) == call - 1
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert_same_training(tmp_path, whole)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's, beside the one line
def test_nan_loss_ends_the_training_and_names_the_lines(model_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """[UNK] has a vector that overflows, and one line of the third step's batch an unknown character."""
    steps = epoch_batches(64, 16, seed=1000, epoch=1)
    pairs = all_pairs()[:64]
    pairs[steps[2][0][5]] = ("鑫", pairs[steps[2][0][5]][1])
    write_pairs(tmp_path / "data" / "train.csv", pairs)
    weights = poisoned(checkpoint, tmp_path / "poisoned")
    options = ["--epochs", "1", "--save_steps", "1", "--init_from_ckpt", str(weights)]
    with pytest.raises(InputError) as error:
        train_batch_neg.main(train_options(model_folder, tmp_path / "data", tmp_path / "out", *options))
    message = str(error.value)
    assert message.startswith("the loss of step 3 is nan; ") and "\n" not in message
    lines = ", ".join(str(row + 1) for row in sorted(steps[2][0]))
    assert f"the batch has lines {lines} of {tmp_path / 'data' / 'train.csv'}; " in message
    assert {folder.name for folder in (tmp_path / "out").iterdir()} == {"model_1", "model_2", "visualdl"}
    assert load_checkpoint(tmp_path / "out" / "model_2")


@pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's, beside the one line
def test_nan_loss_counts_skipped_lines(model_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    steps = epoch_batches(32, 16, seed=1000, epoch=1)
    pairs = all_pairs()[:32]
    pairs[steps[0][0][5]] = ("鑫", pairs[steps[0][0][5]][1])
    write_pairs(tmp_path / "train.csv", [*pairs[:3], ("one column",), ("another",), *pairs[3:]])
    options = ["--epochs", "1", "--init_from_ckpt", str(poisoned(checkpoint, tmp_path / "poisoned"))]
    lines = ", ".join(str(row + 1 if row < 3 else row + 3) for row in sorted(steps[0][0]))
    with pytest.raises(InputError, match=f"the batch has lines {lines} of "):
        train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / "out", "--skip_bad_lines", *options))
