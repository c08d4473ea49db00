"""Counts of requests, errors, batch sizes and latencies, in the text format of Prometheus."""

import bisect
import threading
from collections import Counter
from collections.abc import Sequence

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # texts
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many values were at most as large as each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        """As Prometheus reads it."""
        lines, total = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6g}", f"{name}_count {total}"]


class Metrics:
    """What a service has done since it started; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()  # by way in: rpc or http
        self._errors: Counter[int] = Counter()  # by err_no
        self._latency = Histogram(LATENCY_BUCKETS)
        self._batches = Histogram(BATCH_BUCKETS)
        self._encoding = Histogram(LATENCY_BUCKETS)

    def answered(self, way: str, number: int, seconds: float) -> None:
        """A request was answered; number: its err_no."""
        with self._lock:
            self._requests[way] += 1
            if number:
                self._errors[number] += 1
            self._latency.add(seconds)

    def encoded(self, texts: int, seconds: float) -> None:
        """Texts were encoded together."""
        with self._lock:
            self._batches.add(texts)
            self._encoding.add(seconds)

    def text(self, waiting_requests: int, waiting_texts: int) -> str:
        """Everything, with what is being worked on right now."""
        with self._lock:
            lines = [
                "# HELP requests_total Requests that were answered, by way in.",
                "# TYPE requests_total counter",
                *(f'requests_total{{way="{way}"}} {count}' for way, count in sorted(self._requests.items())),
                "# HELP errors_total Answers that were errors, by err_no.",
                "# TYPE errors_total counter",
                *(f'errors_total{{err_no="{number}"}} {count}' for number, count in sorted(self._errors.items())),
                "# HELP waiting Requests and texts that aren't answered yet.",
                "# TYPE waiting gauge",
                f'waiting{{of="requests"}} {waiting_requests}',
                f'waiting{{of="texts"}} {waiting_texts}',
                "# HELP request_seconds From a request's arrival to its answer.",
                "# TYPE request_seconds histogram",
                *self._latency.lines("request_seconds"),
                "# HELP batch_texts Texts that were encoded together.",
                "# TYPE batch_texts histogram",
                *self._batches.lines("batch_texts"),
                "# HELP batch_seconds What encoding them took.",
                "# TYPE batch_seconds histogram",
                *self._encoding.lines("batch_seconds"),
            ]
        return "\n".join(lines) + "\n"
