"""scripts/best_model.sh: a stage is done once, goes on after a kill, and is done again if its inputs change."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import ROOT, train_options

pytestmark = pytest.mark.process
STAGES = ["check", "pretrain", "mine_words", "train", "mine", "train_again", "compare"]


class Recipe(NamedTuple):
    """The command, the folder of its data, and that of its output."""

    command: list[str]
    data: Path
    output: Path

    def start(self) -> subprocess.Popen[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.Popen(
            self.command,
            env={**os.environ, "PATH": path, "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )

    def run(self) -> tuple[dict[str, bool], str]:
        """Whether each stage was left as it was, and what the script wrote to stderr."""
        with self.start() as process:
            stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stdout + stderr
        return stages(stdout), stderr

    def run_until(self, written: str) -> dict[str, bool]:
        """Kills the script when it has written a folder; what `run` says of the stages so far."""
        with self.start() as process:
            deadline = time.monotonic() + 300
            while not (self.output / written).is_dir():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            return stages(process.communicate()[0])


def stages(stdout: str) -> dict[str, bool]:
    """Whether each stage that the script began was left as it was."""
    parts = re.split(r"^== (\w+)$", stdout.split("== written")[0], flags=re.MULTILINE)[1:]
    return {name: "unchanged since it ended" in text for name, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.fixture(scope="module")
def recipe(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    data = shutil.copytree(recall_data, folder / "data")
    options = train_options(model_folder, data, folder, "--epochs", "1", "--save_steps", "2")
    start, others = options[:2], options[6:]  # the script gives --train_set_file and --save_dir
    script = ["sh", str(ROOT / "scripts" / "best_model.sh"), "cpu"]
    folders = ["--data", str(data), "--output", str(folder / "made")]
    return Recipe([*script, *folders, *start, *others], data, folder / "made")


def test_it_goes_on_after_a_kill(recipe: Recipe) -> None:
    recipe.run_until("trained/model_2")
    left, stderr = recipe.run()
    assert left == {name: name in ("check", "pretrain", "mine_words") for name in STAGES}
    assert f"resuming from {recipe.output}/trained/model_" in stderr
    for name in ("data.html", "report.html", "trained/model_best", "trained_again/model_best", "index"):
        assert (recipe.output / name).exists(), name


def test_only_what_depends_on_a_changed_file_is_done_again(recipe: Recipe) -> None:
    left, _ = recipe.run()
    assert left == dict.fromkeys(STAGES, True)
    dev = recipe.data / "dev.csv"
    dev.write_text("".join(dev.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    left, stderr = recipe.run()
    assert [name for name in STAGES[:4] if left[name]] == ["pretrain", "mine_words"]
    assert "resuming" not in stderr  # the models of the other file are gone


def test_the_pre_training_can_be_left_out(recipe: Recipe) -> None:
    output = recipe.output.with_name("made_without")
    other = Recipe([*recipe.command, "--no_pretraining", "--output", str(output)], recipe.data, output)
    left = other.run_until("trained/model_2")
    assert list(left) == ["check", "mine_words", "train"]
