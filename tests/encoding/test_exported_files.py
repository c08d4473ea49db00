"""The folder of an exported model: which files it needs, and whether they are as they were written; no Paddle."""

import re
import shutil
from pathlib import Path

import pytest

from common.errors import InputError
from encoding.exported_files import GRAPH_NAME, check_exported, find_exported, graph_file


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """An exported folder to damage."""
    return shutil.copytree(exported, tmp_path / "output")


def test_graphs_of_paddle_2_and_3_are_found(copy: Path) -> None:
    assert graph_file(copy) == copy / f"{GRAPH_NAME}.json"
    (copy / f"{GRAPH_NAME}.json").rename(copy / f"{GRAPH_NAME}.pdmodel")
    assert graph_file(copy) == copy / f"{GRAPH_NAME}.pdmodel"


@pytest.mark.parametrize("name", [f"{GRAPH_NAME}.json", f"{GRAPH_NAME}.pdiparams", "manifest.json"])
def test_half_an_export_is_refused_by_the_name_of_the_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(name)}.*export.*export_model\.py"):
        find_exported(copy)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{tmp_path}/output: no such model folder; export the model with"):
        find_exported(tmp_path / "output")


def test_an_export_whose_replacement_was_interrupted_is_found(copy: Path) -> None:
    replaced = copy.rename(copy.with_name(".output.replaced"))
    assert find_exported(copy) == check_exported(copy) == replaced


def test_a_changed_or_missing_file_is_refused_by_name(copy: Path) -> None:
    for file in copy.iterdir():
        if file.name == "manifest.json":
            continue
        content = file.read_bytes()
        for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"{re.escape(file.name)}.*export.*export_model\.py"):
                check_exported(copy)
        file.write_bytes(content)
    assert check_exported(copy) == copy


def test_a_length_above_the_position_table_is_refused(exported: Path) -> None:
    assert check_exported(exported, max_seq_length=40) == exported
    with pytest.raises(InputError, match=f"^--max_seq_length 41: the position table of {exported} has 40 rows"):
        check_exported(exported, max_seq_length=41)
