"""Exit codes, option parsing, CPU set-up and progress lines; no Paddle."""

import argparse
import errno
import io
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import runtime
from tqdm import tqdm

from common.cli import ArgumentParser, number_in_range, run
from common.cpu import cpu_count
from common.errors import InputError
from common.logs import LineProgress, log, progress_bar
from common.paddle_setup import cpu_environment

ROOT = Path(__file__).resolve().parent.parent

AVX512 = "avx512f avx512bw avx512dq avx512vl"
AMD_AVX512 = f"vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2 {AVX512}\n"
AMD_AVX2 = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx avx2\n"
INTEL = f"vendor_id\t: GenuineIntel\nflags\t\t: fpu avx avx2 {AVX512}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "mkl"),
    [
        (AMD_AVX512, "7"),
        (AMD_AVX2, "5"),
        (AMD_AVX512.replace(" avx512vl", ""), "5"),
        (AMD_AVX512.replace("flags", "bugs"), None),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx\n", None),
        (INTEL, None),
        ("", None),
    ],
    ids=["AVX-512", "AVX2", "part of AVX-512", "no flags", "neither", "Intel", "no cpuinfo"],
)
def test_mkl_gets_the_fastest_path_that_an_amd_cpu_has(cpuinfo: str, mkl: str | None) -> None:
    assert cpu_environment({}, cpuinfo, 8).get("MKL_DEBUG_CPU_TYPE") == mkl


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, "8"),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "2"}, "4"),
        ({"PADDLE_TRAINER_ID": "1", "PADDLE_LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}, "4"),
        ({"PADDLE_TRAINER_ID": "1", "PADDLE_LOCAL_SIZE": "3", "OMP_NUM_THREADS": "1"}, "2"),
        ({"PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "16"}, "1"),
        ({"PADDLE_TRAINER_ID": "0", "OMP_NUM_THREADS": "1"}, "8"),
    ],
)
def test_threads_take_all_cores_and_ranks_share_them(environ: dict[str, str], threads: str) -> None:
    assert cpu_environment(environ, INTEL, 8) == {"OMP_NUM_THREADS": threads}


@pytest.mark.parametrize(
    "environ",
    [
        {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4"},
        {"OMP_NUM_THREADS": "1", "MKL_DEBUG_CPU_TYPE": ""},
        {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4", "PADDLE_TRAINER_ID": "0", "PADDLE_LOCAL_SIZE": "2"},
    ],
)
def test_the_user_s_own_settings_stay(environ: dict[str, str]) -> None:
    before = dict(environ)
    assert cpu_environment(environ, AMD_AVX512, 8) == {}
    assert environ == before


def test_set_up_paddle_sets_this_process_s_environment() -> None:
    command = (
        "import gc, os, runtime; runtime.set_up_paddle(); "
        "print(os.environ['OMP_NUM_THREADS'], runtime.cpu_count(), gc.isenabled())"
    )
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env={}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    threads, cores, collects_garbage = result.stdout.split()
    assert threads == cores == str(cpu_count())
    assert collects_garbage == "True"


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def exit_code(main: Callable[[], int]) -> int | None:
    with pytest.raises(SystemExit) as error:
        run(main)
    return error.value.code


def test_an_input_error_ends_with_code_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(InputError("corpus.csv: no such file"))) == 2
    assert capsys.readouterr() == ("", "error: corpus.csv: no such file\n")


def test_ctrl_c_ends_with_code_130_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("place", ["paddle", "backbone"])
def test_ctrl_c_while_modules_are_imported_prints_no_traceback(tmp_path: Path, place: str) -> None:
    for name in ("paddle", "backbone"):
        ends = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\n" if name == place else ""
        (tmp_path / f"{name}.py").write_text(ends)
    script = "from runtime import set_up_paddle\nset_up_paddle()\nimport backbone\n"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    said = "" if place == "paddle" else "interrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", said)


def test_a_locale_that_lacks_a_character_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "gbk"))
    assert exit_code(lambda: print("水稻🌾") or 0) == 0
    assert raw.getvalue().decode("gbk") == "水稻\\U0001f33e\n"


def test_a_closed_stderr_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)

    def main() -> int:
        with runtime.progress_bar(1, "corpus", "text"):
            return 0

    assert exit_code(main) == 0


def test_other_errors_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    sys.excepthook(KeyError, KeyError("name"), None)
    assert capsys.readouterr().err == "KeyError: 'name'\n"


