"""What every script needs before Paddle is imported: CPU set-up, errors, progress. Importing it imports no Paddle."""

import argparse
import contextlib
import ctypes
import errno
import gc
import importlib
import io
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

INPUT_ERROR_EXIT_CODE = 2
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # errors of a file that can't grow
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # what MKL means by it
SECONDS_BETWEEN_LINES = 10.0  # progress on something that isn't a terminal, such as a log file
SECONDS_BEFORE_BAR = 1.0  # on a terminal


class InputError(ValueError):
    """Something the user gave can't be used; the message says where it is and what to do about it."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something: not None, nor a switch that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, and with one line for a wrong option instead of the whole usage."""

    def __init__(self, description: str | None = None) -> None:
        super().__init__(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(INPUT_ERROR_EXIT_CODE, f"error: {message} (try {self.prog} --help)\n")


def at_least(
    minimum: float, number: type = int, below: float = math.inf, or_zero: bool = False
) -> Callable[[str], float]:
    """An argparse type: a `number` (int or float) that is no less than `minimum` and less than `below`.

    or_zero: or 0, which stands for something else.
    """

    def parse(text: str) -> float:
        value = number(text)
        if not (minimum <= value < below or (or_zero and value == 0)):
            limit = "" if below == math.inf else f", and less than {below}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {minimum} or more{limit}")
        return value

    parse.__name__ = number.__name__
    return parse


def true_or_false(text: str) -> bool:
    """An argparse type: True or False, as switches of the original's and of Paddle Serving's scripts are given."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what was being written is cleared away as for Ctrl-C."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a script's `main` and exits: 2 and the bare message for an InputError, 130 for Ctrl-C, 143 for SIGTERM.

    Where stdout can't be written: 2 and one line for a full disk, 141 and nothing when its reader has gone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a locale that lacks a character, such as GBK's
    if sys.stderr is None:  # it was closed from the start
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    has_peers = int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) > 1
    if not has_peers:  # a rank that waits for others in native code wouldn't get to Python's handler
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = INPUT_ERROR_EXIT_CODE
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)  # as shells report it
    except SystemExit as ended:  # of --help, for one
        code = ended.code or 0
    except OSError as error:
        code = _output_failed(error)
    try:
        if sys.stdout:  # None where it was closed from the start
            sys.stdout.flush()
    except OSError as error:
        code = _output_failed(error)
    if has_peers:
        # Now and then Paddle's gloo aborts when the interpreter takes it down, after all work is done.
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _output_failed(error: OSError) -> int:
    """The exit code where stdout can't be written, after a line if there is anything to do. Raises other errors."""
    if isinstance(error, BrokenPipeError):
        code = 128 + signal.SIGPIPE
    elif error.errno in NO_SPACE:
        print(f"error: the output can't be written ({error.strerror})", file=sys.stderr)
        code = INPUT_ERROR_EXIT_CODE
    else:
        raise error
    # What is still in the buffer would fail once more when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


class Stopped(Exception):
    """SIGINT or SIGTERM came while `StopSignals.raised` was in force, here or on another rank."""


class StopSignals:
    """As a context: SIGINT and SIGTERM only make `received` the first one's number: what is being done ends well."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.received = self.received or number
        if self._raise:
            self._raise = False  # a second signal doesn't disturb what the first one started
            raise Stopped

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Within it a signal raises Stopped, at once if it has come already: for long work that nobody needs then."""
        self._raise = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._raise = False


def is_main_process() -> bool:
    """Whether this is the process that reports: the only one, or rank 0 under `paddle.distributed.launch`."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def log(message: str) -> None:
    """One line on stderr, from rank 0 alone."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_threads() -> int:
    """Threads to compute with: what `set_up_paddle` or the user chose, else all cores."""
    return int(os.environ.get("OMP_NUM_THREADS", cpu_count()))


def read_cpuinfo() -> str:
    """The text of /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def cpu_flags(cpuinfo: str) -> set[str]:
    """The processor's features as `read_cpuinfo` names them."""
    return {flag for line in cpuinfo.splitlines() if line.startswith("flags") for flag in line.split()}


