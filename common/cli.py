"""The command line of every script: the parser, types of options, and exit codes."""

import argparse
import errno
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from common import __version__
from common.environment import remove_temporary_home
from common.errors import InputError
from common.logs import process_count
from common.signals import Terminated, terminate
from common.texts import has_visible_text

INPUT_ERROR_EXIT_CODE = 2
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, a quota, a file size limit
# What even asking whether a file is there may end in: permissions, names, mounts, limits.
UNUSABLE = {
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS),
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE),
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of an option, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser with --version and without abbreviations, which prints one line for a wrong option."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.register("type", None, _path_argument)  # of the options without a type
        self.add_argument("--version", action="version", version=__version__)

    def error(self, message: str) -> NoReturn:
        """Prints the message on stderr and exits with code 2."""
        self.exit(INPUT_ERROR_EXIT_CODE, f"error: {message} (try {self.prog} --help)\n")


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Name -> value of the options that the command line gives, even those whose values are the defaults."""
    names = [action.dest for action in parser._actions]
    values = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names))))
    return {name: value for name, value in values.items() if value is not None}


def number_in_range(
    minimum: float, number: type = int, below: float = math.inf, or_zero: bool = False
) -> Callable[[str], float]:
    """An argparse type: an int or float (`number`) with minimum <= value < below; `or_zero` also allows 0."""

    def parse(text: str) -> float:
        value = number(text)
        if not (minimum <= value < below or (or_zero and value == 0)):
            limit = "" if below == math.inf else f", and less than {below}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {minimum} or more{limit}")
        return value

    parse.__name__ = number.__name__  # argparse names the type in its messages
    return parse


positive_int = number_in_range(1)
non_negative_float = number_in_range(0.0, float)
proportion = number_in_range(0.0, float, below=1.0)


def add_switch(parser: argparse._ActionsContainer, name: str, default: bool | None, help_text: str) -> None:
    """Adds an option that takes True or False, or nothing for True, as in the original and in Paddle Serving."""
    parser.add_argument(
        name, nargs="?", const=True, default=default, type=true_or_false, metavar="True|False", help=help_text
    )


def true_or_false(text: str) -> bool:
    """An argparse type: True or False, in upper or lower case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def text_argument(text: str) -> str:
    """An argparse type: a text of which something is visible, in UTF-8 or the locale's encoding."""
    text, is_utf8 = _as_utf8(text)
    if not is_utf8:
        raise argparse.ArgumentTypeError("the text isn't UTF-8")
    if not has_visible_text(text):
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def _path_argument(text: str) -> str:
    """A file or folder; `~` is the home, which the shell doesn't replace in `--option=~/folder`."""
    if text.endswith("\r"):
        remedy = "if it is from a script with Windows line ends, use dos2unix on that"
        raise argparse.ArgumentTypeError(f"{text!r} ends in a carriage return; {remedy}")
    decoded, is_utf8 = _as_utf8(text)
    if decoded != text or not is_utf8:  # Paddle can't open it
        remedy = "set PYTHONUTF8=1, as the locale isn't UTF-8" if is_utf8 else "rename it"
        raise argparse.ArgumentTypeError(f"{text!a}: this path can't be read as UTF-8; {remedy}")
    return os.path.expanduser(text) if text.startswith("~/") else text


def _as_utf8(text: str) -> tuple[str, bool]:
    """An argument's text, and whether it has one: Python turns bytes that the locale can't decode into surrogates."""
    try:
        text.encode("utf-8")
        return text, True
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8"), True
    except UnicodeError:
        return text, False


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a script's `main` and exits with the code that it returns, or with another one after a line on stderr.

    2: InputError, a file that can't be used, no memory, or the disk of stdout is full; 130: Ctrl-C; 143: SIGTERM; 141,
    without a line: nobody reads stdout.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the locale's encoding lacks
    if sys.stderr is None:  # it was closed before the start
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    has_peers = process_count() > 1
    if not has_peers:  # a rank that waits for others in C++ would never run a Python handler
        signal.signal(signal.SIGTERM, terminate)
    code = _exit_code(main)
    try:
        if sys.stdout:  # None if it was closed before the start
            sys.stdout.flush()
    except OSError as error:
        code = _report_system_error(error)
    if has_peers:
        # Skips the interpreter's shutdown, in which Paddle's gloo sometimes aborts.
        remove_temporary_home()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(main: Callable[[], int]) -> int:
    """Runs `main` and returns the exit code; prints a line on stderr if it failed."""
    try:
        return main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR_EXIT_CODE
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)  # the shell's convention
    except MemoryError as error:  # numpy's and Paddle's messages tell the size
        reason = (str(error).strip().splitlines() or ["the limit is reached"])[0]
        print(f"error: no memory is left ({reason}); use smaller batches, or raise the limit", file=sys.stderr)
        return INPUT_ERROR_EXIT_CODE
    except SystemExit as ended:  # argparse's, after --help or a wrong option
        return int(ended.code or 0)
    except OSError as error:
        return _report_system_error(error)


def _report_system_error(error: OSError) -> int:
    """Reports that stdout has no reader, its disk is full, or a file can't be used; re-raises other errors.

    Returns the exit code.
    """
    if isinstance(error, BrokenPipeError):
        code = 128 + signal.SIGPIPE
    elif error.errno in NO_SPACE:
        print(f"error: the output can't be written ({error.strerror})", file=sys.stderr)
        code = INPUT_ERROR_EXIT_CODE
    elif error.errno in UNUSABLE and error.filename is not None:
        print(f"error: {error.filename}: can't be used ({error.strerror})", file=sys.stderr)
        return INPUT_ERROR_EXIT_CODE
    else:
        raise error
    # Otherwise the interpreter fails when it writes the rest of the buffer at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code
