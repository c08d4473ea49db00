"""Resuming from a checkpoint: the same bits as without a stop, and a clear refusal where that isn't possible."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import train_batch_neg
from batch_negative import evaluator as evaluator_module
from batch_negative.batches import PlannedStep
from batch_negative.evaluator import Evaluator
from batch_negative.resume import read_training_state
from batch_negative.trainer import Step, Trainer
from common.errors import InputError
from common.files import write_json
from common.manifest import write_manifest
from helpers import (
    all_pairs,
    assert_same_bits,
    assert_same_weights,
    evaluation_options,
    latest_folder,
    run_script,
    train_options,
    write_pairs,
)
from modeling.checkpoint import load_checkpoint
from modeling.checkpoint_files import step_folders
from modeling.training_progress import EVALUATIONS_FILE

Evaluated = tuple[Path, list[str]]  # a training's folder, and its options for the same training in another one
OPTIONS = ["--epochs", "2", "--batch_size", "8", "--save_steps", "3", "--warmup_proportion", "0.2"]
LAST = 2 * 16 // 2  # steps: 128 pairs in 16 batches, two a step
COMMON = [*OPTIONS, "--gradient_accumulation_steps", "2", "--weight_decay", "0.01", "--group_by_length"]


@pytest.fixture(scope="module")
def uninterrupted(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_batch_neg.main(train_options(model_folder, recall_data, folder, *COMMON))
    return folder


@pytest.fixture
def interrupted(uninterrupted: Path, tmp_path: Path) -> Path:
    """What the same training had written after step 9, which lies within the second epoch."""
    folder = tmp_path / "interrupted"
    for step in (3, 6, 9):
        shutil.copytree(uninterrupted / f"model_{step}", folder / f"model_{step}")
    return folder


@pytest.mark.parametrize("resume_from", ["latest", "model_6"])
def test_a_resumed_training_gives_the_same_bits(
    uninterrupted: Path, interrupted: Path, model_folder: Path, recall_data: Path, resume_from: str
) -> None:
    place = resume_from if resume_from == "latest" else str(interrupted / resume_from)
    options = train_options(model_folder, recall_data, interrupted, *COMMON, "--resume_from", place)
    assert train_batch_neg.main(options) == 0
    assert [folder.name for folder in step_folders(interrupted)] == [f"model_{step}" for step in (3, 6, 9, 12, 15, 16)]
    assert_same_bits(uninterrupted / f"model_{LAST}", interrupted / f"model_{LAST}")


@pytest.mark.process
def test_two_ranks_resume_to_the_same_bits(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        options = train_options(model_folder, recall_data, tmp_path / name, *COMMON, "--grad_cache_chunk", "5")
        options += evaluation_options(recall_data, tmp_path / name / "results", "--eval_steps", "4")
        done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
        assert done.returncode == 0, done.stdout + done.stderr
        if name == "parts":
            for step in (6, 8):
                shutil.rmtree(tmp_path / name / f"model_{step}")
            options += ["--resume_from", "latest"]
            done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "resuming from" in done.stdout + done.stderr
    assert_same_bits(tmp_path / "whole" / "model_8", tmp_path / "parts" / "model_8")
    reports = [(tmp_path / name / "results" / "evaluate_result.txt").read_text() for name in ("whole", "parts")]
    assert reports[0] == reports[1]
    assert reports[0].count("global step") == 2
    histories = [read_training_state(tmp_path / name / "model_8").progress["evaluator"] for name in ("whole", "parts")]
    assert histories[0] == histories[1] and histories[0]["last_step"] == 8


@pytest.fixture(scope="module")
def evaluated(
    model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """An uninterrupted training that saves and evaluates the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = evaluation_options(recall_data, Path("results"), "--max_steps", "4", "--eval_steps", "2")
    options = train_options(model_folder, recall_data, Path("checkpoints"), *options, "--save_steps", "2")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert train_batch_neg.main(options) == 0
    return folder, options