def has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16. oneDNN on another with AVX-512 converts to float32 and back, which gains
    nothing (https://docs.openvino.ai/2021.4/openvino_docs_IE_DG_Bfloat16Inference.html).
    """
    return "avx512_bf16" in cpu_flags(read_cpuinfo())


def cpu_environment(environ: Mapping[str, str], cpuinfo: str, cores: int) -> dict[str, str]:
    """The variables that make Paddle use the whole CPU, less those that the user has set.

    environ: the process's environment; cpuinfo: the text of /proc/cpuinfo; cores: cores of this machine.

    Under `paddle.distributed.launch` an OMP_NUM_THREADS of 1 counts as unset, since importing Paddle in the launcher
    writes it; the cores are shared out among the ranks of this machine.
    """
    under_launch = "PADDLE_TRAINER_ID" in environ
    chosen = {}
    if "OMP_NUM_THREADS" not in environ or (under_launch and environ["OMP_NUM_THREADS"] == "1"):
        chosen["OMP_NUM_THREADS"] = str(max(1, cores // int(environ.get("PADDLE_LOCAL_SIZE", "1"))))
    if "MKL_DEBUG_CPU_TYPE" not in environ and "AuthenticAMD" in cpuinfo:
        # The MKL inside the Paddle wheel takes a slow path on AMD; this variable names a faster one (7: AVX-512,
        # 5: AVX2). A type that the CPU lacks ends in an illegal instruction, hence the look at its flags.
        flags = cpu_flags(cpuinfo)
        if flags >= AVX512:
            chosen["MKL_DEBUG_CPU_TYPE"] = "7"
        elif "avx2" in flags:
            chosen["MKL_DEBUG_CPU_TYPE"] = "5"
    return chosen


def keep_freed_memory() -> None:
    """Has malloc keep the memory of freed tensors for the next ones, where the C library is glibc.

    By default glibc maps each large tensor anew and unmaps it after use, and the kernel zeroes its pages every time: an
    element-wise operation on 16 MB then takes 2 to 7 times as long. The process keeps its peak until it ends, or
    `give_back_freed_memory`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Gives the system what `keep_freed_memory` has kept, of all threads; takes 0.1 s where that is a gigabyte."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)


def _report_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def set_up_paddle() -> None:
    """Sets up memory, threads and CPU dispatch, then imports Paddle; no script imports it before calling this.

    Warnings of third parties that tell the user nothing are left out, and the traceback of a Ctrl-C before `run`.
    """
    sys.excepthook = _report_uncaught
    keep_freed_memory()
    os.environ.update(cpu_environment(os.environ, read_cpuinfo(), cpu_count()))
    os.environ.setdefault("GLOG_minloglevel", "2")
    for message in (
        "No ccache found",
        "Setuptools is replacing distutils",
        "pkg_resources is deprecated",
        "Tensor do not have 'place' interface",  # of PaddleNLP's BERT in an export
    ):
        warnings.filterwarnings("ignore", message=message)
    gc.disable()  # looking for garbage while it makes its objects takes a sixth of the import
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:  # the native part of the import would turn KeyboardInterrupt into ImportError
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.redirect_stderr(io.StringIO()):  # it warns of any OMP_NUM_THREADS but 1
        importlib.import_module("paddle")
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()


class LineProgress:
    """What tqdm does, for output that isn't a terminal: a whole line now and then, none for short work."""

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.n = self.printed_n = 0
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "LineProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        self.n += n
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def close(self) -> None:
        if 0 < self.printed_n < self.n:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line, self.printed_n = time.monotonic(), self.n
        elapsed = self.last_line - self.start
        print(
            tqdm.format_meter(self.n, self.total, elapsed, ncols=0, prefix=self.desc, unit=self.unit),
            file=sys.stderr,
            flush=True,
        )


Progress = tqdm | LineProgress


def progress_bar(total: int, desc: str, unit: str) -> Progress:
    """A tqdm bar on a terminal, else a line every 10 s, neither for short work; on stderr, to be used as a context."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, delay=SECONDS_BEFORE_BAR)
    return LineProgress(total, desc, unit)
