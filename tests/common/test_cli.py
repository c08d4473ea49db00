"""Exit codes and option parsing; no Paddle."""

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

import pytest

from common import __version__
from common.cli import ArgumentParser, number_in_range, run, text_argument, true_or_false
from common.errors import InputError
from common.logs import progress_bar
from helpers import ROOT

# ---------------------------------------------------------------------------------------------------------------------
# How a script ends


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


@pytest.mark.parametrize(
    ("message", "said"), [("", "the limit is reached"), ("Unable to allocate 9 TiB\nmore", "Unable to allocate 9 TiB")]
)
def test_no_memory_ends_with_code_2_and_one_line(message: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(MemoryError(message))) == 2
    line = f"error: no memory is left ({said}); use smaller batches, or raise the limit\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_file_that_cannot_be_used_ends_with_code_2_and_one_line(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even asking whether it is there may fail, in a folder of another user, for example."""
    assert exit_code(raising(OSError(number, os.strerror(number), "/srv/model_40"))) == 2
    assert capsys.readouterr() == ("", f"error: /srv/model_40: can't be used ({os.strerror(number)})\n")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "", "/a"), OSError(errno.EACCES, "socket")])
def test_errors_of_our_own_keep_their_traceback(error: OSError) -> None:
    with pytest.raises(type(error)):
        run(raising(error))


def test_ctrl_c_ends_with_code_130_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.process
@pytest.mark.parametrize(
    ("place", "code", "said"), [("paddle", -signal.SIGINT, ""), ("backbone", 128 + signal.SIGINT, "interrupted\n")]
)
def test_ctrl_c_while_modules_are_imported_prints_no_traceback(
    tmp_path: Path, place: str, code: int, said: str
) -> None:
    for name in ("paddle", "backbone"):
        ends = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\n" if name == place else ""
        (tmp_path / f"{name}.py").write_text(f"{ends}def disable_signal_handler(): pass\n")
    script = """
from common.cli import run
from common.paddle_setup import set_up_paddle

def main():
    set_up_paddle()
    import backbone

run(main)
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_a_locale_that_lacks_a_character_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "gbk"))
    assert exit_code(lambda: print("水稻🌾") or 0) == 0
    assert raw.getvalue().decode("gbk") == "水稻\\U0001f33e\n"


def test_a_closed_stderr_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)

    def main() -> int:
        with progress_bar(1, "corpus", "text"):
            return 0

    assert exit_code(main) == 0


@pytest.mark.process
def test_sigterm_removes_what_is_being_written(tmp_path: Path) -> None:
    script = f"""
import os, signal
from common.cli import run
from common.files import atomic_folder
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


@pytest.mark.process
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
    program = f"import sys, time; from common.cli import run; time.sleep(0.3); run(lambda: {main} or 0)"
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


def test_errors_in_the_program_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="a bug"):
        run(raising(ValueError("a bug")))


# ---------------------------------------------------------------------------------------------------------------------
# Options


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


def test_every_parser_has_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--version"])
    assert (ended.value.code, capsys.readouterr()) == (0, (f"{__version__}\n", ""))


@pytest.mark.parametrize(("minimum", "number"), [(1, int), (0.0, float)])
def test_number_in_range_takes_the_minimum_and_more(minimum: float, number: type) -> None:
    parse = number_in_range(minimum, number)
    assert parse(str(minimum)) == minimum
    assert parse("7") == 7
    assert type(parse("7")) is number


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-0.001"])
def test_number_in_range_refuses_what_is_too_small_or_not_finite(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is out of range: give 0.0 or more"):
        number_in_range(0.0, float)(text)
    assert not math.isfinite(float(text)) or float(text) < 0


def test_number_in_range_may_have_an_upper_limit_and_zero() -> None:
    parse = number_in_range(3, below=5, or_zero=True)
    assert [parse(text) for text in ("0", "3", "4")] == [0, 3, 4]
    for text in ("1", "5"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is out of range: .* 3 or more, and less than 5"):
            parse(text)


def test_true_or_false_takes_both_in_any_case() -> None:
    assert [true_or_false(text) for text in ("True", "true", "FALSE", "false")] == [True, True, False, False]
    for text in ("", "1", "yes"):
        with pytest.raises(argparse.ArgumentTypeError, match="is neither True nor False"):
            true_or_false(text)


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), (" \t\u3000", "is empty"), ("a\udcff", "isn't UTF-8")])
def test_a_text_argument_is_neither_blank_nor_undecodable(text: str, said: str) -> None:
    assert text_argument(" 水稻 ") == " 水稻 "
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        text_argument(text)


def in_the_c_locale(text: str) -> str:
    """An argument as Python decodes it in a locale that only has ASCII."""
    return text.encode().decode("ascii", "surrogateescape")


def test_a_text_argument_in_a_locale_without_chinese_is_read_as_utf8() -> None:
    assert text_argument(in_the_c_locale("水稻")) == "水稻"


def test_a_path_option_takes_the_home_and_chinese_but_nothing_that_paddle_cannot_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    parser = ArgumentParser()
    group = parser.add_argument_group("paths")
    group.add_argument("--params_path", default="./checkpoints")
    parser.add_argument("--text", type=text_argument)
    assert parser.parse_args([]).params_path == "./checkpoints"
    good = {"~/model": "/home/user/model", "./~": "./~", "~x": "~x", "数据 100%/a": "数据 100%/a", "a\nb": "a\nb"}
    for given, path in good.items():
        assert parser.parse_args(["--params_path", given]).params_path == path
    assert parser.parse_args(["--text", "~/a"]).text == "~/a"
    bad = {
        "model\r": "'model\\r' ends in a carriage return; if it is from a script with Windows line ends, use dos2unix",
        "model\udcff": "'model\\udcff': this path can't be read as UTF-8; rename it",
        in_the_c_locale("数据"): "this path can't be read as UTF-8; set PYTHONUTF8=1, as the locale isn't UTF-8",
    }
    for given, said in bad.items():
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--params_path", given])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
