"""A training that version 1.0.0 began is resumed."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import train_batch_neg
from batch_negative.resume import read_training_state
from common.errors import InputError
from helpers import V1, latest_folder
from modeling.checkpoint_files import step_folders
from modeling.weight_files import read_weights

OPTIONS = [  # of version 1's training
    *("--from_scratch", "ernie", "--train_set_file", "recall/train.csv", "--save_dir", "run"),
    *("--max_seq_length", "24", "--pooling", "mean", "--output_emb_size", "8", "--batch_size", "8"),
    *("--learning_rate", "2e-3", "--max_steps", "4", "--save_steps", "2"),
]
EVALUATION = [
    *("--evaluate", "--eval_steps", "2", "--similar_text_pair", "recall/dev.csv"),
    *("--corpus_file", "recall/corpus.csv", "--ann", "exact", "--recall_num", "5", "--recall_result_dir", "result"),
]


@pytest.fixture
def _interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is that of version 1, killed after step 2.

    Training pads as version 1 did: without padding, dropout takes other elements.
    """
    monkeypatch.setattr("modeling.packed_texts.pack_texts", lambda _: None)
    shutil.copytree(V1, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "model_4")
    monkeypatch.chdir(tmp_path)


def assert_step_4_is_version_1s() -> None:
    """To 1e-5: processors differ."""
    ours, theirs = (
        {**read_weights(folder / "model_state.pdparams"), **read_weights(folder / "training_optimizer.safetensors")}
        for folder in (Path("run", "model_4"), V1 / "run" / "model_4")
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("_interrupted")
@pytest.mark.parametrize("resume_from", ["latest", "run/model_2"])
def test_a_training_of_version_1_is_resumed(capsys: pytest.CaptureFixture, resume_from: str) -> None:
    assert train_batch_neg.main([*OPTIONS, *EVALUATION, "--resume_from", resume_from]) == 0
    assert_step_4_is_version_1s()
    captured = capsys.readouterr()
    assert "steps 3 to 4" in captured.err and captured.out.count("recall@5=") == 1  # that of step 2 isn't made again

    ours, theirs = (
        read_training_state(folder / "model_4").progress["evaluator"] for folder in (Path("run"), V1 / "run")
    )
    assert len(ours["reports"]) == 2
    assert ours["reports"][0] == theirs["reports"][0]
    assert ours["reports"][1].startswith("global step 4, epoch 1\trecall@1=")
    assert ours["best"] == theirs["best"]
    assert (ours["last_step"], ours["evals_without_improvement"]) == (theirs["last_step"], theirs["without_gain"])
    assert Path("result", "evaluate_result.txt").read_text().splitlines() == ours["reports"]

    assert (
        read_training_state(Path("run", "model_4")).progress["run_config"]
        == (read_training_state(V1 / "run" / "model_4").progress["run_config"])
    )


@pytest.mark.usefixtures("_interrupted")
def test_a_training_of_version_1_is_resumed_without_its_evaluation() -> None:
    assert train_batch_neg.main([*OPTIONS, "--resume_from", "latest"]) == 0
    assert_step_4_is_version_1s()


def test_a_complete_training_of_version_1_has_nothing_left_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(V1, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert train_batch_neg.main([*OPTIONS, *EVALUATION, "--resume_from", "latest"]) == 0
    assert capsys.readouterr().out == "run/model_4: training is complete, nothing to do\n"
    assert sorted(path.name for path in Path("run", "model_4").iterdir()) == sorted(
        path.name for path in (V1 / "run" / "model_4").iterdir()
    )


@pytest.mark.usefixtures("_interrupted")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--no_mask_duplicates"], "no_false_negative_mask False, not True"),
        (["--seed", "1"], "seed 1000, not 1"),
        ([*EVALUATION, "--best_metric", "recall@1"], "best_metric recall@5, not recall@1"),
    ],
)
def test_other_options_than_version_1s_are_refused(changed: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^run/model_2: was trained with {message}; "):
        train_batch_neg.main([*OPTIONS, *changed, "--resume_from", "run/model_2"])


@pytest.mark.usefixtures("_interrupted")
def test_old_checkpoints_of_version_1_are_removed() -> None:
    assert train_batch_neg.main([*OPTIONS, "--resume_from", "latest", "--keep_checkpoints", "1"]) == 0
    assert [folder.name for folder in step_folders(Path("run"))] == ["model_4"]


@pytest.mark.usefixtures("_interrupted")
@pytest.mark.parametrize("name", ["model.safetensors", "model_state.pdparams"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_checkpoint_of_version_1_is_passed_over(name: str, damage: str) -> None:
    """Version 1 wrote the weights twice, and the manifest has both files."""
    file = Path("run", "model_2", name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage == "flipped":
        file.write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_training_state(file.parent)
    assert latest_folder(Path("run")) is None
