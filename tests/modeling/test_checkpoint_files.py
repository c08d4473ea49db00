"""Where a checkpoint's files are, and which folders aren't one; no Paddle."""

import shutil
from pathlib import Path

import pytest

from common.errors import InputError
from modeling.checkpoint_files import WEIGHTS_FILES, check_checkpoint, find_weights, step_folder, step_folders

WEIGHTS = "model_state.pdparams"


def folders(parent: Path, *names: str) -> Path:
    """Folders with weights files that are never read."""
    for name in names:
        (parent / name).mkdir(parents=True)
        (parent / name / WEIGHTS).write_bytes(b"")
    return parent


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    """Other folders and files are left out."""
    folders(tmp_path, "model_9", "model_10", "model_2", "model_best", "model_x2", "models_3", ".model_11.tmp")
    (tmp_path / "model_12").write_text("")
    assert step_folders(tmp_path) == [step_folder(tmp_path, step) for step in (2, 9, 10)]
    assert step_folders(tmp_path / "missing") == []


def test_weights_are_found_by_folder_and_by_file(tmp_path: Path) -> None:
    """Version 1 wrote two files: in its folders the .pdparams file is used unless the other is named."""
    folder = folders(tmp_path, "model_4") / "model_4"
    other = folder / "model.safetensors"
    other.write_bytes(b"")
    assert find_weights(folder) == find_weights(folder / WEIGHTS) == folder / WEIGHTS
    assert find_weights(other) == other
    (folder / WEIGHTS).unlink()
    assert find_weights(folder) == other
    other.unlink()
    with pytest.raises(InputError, match=rf"^{folder}: has no {', '.join(WEIGHTS_FILES)} or pytorch_model.bin$"):
        find_weights(folder)
    with pytest.raises(InputError, match=f"^{folder / WEIGHTS}: no such checkpoint$"):
        find_weights(folder / WEIGHTS)


def test_a_checkpoint_whose_replacement_was_interrupted_is_found(tmp_path: Path) -> None:
    folders(tmp_path, ".model.replaced")
    for name in ("model", f"model/{WEIGHTS}"):
        assert find_weights(tmp_path / name) == tmp_path / ".model.replaced" / WEIGHTS


@pytest.mark.parametrize("place", ["", "model_40", f"model_40/{WEIGHTS}"])
def test_the_newest_other_checkpoint_is_named(tmp_path: Path, place: str) -> None:
    folders(tmp_path, "model_9", "model_10", "model_best")
    with pytest.raises(InputError, match=f"; the newest in {tmp_path} is model_10$"):
        check_checkpoint(tmp_path / place)


@pytest.mark.parametrize("name", ["config.json", "semantic_index.json", "vocab.txt", "tokenizer_config.json"])
def test_files_beside_the_weights_are_compared_with_the_manifest(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """The weights and what only a resumed training reads aren't."""
    folder = shutil.copytree(checkpoint, tmp_path / "model_4")
    for other in (WEIGHTS, "training_state.json"):
        (folder / other).write_bytes(b"changed")
    assert check_checkpoint(folder) == folder / WEIGHTS
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    with pytest.raises(InputError, match=f"^{folder / name}: isn't as it was written"):
        check_checkpoint(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"^{folder / name}: is missing, though manifest.json lists it"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "semantic_index.json", "vocab.txt"])
def test_without_a_manifest_files_beside_the_weights_are_read(checkpoint: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model_4")
    (folder / "manifest.json").unlink()
    (folder / name).write_bytes(b"{")
    with pytest.raises(InputError, match=f"^{folder / name}: isn't a"):
        check_checkpoint(folder)
