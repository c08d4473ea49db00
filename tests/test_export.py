"""Exported models: the same vectors in every form, whole folders or none."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import export_model
from base_model import SemanticIndexBase
from common.errors import InputError
from common.files import sha256
from encoding.exported_files import GRAPH_NAME
from encoding.static_graph import StaticEncoder, load_exported
from helpers import ROOT, run_script
from modeling.checkpoint import create_model, load_checkpoint, model_fingerprint, save_checkpoint

FILES = {
    *(f"{GRAPH_NAME}.json", f"{GRAPH_NAME}.pdiparams", "config.json", "semantic_index.json", "vocab.txt"),
    *("tokenizer_config.json", "model_card.json", "manifest.json"),
}


def export(checkpoint: Path, output: Path, *options: str) -> int:
    """Runs the script in this process."""
    return export_model.main(["--params_path", str(checkpoint), "--output_path", str(output), *options])


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_folder_and_model_card(exported: Path, checkpoint: Path) -> None:
    assert {file.name for file in exported.iterdir()} == FILES
    card = json.loads((exported / "model_card.json").read_text(encoding="utf-8"))
    assert card["checkpoint"] == {
        "file": "model_4/model.safetensors",
        "sha256": sha256(checkpoint / "model.safetensors"),
    }
    assert card["fingerprint"] == model_fingerprint(*load_checkpoint(checkpoint))
    assert card["versions"]["paddle"] == paddle.__version__
    assert list(card["inputs"]) == ["input_ids", "token_type_ids"]
    assert list(card["outputs"]) == [StaticEncoder(exported).output_name]
    assert card["embedding_size"] == 16 and card["max_seq_length"] == 24
    assert 0 < card["largest_difference"]["paddle"] <= 1e-5


def test_script_prints_the_difference_and_names_the_files(checkpoint: Path, tmp_path: Path) -> None:
    """As a program, with the defaults; from the `.pdparams` file that the document names."""
    done = run_script(ROOT / "export_model.py", "--params_path", checkpoint / "model_state.pdparams", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert 0 < float(first.removeprefix("largest difference between the model and the paddle graph: ")) <= 1e-5
    assert second == f"wrote output/{GRAPH_NAME}.*"
    assert {path.name for path in tmp_path.iterdir()} == {"output"}
    assert {file.name for file in (tmp_path / "output").iterdir()} == FILES


def test_exported_length_is_what_serving_cuts_to(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "output", "--max_seq_length", "12") == 0
    assert load_exported(tmp_path / "output").tokenizer.max_seq_length == 12


def test_original_checkpoint_takes_its_backbone_from_the_option(
    checkpoint: Path, model_folder: Path, tmp_path: Path
) -> None:
    """Weights and vocabulary alone, as the original scripts wrote them."""
    loaded = create_model(SemanticIndexBase, from_scratch=str(model_folder), output_emb_size=8, max_seq_length=40)
    original = tmp_path / "original"
    save_checkpoint(original, *loaded)
    for name in ("config.json", "semantic_index.json", "manifest.json", "model.safetensors"):
        (original / name).unlink()
    assert export(original, tmp_path / "output", "--model_name_or_path", str(model_folder)) == 0
    assert json.loads((tmp_path / "output" / "model_card.json").read_text())["embedding_size"] == 8


@pytest.mark.parametrize("change", [0.01, float("nan")])
def test_a_graph_that_is_off_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    """An earlier export stays as it was."""
    assert export(checkpoint, tmp_path / "kept") == 0
    before = {file.name: sha256(file) for file in (tmp_path / "kept").iterdir()}

    def export_another(model: SemanticIndexBase, folder: Path) -> None:
        weight = model.emb_reduce_linear.weight
        right = weight.numpy()
        weight.set_value(right + np.float32(change) * np.arange(right.size, dtype=np.float32).reshape(right.shape))
        export_static(model, folder)
        weight.set_value(right)

    export_static = export_model.export_static
    monkeypatch.setattr(export_model, "export_static", export_another)
    for name in ("kept", "new"):
        with pytest.raises(InputError, match=f"{name}: the paddle graph is off by .*, more than 1e-05"):
            export(checkpoint, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert {file.name: sha256(file) for file in (tmp_path / "kept").iterdir()} == before


@pytest.mark.parametrize("suffix", [".json", ".pdiparams"])
def test_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Paddle's C++ says nothing where it can't write a file to its end."""

    def export_half(model: SemanticIndexBase, folder: Path) -> None:
        export_static(model, folder)
        file = folder / (GRAPH_NAME + suffix)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    export_static = export_model.export_static
    monkeypatch.setattr(export_model, "export_static", export_half)
    with pytest.raises(InputError, match=r"output: Paddle can't load the graph .* disk is full"):
        export(checkpoint, tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What is already there


def test_earlier_export_is_replaced_as_a_whole(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(exported, output)
    (output / f"{GRAPH_NAME}.onnx").write_text("x")
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["files"][f"{GRAPH_NAME}.onnx"] = {}
    (output / "manifest.json").write_text(json.dumps(manifest))
    assert export(checkpoint, output) == 0
    assert {file.name for file in output.iterdir()} == FILES
    load_exported(output)


def test_folder_with_other_things_is_left_alone(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """A user's file beside an earlier export, and another kind of folder with a manifest."""
    shutil.copytree(exported, tmp_path / "output")
    (tmp_path / "output" / "notes.txt").write_text("mine")
    for folder, name in ((tmp_path / "output", "notes.txt"), (checkpoint, "config.json")):
        before = sorted(folder.iterdir())
        with pytest.raises(InputError, match=f"--output_path {folder}: holds {name}, which no export wrote"):
            export(checkpoint, folder)
        assert sorted(folder.iterdir()) == before


def test_empty_folder_is_taken_and_a_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(checkpoint, tmp_path / "empty") == 0
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: can't be written"):
        export(checkpoint, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_seq_length", "41"], "--max_seq_length 41: the position table of .* has 40 rows"),
        (["--output_emb_size", "7"], "--output_emb_size 7: .* has 16"),
    ],
)
def test_wrong_options_leave_nothing(checkpoint: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export(checkpoint, tmp_path / "output", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["paddle2onnx", "onnxruntime"])
def test_missing_onnx_package_is_named_with_its_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"--format onnx: .*{package}.*; install it with sh scripts/setup.sh --onnx"):
        export(checkpoint, tmp_path / "output", "--format", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_check_runs_on_batches_like_the_collators(checkpoint: Path) -> None:
    """Of several sizes and lengths up to the maximum, with padding on the right alone."""
    tokenizer = load_checkpoint(checkpoint).tokenizer
    shapes = set()

    def embed(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        shapes.add(input_ids.shape)
        assert input_ids.dtype == token_type_ids.dtype == np.int64 and not token_type_ids.any()
        assert input_ids.min() >= 0 and input_ids.max() < tokenizer.vocabulary_size
        padding = input_ids == tokenizer.pad_id
        assert not padding[:, 0].any() and (np.diff(padding.astype(int), axis=1) >= 0).all()
        return np.zeros((len(input_ids), 2), dtype=np.float32)

    def off(input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        return np.full((len(input_ids), 2), 1e-3 if len(input_ids) == 7 else 0, dtype=np.float32)

    assert export_model.largest_difference(embed, off, tokenizer) == pytest.approx(1e-3)
    assert shapes == {(size, length) for size in (1, 2, 7) for length in (3, 13, 24)}