def evaluated_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are evaluated from now on."""
    steps: list[int] = []
    plain = Evaluator.__call__

    def noted(evaluator: Evaluator, *arguments: Any) -> object:
        steps.append(arguments[2])
        return plain(evaluator, *arguments)

    monkeypatch.setattr(Evaluator, "__call__", noted)
    return steps


@pytest.mark.parametrize("killed_at", [2, 4])
def test_a_checkpoint_without_its_evaluation_is_evaluated_again(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, killed_at: int
) -> None:
    """What a kill between the saving and the evaluation leaves. The history is that of the uninterrupted training."""
    whole, options = evaluated
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    report = Path("results", "evaluate_result.txt").read_text()
    histories = [read_training_state(folder).progress["evaluator"] for folder in step_folders(Path("checkpoints"))]
    shutil.rmtree("results")
    if killed_at == 2:
        shutil.rmtree("checkpoints/model_4")
        shutil.rmtree("checkpoints/model_best")
    Path("checkpoints", f"model_{killed_at}", EVALUATIONS_FILE).unlink()
    steps = evaluated_steps(monkeypatch)
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert steps == ([2, 4] if killed_at == 2 else [4])
    done = "wrote checkpoints/model_4"
    if killed_at == 4:
        done = "checkpoints/model_4: training is complete, only its evaluation was missing"
    assert capsys.readouterr().out.splitlines()[-1] == done
    assert_same_bits(whole / "checkpoints" / "model_4", Path("checkpoints", "model_4"))
    assert [
        read_training_state(folder).progress["evaluator"] for folder in step_folders(Path("checkpoints"))
    ] == histories
    assert Path("results", "evaluate_result.txt").read_text() == report


def test_the_evaluation_of_a_complete_training_is_kept_in_another_folder(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a checkpoint of the last step, since the one that is resumed from isn't changed."""
    whole, options = evaluated
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    resumed, written = Path("checkpoints", "model_4"), Path("other", "model_4")
    history = read_training_state(resumed).progress["evaluator"]
    (resumed / EVALUATIONS_FILE).unlink()
    assert train_batch_neg.main([*options, "--save_dir", "other", "--resume_from", str(resumed)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {written}"
    assert_same_bits(resumed, written)
    assert read_training_state(written).progress["evaluator"] == history
    assert not (resumed / EVALUATIONS_FILE).exists()


def test_another_index_than_that_of_the_evaluations_before_is_said(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, options = evaluated
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    resume = [*options, "--resume_from", "latest"]
    for changed, line in (([], ""), (["--ann", "hnswlib"], "--ann hnswlib: the evaluations before used exact, ")):
        capsys.readouterr()
        assert train_batch_neg.main([*resume, *changed]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
        assert lines[0].startswith(line) if line else lines == []


def test_a_complete_training_is_not_evaluated_again(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole, options = evaluated
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("results")
    steps = evaluated_steps(monkeypatch)
    capsys.readouterr()
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert capsys.readouterr().out == "checkpoints/model_4: training is complete, nothing to do\n"
    assert steps == [] and list(Path("results").iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_history_that_was_cut_short_costs_its_last_evaluation(
    evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture, content: str
) -> None:
    """As after a power failure; the training state has the evaluations before."""
    shutil.copytree(evaluated[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / "model_4"
    whole = read_training_state(folder).progress["evaluator"]["reports"]
    (folder / EVALUATIONS_FILE).write_text(content)
    assert read_training_state(folder).progress["evaluator"]["reports"] == whole[:-1]
    assert latest_folder(folder.parent) == folder
    expected = rf"{folder / EVALUATIONS_FILE}: isn't a JSON object.*; the evaluation counts as missing\n"
    assert re.fullmatch(expected * 2, capsys.readouterr().err)


def test_a_complete_training_has_nothing_left_to_do(
    uninterrupted: Path, model_folder: Path, recall_data: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (uninterrupted / f"model_{LAST}" / "manifest.json").stat().st_mtime_ns
    options = train_options(model_folder, recall_data, uninterrupted, *COMMON, "--resume_from", "latest")
    assert train_batch_neg.main(options) == 0
    assert (uninterrupted / f"model_{LAST}" / "manifest.json").stat().st_mtime_ns == before
    last = uninterrupted / f"model_{LAST}"
    assert capsys.readouterr().out == f"{last}: training is complete, nothing to do\n"


def test_a_complete_training_is_resumed_into_another_folder(
    uninterrupted: Path,
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Nothing is written and nothing said to be; with an evaluation that is stopped, its step is saved there."""
    last = uninterrupted / f"model_{LAST}"
    options = train_options(model_folder, recall_data, tmp_path, *COMMON, "--resume_from", str(last))
    capsys.readouterr()
    assert train_batch_neg.main(options) == 0
    assert capsys.readouterr().out == f"{last}: training is complete, nothing to do\n"
    assert not step_folders(tmp_path)
    options += evaluation_options(recall_data, tmp_path / "results")
    with monkeypatch.context() as patched:
        patched.setattr(evaluator_module, "search", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train_batch_neg.main(options) == 128 + signal.SIGTERM
    written = tmp_path / f"model_{LAST}"
    said = f"stopped by SIGTERM after step {LAST}: wrote {written}; go on with --resume_from latest\n"
    assert said in capsys.readouterr().err
    assert_same_weights(written, last)
    optimizers = [(folder / "training_optimizer.safetensors").read_bytes() for folder in (written, last)]
    assert optimizers[0] == optimizers[1]
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert read_training_state(written).progress["evaluator"]["last_step"] == LAST


def test_a_stopped_evaluation_of_the_resumed_checkpoint_writes_nothing(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(evaluated[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints", "model_4")
    (folder / EVALUATIONS_FILE).unlink()
    before = (folder / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr(evaluator_module, "search", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert train_batch_neg.main([*evaluated[1], "--resume_from", "latest"]) == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step 4; go on with --resume_from {folder}\n" in capsys.readouterr().err
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert not (folder / EVALUATIONS_FILE).exists()


def test_latest_without_a_checkpoint_starts_at_the_beginning(
    model_folder: Path, recall_data: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = train_options(model_folder, recall_data, tmp_path, "--max_steps", "4", "--resume_from", "latest")
    assert train_batch_neg.main(options) == 0
    assert "no checkpoint to go on from yet" in capsys.readouterr().err
    assert_same_bits(tmp_path / "model_4", checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("name", ["model_state.pdparams", "training_optimizer.safetensors", "training_state.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over(
    interrupted: Path, model_folder: Path, recall_data: Path, name: str, damage: str, capsys: pytest.CaptureFixture
) -> None:
    file = interrupted / "model_9" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "missing":
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"model_9.*{name}"):
        read_training_state(interrupted / "model_9")
    assert latest_folder(interrupted) == interrupted / "model_6"
    assert f"passed over {interrupted / 'model_9'}" in capsys.readouterr().err
    options = train_options(model_folder, recall_data, interrupted, *COMMON, "--resume_from")
    with pytest.raises(InputError, match=name):
        train_batch_neg.main([*options, str(interrupted / "model_9")])
    if name.startswith("training"):
        assert load_checkpoint(interrupted / "model_9")  # the model itself is whole
    else:
        with pytest.raises(InputError, match=name):
            load_checkpoint(interrupted / "model_9")


@pytest.mark.parametrize("name", ["training_state.json", "manifest.json"])
def test_a_folder_without_what_a_resumption_needs_is_passed_over(interrupted: Path, name: str) -> None:
    (interrupted / "model_9" / name).unlink()
    with pytest.raises(InputError, match=f"model_9: has no {name}, so no training can be resumed from it"):
        read_training_state(interrupted / "model_9")
    assert latest_folder(interrupted) == interrupted / "model_6"


def test_a_folder_without_training_state_is_refused(
    interrupted: Path, model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    (interrupted / "model_9" / "training_state.json").unlink()
    (interrupted / "model_9" / "manifest.json").unlink()
    for place, message in ((interrupted / "model_9", "--init_from_ckpt"), (tmp_path / "nowhere", "no such folder")):
        options = train_options(model_folder, recall_data, interrupted, *COMMON, "--resume_from", str(place))
        with pytest.raises(InputError, match=message):
            train_batch_neg.main(options)


def test_a_training_state_of_another_kind_is_refused(interrupted: Path) -> None:
    (interrupted / "model_9" / "training_state.json").write_text('{"step": 9, "run_config": {}}')
    write_manifest(interrupted / "model_9")
    with pytest.raises(InputError, match=r"training_state\.json: .* it lacks evaluator, loss_scaler"):
        read_training_state(interrupted / "model_9")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("batch_size", ["--batch_size", "16"]),
        ("learning_rate", ["--learning_rate", "1e-3"]),
        ("seed", ["--seed", "2"]),
        ("epochs", ["--epochs", "3"]),
        ("margin", ["--margin", "0"]),
        ("SHA-256 of the training file", None),
    ],
)
def test_other_options_are_refused(
    interrupted: Path, model_folder: Path, recall_data: Path, tmp_path: Path, name: str, changed: list[str] | None
) -> None:
    data = recall_data
    if changed is None:
        data = tmp_path / "other"
        write_pairs(data / "train.csv", all_pairs()[1:129])
    options = train_options(model_folder, data, interrupted, *COMMON, "--resume_from", "latest", *(changed or []))
    with pytest.raises(InputError, match=rf"model_9: was trained with {name} .*--init_from_ckpt"):
        train_batch_neg.main(options)


@pytest.mark.process
def test_another_number_of_processes_is_refused_but_weights_are_taken(
    interrupted: Path, model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    options = train_options(model_folder, recall_data, interrupted, *COMMON)
    done = run_script("train_batch_neg.py", *options, "--resume_from", "latest", ranks=2, log_dir=tmp_path / "log")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "model_9: was trained with number of processes 1, not 2; go on with the same, or take its weights" in output
    assert "Traceback" not in output
    options = ["--init_from_ckpt", str(interrupted / "model_9"), "--max_steps", "1"]
    assert train_batch_neg.main(train_options(model_folder, recall_data, tmp_path / "new", *options)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Two trainings in one folder


@pytest.fixture(scope="module")
def started_elsewhere(
    uninterrupted: Path, model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same training from other weights."""
    folder = tmp_path_factory.mktemp("elsewhere")
    start = ["--init_from_ckpt", str(uninterrupted / "model_3")]
    train_batch_neg.main(train_options(model_folder, recall_data, folder, *COMMON, *start))
    return folder


@pytest.fixture
def shared(uninterrupted: Path, started_elsewhere: Path, tmp_path: Path) -> Path:
    """A folder in which the second training was killed after step 9, when the first one had come to its end."""
    folder = tmp_path / "shared"
    for step in (3, 6, 9, 12, 15, 16):
        shutil.copytree((started_elsewhere if step < 10 else uninterrupted) / f"model_{step}", folder / f"model_{step}")
    return folder


def test_latest_is_the_newest_of_the_same_training(
    shared: Path,
    uninterrupted: Path,
    started_elsewhere: Path,
    model_folder: Path,
    recall_data: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    latest = train_options(model_folder, recall_data, shared, *COMMON, "--resume_from", "latest")
    other = ["--init_from_ckpt", str(uninterrupted / "model_6")]
    with pytest.raises(InputError, match=r"model_16: .*with init_from_ckpt None, not .*model_6; .*--save_dir"):
        train_batch_neg.main([*latest, *other])
    assert train_batch_neg.main(latest) == 0
    assert f"resuming from {shared / 'model_16'}\n" in capsys.readouterr().err
    start = ["--init_from_ckpt", f"{uninterrupted / 'model_3'}/"]
    assert train_batch_neg.main([*latest, *start]) == 0
    err = capsys.readouterr().err
    assert "passed over model_16, model_15, model_12: another training's\n" in err
    assert f"resuming from {shared / 'model_9'}\n" in err
    assert_same_bits(started_elsewhere / f"model_{LAST}", shared / f"model_{LAST}")


def test_a_start_is_refused_for_a_checkpoint_of_another(
    shared: Path, uninterrupted: Path, model_folder: Path, recall_data: Path
) -> None:
    options = train_options(model_folder, recall_data, shared, *COMMON, "--resume_from", str(shared / "model_9"))
    with pytest.raises(InputError, match=r"model_9: was trained with init_from_ckpt .*model_3, not None; go on with"):
        train_batch_neg.main(options)


def test_a_new_training_keeps_anothers_checkpoints_of_other_steps(
    interrupted: Path, model_folder: Path, recall_data: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["--max_steps", "8", "--save_steps", "2", "--keep_checkpoints", "2"]
    train_batch_neg.main(train_options(model_folder, recall_data, interrupted, *options))
    assert f"{interrupted}: holds an earlier training's checkpoints, up to model_9; " in capsys.readouterr().err
    assert [folder.name for folder in step_folders(interrupted)] == ["model_3", "model_6", "model_8", "model_9"]


def test_an_older_versions_checkpoint_goes_on_by_name(
    uninterrupted: Path, interrupted: Path, model_folder: Path, recall_data: Path
) -> None:
    """It doesn't tell what its training started from, so that nobody knows whether the latest is this training's."""
    for folder in step_folders(interrupted):
        state = json.loads((folder / "training_state.json").read_text())
        for name in train_batch_neg.STARTING_OPTIONS:
            del state["run_config"][name]
        write_json(folder / "training_state.json", state)
        write_manifest(folder)
    options = train_options(model_folder, recall_data, interrupted, *COMMON, "--resume_from")
    with pytest.raises(InputError, match=r"model_9: doesn't tell its .*, give --resume_from .*model_9$"):
        train_batch_neg.main([*options, "latest"])
    assert train_batch_neg.main([*options, str(interrupted / "model_9")]) == 0
    assert_same_bits(uninterrupted / f"model_{LAST}", interrupted / f"model_{LAST}")


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_a_damaged_later_checkpoint_costs_no_good_one(
    interrupted: Path, model_folder: Path, recall_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the damaged one of the two newest, the ones written after the resumption would be removed at once."""
    (interrupted / "model_9" / "model_state.pdparams").unlink()
    plain_step = Trainer.step

    def ends(trainer: Trainer, planned: PlannedStep, stop: bool) -> Step:
        if planned.number == 9:
            raise InputError("the machine is gone")
        return plain_step(trainer, planned, stop)

    monkeypatch.setattr(Trainer, "step", ends)
    options = train_options(model_folder, recall_data, interrupted, *COMMON, "--resume_from", "latest")
    with pytest.raises(InputError, match="the machine is gone"):
        train_batch_neg.main([*options, "--save_steps", "1", "--keep_checkpoints", "1"])
    assert [folder.name for folder in step_folders(interrupted)] == ["model_8", "model_9"]
    assert latest_folder(interrupted) == interrupted / "model_8"


def test_the_newest_checkpoints_are_kept(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--max_steps", "11", "--save_steps", "2", "--keep_checkpoints", "2"]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert [folder.name for folder in step_folders(tmp_path)] == ["model_10", "model_11"]


def test_scores_of_other_conditions_than_those_that_chose_model_best_are_refused(
    model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    """They can't be compared."""
    options = evaluation_options(recall_data, tmp_path / "results")
    options = train_options(model_folder, recall_data, tmp_path, "--max_steps", "2", "--save_steps", "1", *options)
    assert train_batch_neg.main([*options, "--eval_steps", "1"]) == 0
    shutil.rmtree(tmp_path / "model_2")
    options += ["--resume_from", "latest"]
    with pytest.raises(InputError, match=r"model_1: was trained with best_metric recall@5, not recall@1; go on with"):
        train_batch_neg.main([*options, "--best_metric", "recall@1"])
    fewer = write_pairs(tmp_path / "fewer.csv", all_pairs()[150:])
    for changed, condition in (
        (["--recall_num", "20"], "recall_num 50, not 20"),
        (["--similar_text_pair", str(fewer)], "SHA-256 of the evaluation pairs"),
        (["--corpus_file", str(write_pairs(tmp_path / "c.csv", [("文献",)]))], "SHA-256 of the corpus"),
    ):
        with pytest.raises(InputError, match=f"model_1: was trained with {condition}"):
            train_batch_neg.main([*options, *changed])
    assert train_batch_neg.main([*options, "--best_metric", "recall@5"]) == 0
