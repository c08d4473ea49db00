"""Lines on stderr and progress."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from common.logs import LineProgress, log, process_count, progress_bar
from helpers import ROOT


def test_only_rank_0_logs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "11")
    for rank in (None, "0", "1", "10"):
        if rank is None:
            monkeypatch.delenv("PADDLE_TRAINER_ID", raising=False)
        else:
            monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
        log(f"from {rank}")
    assert capsys.readouterr() == ("", "from None\nfrom 0\n")


@pytest.mark.parametrize("count", [None, "1", "", "0", "two"])
def test_a_rank_left_over_from_a_launcher_still_logs(
    count: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    if count is None:
        monkeypatch.delenv("PADDLE_TRAINERS_NUM", raising=False)
    else:
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", count)
    log("a line")
    assert capsys.readouterr().err == "a line\n"
    assert process_count() == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("common.logs.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_line_progress_prints_whole_lines_at_intervals(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = LineProgress(100, "train", "step")
    for _ in range(95):
        clock.now += 0.5
        progress.update()
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    lines = err.splitlines()
    assert err.endswith("\n")
    assert len(lines) == 5
    for line, step in zip(lines, (20, 40, 60, 80, 95), strict=True):
        assert line.startswith("train: ")
        assert f" {step}/100 " in line
        assert "2.00step/s" in line


def test_line_progress_prints_the_end_once(capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
    """Also if the last step took long enough for a line of its own."""
    with LineProgress(3, "encode", "text") as progress:
        for _ in range(3):
            clock.now += 20
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0].split()[-1] for line in lines] == ["1/3", "2/3", "3/3"]


def test_line_progress_prints_nothing_for_short_work(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    progress = LineProgress(100, "encode", "text")
    clock.now += 5
    progress.update(100)
    progress.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(progress_bar(3, "encode", "text")) is LineProgress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(3, "encode", "text") as bar:
        assert type(bar) is tqdm
        assert bar.total == 3


@pytest.mark.process
def test_stdout_is_kept_for_results() -> None:
    """Also from what C writes, which has a buffer of its own, and after an error."""
    program = (
        "import contextlib, ctypes\n"
        "from common.logs import stdout_to_stderr\n"
        "print('first')\n"
        "with contextlib.suppress(ValueError), stdout_to_stderr():\n"
        "    print('python')\n"
        "    ctypes.CDLL(None).puts(b'c')\n"
        "    raise ValueError\n"
        "print('last')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "first\nlast\n" and sorted(done.stderr.split()) == ["c", "python"]
