"""Lines on stderr and progress bars."""

import os
import sys
import time
from typing import TypeAlias

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # of progress where stderr isn't a terminal, such as in a log file
SECONDS_BEFORE_BAR = 1.0  # on a terminal


def is_main_process() -> bool:
    """Whether this process reports: the only one, or rank 0 under `paddle.distributed.launch`."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def log(message: str) -> None:
    """Prints a line on stderr, on rank 0 only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


class LineProgress:
    """Progress where stderr isn't a terminal: whole lines at intervals, none for short work; used as tqdm is."""

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.n = self.printed_n = 0
        self.start = self.last_line = time.monotonic()

    def __enter__(self) -> "LineProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Counts n more."""
        self.n += n
        if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def close(self) -> None:
        """Prints the last line if there was one before."""
        if 0 < self.printed_n < self.n:
            self._print_line()

    def _print_line(self) -> None:
        self.last_line, self.printed_n = time.monotonic(), self.n
        elapsed = self.last_line - self.start
        line = tqdm.format_meter(self.n, self.total, elapsed, ncols=0, prefix=self.desc, unit=self.unit)
        print(line, file=sys.stderr, flush=True)


Progress: TypeAlias = tqdm | LineProgress


def progress_bar(total: int, desc: str, unit: str) -> Progress:
    """A context with `update(n)`: a tqdm bar on a terminal, else a line every 10 s, neither for short work."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, delay=SECONDS_BEFORE_BAR)
    return LineProgress(total, desc, unit)
