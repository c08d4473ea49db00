"""scripts/test.sh, in a copy of the project whose other programs only print how they were called."""

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT, Completed

pytestmark = pytest.mark.process
PYTEST = "python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder"
SAY = '#!/bin/sh\necho "$(basename "$0") $*"\n'


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for program in ("scripts/setup.sh", "deploy/C++/build.sh", ".venv/bin/python"):
        file = tmp_path / program
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SAY)
        file.chmod(0o755)
    python = tmp_path / ".venv/bin/python"
    python.write_text(SAY + '[ "$2" != pytest ] || echo "fast: ${SEMANTIC_INDEX_FAST_TESTS:-}"\n')
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    (tmp_path / "bin").mkdir()
    for program in ("sh", "dirname", "basename", "find"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    shutil.copy(tmp_path / "scripts" / "setup.sh", tmp_path / "bin" / "chromedriver")
    return tmp_path


def run(copy: Path, *arguments: str) -> Completed:
    """With no other programs than those in the copy's bin."""
    command = ["sh", copy / "scripts" / "test.sh", *arguments]
    environment = {"PATH": str(copy / "bin")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_all_tests(copy: Path) -> None:
    """Including the C++ server's; other arguments go to pytest."""
    done = run(copy, "-k", "recall or data")
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "setup.sh --tests",
        "build.sh --fuzz --install-packages",
        "python -m ruff check --quiet .",
        "python -m ruff format --check --quiet .",
        "python -m mypy --no-error-summary",
        f"{PYTEST} -k recall or data",
        "fast: ",
    ]


@pytest.mark.parametrize("has_chromium", [False, True])
@pytest.mark.parametrize("has_packages", [False, True])
def test_without_debian_s_packages(copy: Path, has_packages: bool, has_chromium: bool) -> None:
    """A line for each part that is left out."""
    expected, marks = [], []
    if not has_packages:
        (copy / "deploy/C++/build.sh").write_text("exit 2")
        expected.append("test: left out: the tests of the C++ server; install these packages to run them")
        marks.append("not cpp")
    if not has_chromium:
        (copy / "bin" / "chromedriver").unlink()
        expected.append("test: left out: the tests of pages in a browser; they need Chromium")
        marks.append("not browser")
    done = run(copy)
    assert done.stderr.splitlines() == expected
    call = PYTEST + (f" -m {' and '.join(marks)}" if marks else "")
    assert call in [line.rstrip() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arguments", [("--fast", "-k", "recall"), ("-k", "recall", "--fast")])
def test_fast_tests_build_and_install_nothing_more(copy: Path, arguments: tuple[str, ...]) -> None:
    """One line says what is left out."""
    (copy / ".venv/setup").mkdir()
    for extra in ("milvus", "onnx", "openvino", "serving"):
        (copy / ".venv/setup" / extra).touch()
    done = run(copy, *arguments)
    assert done.stderr == (
        "test: left out: tests of processes, of services, of pages, of the C++ server; sh scripts/test.sh runs them\n"
    )
    setup, *linters, pytest_call, fast = done.stdout.splitlines()
    assert (setup, fast) == ("setup.sh --fast-tests", "fast: 1")
    assert not [line for line in linters if not line.startswith(("python -m ruff ", "python -m mypy "))]
    assert pytest_call == f"{PYTEST} -m not process and not server and not browser and not cpp -k recall"


def test_fast_tests_without_extras_leave_their_tests_out(copy: Path) -> None:
    done = run(copy, "--fast")
    assert (
        "of the C++ server, of ONNX, of Milvus, of OpenVINO, of Paddle Serving; sh scripts/test.sh runs them\n"
        in done.stderr
    )
    assert "not cpp and not onnx and not milvus and not openvino" in done.stdout
    ignored = [word.removeprefix("--ignore=") for word in done.stdout.split() if word.startswith("--ignore=")]
    assert "tests/serving" in ignored
    assert [path for path in ignored if not (ROOT / path).exists()] == []