def test_sigterm_clears_away_what_is_being_written(tmp_path: Path) -> None:
    script = f"""
import os, signal
from common.files import atomic_folder
from common.cli import run
from common.paddle_setup import set_up_paddle
set_up_paddle()
import paddle  # has a handler of its own

def main():
    with atomic_folder("{tmp_path / "output"}") as folder:
        (folder / "half").write_text("")
        assert len(os.listdir("{tmp_path}")) == 1
        os.kill(os.getpid(), signal.SIGTERM)

run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "main",
    ["print('x')", "print('x\\n' * 100_000)", "[print('x'), sys.exit(0)]"],
    ids=["in_the_buffer", "beyond_the_buffer", "before_an_exit"],
)
@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        (">/dev/full", 2, "error: the output can't be written (No space left on device)\n"),
        ("| true", 128 + signal.SIGPIPE, ""),
        (">&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written_leaves_no_traceback(output: str, code: int, message: str, main: str) -> None:
    program = f"import runtime, sys, time; time.sleep(0.3); runtime.run(lambda: {main} or 0)"
    command = ["bash", "-c", f"set -o pipefail; '{sys.executable}' -c \"{program}\" {output}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, message)


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    with pytest.raises(ConnectionRefusedError):
        run(raising(ConnectionRefusedError(errno.ECONNREFUSED, "refused")))


@pytest.mark.parametrize("code", [0, 3])
def test_other_exit_codes_pass_through(code: int) -> None:
    assert exit_code(lambda: code) == code


def test_errors_of_ours_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        run(raising(ValueError("a bug")))


def parser() -> ArgumentParser:
    parser = ArgumentParser("Trains.")
    parser.add_argument("--batch_size", type=number_in_range(1), default=32, help="pairs a step")
    parser.add_argument("--margin", type=number_in_range(0.0, float), help="subtracted from the positives")
    parser.add_argument("--evaluate", action="store_true", help="evaluate at each epoch")
    return parser


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "8"], "unrecognized arguments: --batch 8"),
        (["--batch_size", "0"], "--batch_size: 0 is out of range: give 1 or more"),
        (["--batch_size", "many"], "--batch_size: invalid int value: 'many'"),
        (["--batch_size", "1.5"], "--batch_size: invalid int value: '1.5'"),
        (["--margin", "nan"], "--margin: nan is out of range: give 0.0 or more"),
        (["--margin", "x"], "--margin: invalid float value: 'x'"),
        (["--batch_size"], "expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_option_ends_with_code_2_and_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        parser().parse_args(arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("--help)\n")
    assert err.count("\n") == 1
    assert said in err


def test_options_are_read_and_help_shows_defaults_that_say_something() -> None:
    args = parser().parse_args(["--batch_size", "8", "--margin", "0.5"])
    assert (args.batch_size, args.margin, args.evaluate) == (8, 0.5, False)
    text = parser().format_help()
    assert "pairs a step (default: 32)" in " ".join(text.split())
    assert "None" not in text
    assert "False" not in text


@pytest.mark.parametrize(("minimum", "number"), [(1, int), (0.0, float)])
def test_at_least_takes_the_minimum_and_more(minimum: float, number: type) -> None:
    parse = number_in_range(minimum, number)
    assert parse(str(minimum)) == minimum
    assert parse("7") == 7
    assert type(parse("7")) is number


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-0.001"])
def test_at_least_refuses_what_is_too_small_or_not_finite(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is out of range: give 0.0 or more"):
        number_in_range(0.0, float)(text)
    assert not math.isfinite(float(text)) or float(text) < 0


def test_only_rank_0_logs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (None, "0", "1", "10"):
        if rank is None:
            monkeypatch.delenv("PADDLE_TRAINER_ID", raising=False)
        else:
            monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
        log(f"from {rank}")
    assert capsys.readouterr() == ("", "from None\nfrom 0\n")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_line_progress_prints_whole_lines_now_and_then(
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


def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """In a process of its own, whose heap keeps 200 MB."""
    script = """
import numpy as np
from common.cpu import release_freed_memory, keep_freed_memory
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
keep_freed_memory()
start = resident_mb()
arrays = [np.ones(1_000_000) for _ in range(25)]
stays = np.ones(1_000_000)  # at the heap's end, so that no part of it can go by itself
del arrays
print(resident_mb() - start > 150)
release_freed_memory()
print(resident_mb() - start < 50, stays.sum())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1000000.0"]


def test_line_progress_says_nothing_of_short_work(capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
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
