"""Loads a service with clients in threads, and summarizes how fast it and other ways were that took turns with it."""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import LOWEST_COSINES
from benchmarks.service_clients import Client

TOLERANCE = 1e-5  # of a component of a vector, and of a cosine
PERCENTILES = (50, 90, 95, 99)
BATCHES, ENCODING, SEARCHING = (  # what a service counts
    f"semantic_index_{name}"
    for name in ("batch_size_texts_count", "batch_duration_seconds_sum", "search_duration_seconds_sum")
)


class Served(NamedTuple):
    """What a service serves, and what its clients ask for."""

    model_dir: Path
    options: Sequence[str]  # of the service
    texts: Sequence[str]
    vectors: np.ndarray  # of the texts, float32 [N, D]
    clients: int


class Way(NamedTuple):
    """A way to get an answer for a text from a service."""

    connect: Callable[[], AbstractContextManager[Client]]
    check: Callable[[int, Any], None]  # raises AssertionError if what an answer holds isn't right for the text
    metrics: Callable[[], dict[str, float]] | None  # the C++ server has none


class Measured(NamedTuple):
    """What one way did in one round."""

    texts: int
    seconds: float
    latencies: list[float]  # seconds, of each call
    batches: int = 0  # that the service encoded; 0 if it has no metrics
    encoding_seconds: float = 0.0  # of all batches; the rest of `seconds` is the service's own
    searching_seconds: float = 0.0


def measure_batches(call: Callable[[Any], object], batches: Iterator[Sequence[Any]], seconds: float) -> Measured:
    """Calls a function of this process with batches, one after another, for this many seconds."""
    latencies, texts = [], 0
    start = end = time.perf_counter()
    while end - start < seconds:
        batch = next(batches)
        batch_start = time.perf_counter()
        call(batch)
        end = time.perf_counter()
        latencies.append(end - batch_start)
        texts += len(batch)
    return Measured(texts, end - start, latencies)


def measure_service(way: Way, texts: Sequence[str], clients: int, seconds: float) -> Measured:
    """Lets clients call for this many seconds. Raises AssertionError for a wrong answer."""
    with way.connect() as client:
        requests = [client.prepare([text]) for text in texts]
    lock, rows = threading.Lock(), cycle(range(len(texts)))
    calls: list[tuple[int, float, Any]] = []  # row, seconds, answer
    failures: list[BaseException] = []
    before = way.metrics() if way.metrics else {}
    start = time.perf_counter()

    def take_row() -> int:
        with lock:
            return next(rows)

    def call() -> None:
        try:
            with way.connect() as client:
                while time.perf_counter() - start < seconds:
                    row = take_row()
                    call_start = time.perf_counter()
                    answer = client.send(requests[row])
                    calls.append((row, time.perf_counter() - call_start, answer))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    end = time.perf_counter()
    after = way.metrics() if way.metrics else {}
    batches, *busy_seconds = (after.get(name, 0.0) - before.get(name, 0.0) for name in (BATCHES, ENCODING, SEARCHING))
    for row, _, answer in calls:
        way.check(row, client.parse(answer))
    return Measured(len(calls), end - start, [latency for _, latency, _ in calls], int(batches), *busy_seconds)


def check_vector(
    texts: Sequence[str], vectors: np.ndarray, row: int, answer: np.ndarray, *, precision: str = "fp32"
) -> None:
    """Raises AssertionError unless the answer to a text is its vector; vectors: of all texts, float32 [N, D].

    In other precisions than fp32 a vector depends on the batch, and only has to be near.
    """
    lowest = LOWEST_COSINES.get(precision)
    if answer.shape != (1, vectors.shape[1]) or not (
        answer[0] @ vectors[row] >= lowest if lowest else np.abs(answer - vectors[row]).max() <= TOLERANCE
    ):  # NaN too
        raise AssertionError(f"{texts[row]}: a wrong vector")


def take_turns(ways: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What each way does in each round; they take turns, so that a slow minute of the machine affects all of them."""
    measured: dict[str, list[Measured]] = {way: [] for way in ways}
    for number, way in product(range(1, rounds + 1), ways):
        measured[way].append(ways[way]())
        print(f"round {number} of {rounds}: {way}", file=sys.stderr, flush=True)
    return measured


def speeds(rounds: Mapping[str, Sequence[Measured]]) -> dict[str, float]:
    """Texts a second of each way, the median over its rounds."""
    return {
        way: statistics.median(measured.texts / measured.seconds for measured in of_way)
        for way, of_way in rounds.items()
    }


def summary(rounds: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, Any]]:
    """The figures of each way."""
    latencies = {way: [value for measured in of_way for value in measured.latencies] for way, of_way in rounds.items()}
    counted = {way: of_way for way, of_way in rounds.items() if all(measured.batches for measured in of_way)}

    def share(field: str) -> dict[str, float]:
        medians = {
            way: statistics.median(getattr(measured, field) / measured.seconds for measured in of_way)
            for way, of_way in counted.items()
        }
        return {way: round(median, 3) for way, median in medians.items() if median}

    return {
        "texts_per_second": {way: round(value, 2) for way, value in speeds(rounds).items()},
        "latency_ms": {
            way: {f"p{p}": round(float(np.percentile(values, p)) * 1000, 1) for p in PERCENTILES}
            for way, values in latencies.items()
        },
        "texts_per_batch": {
            way: round(sum(measured.texts for measured in of_way) / sum(measured.batches for measured in of_way), 1)
            for way, of_way in counted.items()
        },
        "encoding_share": share("encoding_seconds"),
        "searching_share": share("searching_seconds"),
        "calls": {way: len(values) for way, values in latencies.items()},
        "texts_per_second_of_rounds": {
            way: [round(measured.texts / measured.seconds, 2) for measured in of_way] for way, of_way in rounds.items()
        },
    }


def print_table(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints what `summary` returns, a line for each way."""
    columns = ["texts/s", *(f"p{p} ms" for p in PERCENTILES), "texts/batch", "encoding", "searching"]
    width = max(map(len, figures["texts_per_second"]))
    print(" " * width + "".join(f"{column:>13}" for column in columns))
    for way, speed in figures["texts_per_second"].items():
        numbers = [speed, *figures["latency_ms"][way].values(), figures["texts_per_batch"].get(way)]
        cells = ["" if number is None else f"{number:.1f}" for number in numbers]
        shares = (figures[name].get(way) for name in ("encoding_share", "searching_share"))
        cells += ["" if share is None else f"{share:.1%}" for share in shares]
        print(f"{way:{width}}" + "".join(f"{cell:>13}" for cell in cells).rstrip())
