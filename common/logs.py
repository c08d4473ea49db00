"""Log lines and progress bars on stderr."""

import contextlib
import ctypes
import io
import os
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # of progress, where stderr isn't a terminal
SECONDS_BEFORE_BAR = 1.0  # on a terminal
STDOUT, STDERR = 1, 2  # file descriptors


def is_main_process() -> bool:
    """Whether this is rank 0 under `paddle.distributed.launch`, or the only process. Only this one logs."""
    return process_count() == 1 or os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def process_count() -> int:
    """The number of ranks under `paddle.distributed.launch`, else 1, also for what isn't a number.

    `common.environment.check_ranks` refuses that.
    """
    count = os.environ.get("PADDLE_TRAINERS_NUM", "")
    return max(1, int(count)) if count.isdecimal() else 1


def log(message: str) -> None:
    """Prints a line on stderr, on rank 0 only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Inside this block stderr takes what is printed on stdout, which is for results, also by libraries in C++."""
    flush_all = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    stdout = os.dup(STDOUT)
    try:
        os.dup2(STDERR, STDOUT)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        flush_all(None)
        os.dup2(stdout, STDOUT)
        os.close(stdout)


class LineProgress(tqdm):
    """Progress where stderr isn't a terminal: a line every SECONDS_BETWEEN_LINES, so none for shorter work."""

    printed_n = 0  # `n` in the last line

    def __init__(self, total: int, desc: str, unit: str, unit_scale: bool = False) -> None:
        timing = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES, "miniters": 1, "smoothing": 0}
        layout = {"unit": unit, "unit_scale": unit_scale, "ncols": 0}
        super().__init__(total=total, desc=desc, file=io.StringIO(), **layout, **timing)
        self._time = time.monotonic  # tqdm's clock may be set meanwhile
        self.start_t = self.last_print_t = self._time()

    def display(self, *_: object, **__: object) -> None:
        """Prints a line, unless nothing was done since the last one: tqdm displays its state again at the end."""
        if self.n != self.printed_n:
            self.printed_n = self.n
            print(self, file=sys.stderr, flush=True)


def progress_bar(total: int, desc: str, unit: str, *, unit_scale: bool = False) -> tqdm:
    """A context manager with `update(n)`: a tqdm bar on a terminal, else a line every 10 s; nothing for short work.

    unit_scale: shows large numbers with k, M or G.
    """
    if sys.stderr.isatty():
        layout = {"unit": unit, "unit_scale": unit_scale, "dynamic_ncols": True}
        # leave=None: a bar within another one, as of a search while mining, disappears at its end.
        return tqdm(total=total, desc=desc, delay=SECONDS_BEFORE_BAR, leave=None, **layout)
    return LineProgress(total, desc, unit, unit_scale)
