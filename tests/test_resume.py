"""Going on from a checkpoint: the same bits as without a stop, and a clear refusal where that can't be."""

import json
import os
import shutil
import signal
from pathlib import Path

import monitor
import pytest

import train_batch_neg
from batch_negative.batches import PlannedStep
from batch_negative.resume import latest_checkpoint, read_training_state
from batch_negative.trainer import Trainer
from common.errors import InputError
from common.files import write_json
from common.manifest import write_manifest
from helpers import all_pairs, assert_same_bits, run_script, train_options, write_pairs
from modeling.checkpoint import load_checkpoint
from modeling.checkpoint_files import step_folders
from retrieval.metrics import evaluate

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


def test_two_ranks_resume_to_the_same_bits(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    evaluation = ["--similar_text_pair", recall_data / "dev.csv", "--corpus_file", recall_data / "corpus.csv"]
    evaluation += ["--evaluate", "--eval_steps", "4", "--ann", "exact", "--recall_result_dir"]
    for name in ("whole", "parts"):
        options = train_options(model_folder, recall_data, tmp_path / name, *COMMON, "--grad_cache_chunk", "5")
        options += [*evaluation, tmp_path / name / "results"]
        done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
        assert done.returncode == 0, done.stdout + done.stderr
        if name == "parts":
            for step in (6, 8):
                shutil.rmtree(tmp_path / name / f"model_{step}")
            options += ["--resume_from", "latest"]
            done = run_script("train_batch_neg.py", *options, ranks=2, log_dir=tmp_path / "log")
            assert done.returncode == 0, done.stdout + done.stderr
            assert "going on from" in done.stdout + done.stderr
    assert_same_bits(tmp_path / "whole" / "model_8", tmp_path / "parts" / "model_8")
    reports = [(tmp_path / name / "results" / "evaluate_result.txt").read_text() for name in ("whole", "parts")]
    assert reports[0] == reports[1]
    assert reports[0].count("global step") == 2
    state = json.loads((tmp_path / "whole" / "model_8" / "training_state.json").read_text())
    assert state["evaluator"]["last_step"] == 8


@pytest.mark.parametrize("step", [8, LAST])
def test_an_evaluation_that_was_cut_short_is_made_up_for(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Its step is saved: that of the first epoch isn't otherwise."""
    options = ["--evaluate", "--similar_text_pair", str(recall_data / "dev.csv")]
    options += ["--corpus_file", str(recall_data / "corpus.csv"), "--ann", "exact", "--recall_result_dir"]
    options = train_options(model_folder, recall_data, tmp_path / "cut", *COMMON, *options, str(tmp_path / "results"))
    evaluator = train_batch_neg.Evaluator.__call__

    def fails(self: object, *arguments: object) -> object:
        if arguments[2] == step:
            raise InputError("the machine is gone")
        return evaluator(self, *arguments)

    monkeypatch.setattr(train_batch_neg.Evaluator, "__call__", fails)
    with pytest.raises(InputError, match="the machine is gone"):
        train_batch_neg.main(options)
    assert step_folders(tmp_path / "cut")[-1].name == f"model_{step}"
    monkeypatch.undo()
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    report = (tmp_path / "results" / "evaluate_result.txt").read_text().splitlines()
    assert [line.split(",")[0] for line in report] == ["global step 8", "global step 16"]


def test_a_finished_training_has_nothing_left_to_do(
    uninterrupted: Path, model_folder: Path, recall_data: Path, capsys: pytest.CaptureFixture
) -> None:
    before = (uninterrupted / f"model_{LAST}" / "manifest.json").stat().st_mtime_ns
    options = train_options(model_folder, recall_data, uninterrupted, *COMMON, "--resume_from", "latest")
    assert train_batch_neg.main(options) == 0
    assert (uninterrupted / f"model_{LAST}" / "manifest.json").stat().st_mtime_ns == before
    assert "global step" not in capsys.readouterr().out


def test_what_lies_elsewhere_is_not_said_to_be_written(
    uninterrupted: Path,
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A finished training is resumed with another --save_dir, and then so that its evaluation is stopped."""
    last = uninterrupted / f"model_{LAST}"
    options = train_options(model_folder, recall_data, tmp_path, *COMMON, "--resume_from", str(last))
    assert train_batch_neg.main(options) == 0
    assert capsys.readouterr().out == f"{last}: training is complete, nothing to do\n"
    monkeypatch.setattr(monitor, "recall", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    options += ["--evaluate", "--similar_text_pair", str(recall_data / "dev.csv")]
    options += ["--corpus_file", str(recall_data / "corpus.csv"), "--recall_result_dir", str(tmp_path / "results")]
    assert train_batch_neg.main(options) == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {LAST}; go on with --resume_from {last}\n" in capsys.readouterr().err
    assert not step_folders(tmp_path)


def test_latest_without_a_checkpoint_starts_at_the_beginning(
    model_folder: Path, recall_data: Path, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    options = train_options(model_folder, recall_data, tmp_path, "--max_steps", "4", "--resume_from", "latest")
    assert train_batch_neg.main(options) == 0
    assert "no checkpoint to go on from yet" in capsys.readouterr().err
    assert_same_bits(tmp_path / "model_4", checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model_state.pdparams", "training_optimizer.safetensors", "training_state.json"]
)
@pytest.mark.parametrize("damage", ["flipped", "missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over(
    interrupted: Path,
    model_folder: Path,
    recall_data: Path,
    name: str,
    damage: str,
    capsys: pytest.CaptureFixture,
) -> None:
    file = interrupted / "model_9" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage != "missing":
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"model_9.*{name}"):
        read_training_state(interrupted / "model_9")
    assert latest_checkpoint(interrupted) == interrupted / "model_6"
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
    with pytest.raises(InputError, match=f"model_9: has no {name}, so no training can go on from it"):
        read_training_state(interrupted / "model_9")
    assert latest_checkpoint(interrupted) == interrupted / "model_6"


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
    (interrupted / "model_9" / "training_state.json").write_text('{"step": 9, "shape": {}}')
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
def started_elsewhere(uninterrupted: Path, model_folder: Path, recall_data: Path, tmp_path_factory) -> Path:
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
    assert f"going on from {shared / 'model_16'}\n" in capsys.readouterr().err
    start = ["--init_from_ckpt", f"{uninterrupted / 'model_3'}/"]
    assert train_batch_neg.main([*latest, *start]) == 0
    err = capsys.readouterr().err
    assert "passed over model_16, model_15, model_12: another training's\n" in err
    assert f"going on from {shared / 'model_9'}\n" in err
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
            del state["shape"][name]
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
    (interrupted / "model_9" / "model.safetensors").unlink()
    plain_step = Trainer.step

    def ends(trainer: Trainer, planned: PlannedStep, stop: bool) -> object:
        if planned.number == 9:
            raise InputError("the machine is gone")
        return plain_step(trainer, planned, stop)

    monkeypatch.setattr(Trainer, "step", ends)
    options = train_options(model_folder, recall_data, interrupted, *COMMON, "--resume_from", "latest")
    with pytest.raises(InputError, match="the machine is gone"):
        train_batch_neg.main([*options, "--save_steps", "1", "--keep_checkpoints", "1"])
    assert [folder.name for folder in step_folders(interrupted)] == ["model_8", "model_9"]
    assert latest_checkpoint(interrupted) == interrupted / "model_8"


def test_the_newest_checkpoints_are_kept(model_folder: Path, recall_data: Path, tmp_path: Path) -> None:
    options = ["--max_steps", "11", "--save_steps", "2", "--keep_checkpoints", "2"]
    train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, *options))
    assert [folder.name for folder in step_folders(tmp_path)] == ["model_10", "model_11"]


@pytest.mark.parametrize(("patience", "last"), [(None, 16), (1, 4), (2, 12)])
def test_training_ends_when_it_no_longer_gets_better(
    model_folder: Path,
    recall_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    patience: int | None,
    last: int,
) -> None:
    """Evaluated every two steps, with scores of our own: best at 2, worse at 4, best at 8, no better at 10 and 12."""
    scores = dict(zip(range(2, 17, 2), (0.5, 0.4, 0.5, 0.6, 0.6, 0.1, 0.9, 0.2), strict=True))
    scores[6] = 0.55
    monkeypatch.setattr(monitor, "recall", lambda *_, **__: None)
    monkeypatch.setattr(monitor, "as_hits", lambda *_: [])
    nothing = evaluate({"query": {"title"}}, {}, 7)
    scored = (nothing._replace(mrr=score) for score in scores.values())
    monkeypatch.setattr(monitor, "evaluate", lambda *_: next(scored))
    options = ["--evaluate", "--eval_steps", "2", "--best_metric", "mrr@7", "--recall_num", "7", "--save_steps", "1000"]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    options += ["--recall_result_dir", str(tmp_path / "results")]
    options += ["--early_stop_patience", str(patience)] if patience else []
    options = train_options(model_folder, recall_data, tmp_path, "--max_steps", "16", *options)
    assert train_batch_neg.main(options) == 0
    assert [folder.name for folder in step_folders(tmp_path)] == [f"model_{last}"]
    best = max((step for step in scores if step <= last), key=scores.__getitem__)
    assert (tmp_path / "model_best" / "train_result.txt").read_text().split(", ")[1:] == [
        f"global_step: {best}",
        f"mrr: {scores[best]}\n",
    ]
    assert ("stopping early" in capsys.readouterr().err) == bool(patience)


def test_a_metric_that_is_not_computed_is_refused(recall_data: Path, tmp_path: Path) -> None:
    options = ["--train_set_file", str(recall_data / "train.csv"), "--evaluate", "--best_metric", "recall@100"]
    options += ["--similar_text_pair", str(recall_data / "dev.csv"), "--corpus_file", str(recall_data / "corpus.csv")]
    with pytest.raises(InputError, match=r"--best_metric recall@100: .* recall@1, recall@5, .* ndcg@50"):
        train_batch_neg.main(options)


def test_scores_of_other_conditions_than_those_that_chose_model_best_are_refused(
    model_folder: Path, recall_data: Path, tmp_path: Path
) -> None:
    """They can't be compared."""
    options = ["--evaluate", "--similar_text_pair", str(recall_data / "dev.csv"), "--ann", "exact"]
    options += ["--corpus_file", str(recall_data / "corpus.csv"), "--recall_result_dir", str(tmp_path / "results")]
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--best_metric", "recall@1"), "does nothing without --evaluate"),
        (("--eval_steps", "1"), "does nothing without --evaluate"),
        (("--early_stop_patience", "1"), "does nothing without --evaluate"),
        (("--chunk_numbers", "2"), "does nothing without --use_gradient_cache"),
        (("--amp_dtype", "bfloat16"), "does nothing without --use_amp"),
        (("--amp_loss_scale", "4"), "does nothing without --use_amp"),
        (("--model_name_or_path", "ernie-3.0-base-zh"), "--from_scratch takes its place"),
        (("--use_gradient_cache", "--grad_cache_chunk", "2"), "--grad_cache_chunk takes its place"),
    ],
)
def test_an_option_without_effect_is_refused(
    model_folder: Path, recall_data: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(InputError, match=f"^{options[0]}: {reason}; "):
        train_batch_neg.main(train_options(model_folder, recall_data, tmp_path, "--max_steps", "1", *options))
    assert not list(tmp_path.iterdir())


def test_mixed_precision_needs_a_gpu(recall_data: Path) -> None:
    with pytest.raises(InputError, match=r"--use_amp: .*--device gpu"):
        train_batch_neg.main(["--train_set_file", str(recall_data / "train.csv"), "--use_amp"])
