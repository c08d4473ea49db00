"""export_model.py: the folder that it writes, or none."""

import shutil
import sys
from pathlib import Path

import pytest

import export_model
from base_model import SemanticIndexBase
from common.errors import InputError
from common.files import read_json, sha256, write_json
from encoding import export as export_module
from encoding.exported_files import GRAPH_NAME
from encoding.exported_model import load_exported
from helpers import ROOT, new_model, run_script
from modeling.checkpoint import save_checkpoint

FILES = {
    *(f"{GRAPH_NAME}.json", f"{GRAPH_NAME}.pdiparams", "config.json", "semantic_index.json", "vocab.txt"),
    *("tokenizer_config.json", "model_card.json", "manifest.json"),
}


def export(checkpoint: Path, output: Path, *options: str) -> int:
    """Runs the script in this process."""
    return export_model.main(["--params_path", str(checkpoint), "--output_path", str(output), *options])


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_files_of_an_export(exported: Path) -> None:
    assert {file.name for file in exported.iterdir()} == FILES


@pytest.mark.process
def test_the_script_prints_the_difference_and_names_the_files(checkpoint: Path, tmp_path: Path) -> None:
    """As a program, with the defaults; from the `.pdparams` file that the document names."""
    done = run_script(ROOT / "export_model.py", "--params_path", checkpoint / "model_state.pdparams", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert 0 < float(first.removeprefix("largest difference between the model and the paddle graph: ")) <= 1e-5
    assert second == f"wrote output/{GRAPH_NAME}.*"
    assert {path.name for path in tmp_path.iterdir()} == {"output"}
    assert {file.name for file in (tmp_path / "output").iterdir()} == FILES


@pytest.mark.onnx
def test_onnx_on_request(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(checkpoint, tmp_path / "output", "--format", "onnx") == 0
    assert {file.name for file in (tmp_path / "output").iterdir()} == {*FILES, f"{GRAPH_NAME}.onnx"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("largest difference between the model and the onnx graph: ")


def test_the_exported_length_is_what_serving_cuts_to(checkpoint: Path, tmp_path: Path) -> None:
    assert export(checkpoint, tmp_path / "output", "--max_seq_length", "12") == 0
    assert load_exported(tmp_path / "output").tokenizer.max_seq_length == 12


def test_a_checkpoint_of_the_original_scripts_takes_its_backbone_from_the_option(
    model_folder: Path, tmp_path: Path
) -> None:
    """They wrote weights and vocabulary alone."""
    original = tmp_path / "original"
    save_checkpoint(original, *new_model(model_folder, output_emb_size=8, max_seq_length=40))
    for name in ("config.json", "semantic_index.json", "manifest.json"):
        (original / name).unlink()
    assert export(original, tmp_path / "output", "--model_name_or_path", str(model_folder)) == 0
    assert read_json(tmp_path / "output" / "model_card.json")["embedding_size"] == 8


# ---------------------------------------------------------------------------------------------------------------------
# Failures leave nothing new


def test_a_graph_that_differs_from_the_model_leaves_an_earlier_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(checkpoint, tmp_path / "kept") == 0
    before = {file.name: sha256(file) for file in (tmp_path / "kept").iterdir()}
    monkeypatch.setattr(export_module, "largest_difference", lambda *_: 0.01)
    for name in ("kept", "new"):
        with pytest.raises(InputError, match=f"{tmp_path / name}: the paddle graph is off by 0.01, more than 1e-05"):
            export(checkpoint, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert {file.name: sha256(file) for file in (tmp_path / "kept").iterdir()} == before


@pytest.mark.parametrize("suffix", [".json", ".pdiparams"])
def test_a_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Paddle's C++ reports no error if it can't write a file to its end."""
    export_static = export_module.export_static

    def export_half(model: SemanticIndexBase, folder: Path) -> None:
        export_static(model, folder)
        file = folder / (GRAPH_NAME + suffix)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    monkeypatch.setattr(export_module, "export_static", export_half)
    with pytest.raises(InputError, match=r"output: Paddle can't load the graph .* disk is full"):
        export(checkpoint, tmp_path / "output")
    assert list(tmp_path.iterdir()) == []


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


def test_a_missing_onnx_package_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "paddle2onnx", None)
    with pytest.raises(InputError, match=r"--format onnx: .*; install it with sh scripts/setup\.sh --onnx"):
        export(checkpoint, tmp_path / "output", "--format", "onnx")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# The folder before the export


def test_an_earlier_export_is_replaced_as_a_whole(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(exported, output)
    (output / f"{GRAPH_NAME}.onnx").write_text("x")
    manifest = read_json(output / "manifest.json")
    manifest["files"][f"{GRAPH_NAME}.onnx"] = {}
    write_json(output / "manifest.json", manifest)
    assert export(checkpoint, output) == 0
    assert {file.name for file in output.iterdir()} == FILES
    load_exported(output)


def test_a_folder_with_other_files_is_left_alone(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """A user's file beside an earlier export, and another kind of folder with a manifest."""
    shutil.copytree(exported, tmp_path / "output")
    (tmp_path / "output" / "notes.txt").write_text("mine")
    for folder, name in ((tmp_path / "output", "notes.txt"), (checkpoint, "config.json")):
        before = sorted(folder.iterdir())
        with pytest.raises(InputError, match=f"--output_path {folder}: holds {name}, which no export wrote"):
            export(checkpoint, folder)
        assert sorted(folder.iterdir()) == before


def test_an_empty_folder_is_filled_and_a_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert export(checkpoint, tmp_path / "empty") == 0
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: can't be written"):
        export(checkpoint, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
