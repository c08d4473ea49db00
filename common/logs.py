"""Lines on stderr and progress bars."""

import io
import os
import sys

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0  # of progress where stderr isn't a terminal, such as in a log file
SECONDS_BEFORE_BAR = 1.0  # on a terminal


def is_main_process() -> bool:
    """Whether this process reports: the only one, or rank 0 under `paddle.distributed.launch`."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


def process_count() -> int:
    """Processes of this run: 1, or those under `paddle.distributed.launch`."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def log(message: str) -> None:
    """Prints a line on stderr, on rank 0 only."""
    if is_main_process():
        print(message, file=sys.stderr, flush=True)


class LineProgress(tqdm):
    """Progress where stderr isn't a terminal: whole lines at intervals in place of a bar, none for short work."""

    printed_n = 0

    def __init__(self, total: int, desc: str, unit: str) -> None:
        times = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES, "miniters": 1, "smoothing": 0}
        super().__init__(total=total, desc=desc, unit=unit, ncols=0, file=io.StringIO(), **times)

    def display(self, *_: object, **__: object) -> None:
        """Prints the line, unless the last one said the same: tqdm shows its state once more at the end."""
        if self.n != self.printed_n:
            self.printed_n = self.n
            print(self, file=sys.stderr, flush=True)


def progress_bar(total: int, desc: str, unit: str) -> tqdm:
    """A context with `update(n)`: a tqdm bar on a terminal, else a line every 10 s, neither for short work."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, dynamic_ncols=True, delay=SECONDS_BEFORE_BAR)
    return LineProgress(total, desc, unit)
