"""Runs `bash scripts/quickstart.sh` as a newcomer does, in a copy of the project with the tests' environment."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT


@pytest.mark.process
def test_quickstart(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns(".*", "tests", "quickstart", "docs", "__pycache__")
    folder = shutil.copytree(ROOT, tmp_path / "clone", ignore=left_out)
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    done = subprocess.run(
        ["bash", str(folder / "scripts" / "quickstart.sh")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(bm25|before_training|after_training) +([\d. ]+)$", done.stdout, re.MULTILINE)
    recall = {name: [float(value) for value in values.split()] for name, values in rows}
    assert all(len(values) == 5 and values == sorted(values) for values in recall.values())
    assert recall["after_training"][0] > recall["before_training"][0] + 20
    assert 30 < recall["bm25"][0] < 80
    assert len(re.findall(r"^0\.\d+\t.+\t.+$", done.stdout, re.MULTILINE)) == 3  # similarities of pairs
    assert "\n[1, 256]\n[[" in done.stdout
    assert len(re.findall(r"^.+\t.+\t-?[01]\.\d+$", done.stdout, re.MULTILINE)) == 5  # top hits
    written = done.stdout.split("== written")[1]
    for name in re.findall(r"quickstart/\S+", written):
        assert (folder / name).is_dir()
    assert "Warning" not in done.stderr
    assert {path.name for path in folder.iterdir()} - {path.name for path in ROOT.iterdir()} <= {"quickstart"}
