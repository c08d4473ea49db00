"""Speed of Pipeline Serving and of the C++ server beside one process that calls Paddle Inference directly.

Direct: batches of --batch_size texts in file order are tokenized, padded and encoded one after another. Served: as many
clients as a batch has texts each send one text and wait for its vector. Requests are built before the timed part and
answers are compared with the right vectors after it, so that the service is timed rather than Python's protobuf and
JSON. The C++ server's clients send token ids, those of Pipeline Serving send texts.
The ways take turns. The last line is a JSON object; a ratio is served texts/s divided by direct texts/s, and
cpp_vs_pipeline compares the faster way of each.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy" / "C++"))

from common.cli import ArgumentParser, number_in_range, run
from common.cpu import cpu_count
from common.errors import InputError
from common.paddle_setup import set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

import numpy as np

from base_model import SemanticIndexBase
from batch_negative.batches import batched
from benchmarks.harness import (
    BASE_ERNIE,
    MAX_SEQ_LENGTH,
    MEDIUM_ERNIE,
    add_input_args,
    benchmark_inputs,
    describe_machine,
)
from benchmarks.service_clients import CLIENTS, CPP_CLIENTS, Client, read_metrics, running_cpp_service, running_service
from data import encode_texts
from encoding.static_graph import Exported, load_exported
from export_model import main as export
from export_to_serving import main as export_to_serving
from modeling.checkpoint import create_model, save_checkpoint

TOLERANCE = 1e-5  # of a component
PERCENTILES = (50, 90, 95, 99)
DIRECT = "direct"


class Way(NamedTuple):
    """A way to get vectors from a service."""

    connect: Callable[[], AbstractContextManager[Client]]
    metrics: Callable[[], dict[str, float]] | None  # the C++ server has none


class Measured(NamedTuple):
    """What one way did in one round."""

    texts: int
    seconds: float
    latencies: list[float]  # seconds, of each call
    batches: int  # 0 if the service has no metrics
    encoding_seconds: float  # of all batches; the rest of `seconds` is the service's own


def measure_direct(model: Exported, texts: Sequence[str], batch_size: int, seconds: float) -> Measured:
    """Encodes batches for this many seconds."""
    latencies = []
    start = time.perf_counter()
    for batch in batched(cycle(texts), batch_size):
        batch_start = time.perf_counter()
        model.encoder.embed(*model.tokenizer(batch))
        end = time.perf_counter()
        latencies.append(end - batch_start)
        if end - start > seconds:
            return Measured(len(latencies) * batch_size, end - start, latencies, len(latencies), sum(latencies))


def measure_service(way: Way, texts: Sequence[str], vectors: np.ndarray, clients: int, seconds: float) -> Measured:
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
    names = ("semantic_index_batch_size_texts_count", "semantic_index_batch_duration_seconds_sum")
    batches, encoding_seconds = (after.get(name, 0) - before.get(name, 0) for name in names)
    for row, _, answer in calls:
        vector = client.vectors(answer)
        if vector.shape != (1, vectors.shape[1]) or not np.abs(vector - vectors[row]).max() <= TOLERANCE:
            raise AssertionError(f"{texts[row]}: a wrong vector")
    return Measured(len(calls), end - start, [latency for _, latency, _ in calls], int(batches), encoding_seconds)


def summary(rounds: dict[str, list[Measured]]) -> dict[str, object]:
    """The ratios, and the figures behind them."""
    speed = {
        way: statistics.median(measured.texts / measured.seconds for measured in of_way)
        for way, of_way in rounds.items()
    }
    latencies = {way: [value for measured in of_way for value in measured.latencies] for way, of_way in rounds.items()}
    ratios = {f"{way}_vs_{DIRECT}": round(speed[way] / speed[DIRECT], 3) for way in speed if way != DIRECT}
    if speed.keys() >= CPP_CLIENTS.keys():
        cpp, pipeline = (max(speed[way] for way in ways) for ways in (CPP_CLIENTS, CLIENTS))
        ratios |= {"cpp_vs_direct": round(cpp / speed[DIRECT], 3), "cpp_vs_pipeline": round(cpp / pipeline, 3)}
    counted = {way: of_way for way, of_way in rounds.items() if all(measured.batches for measured in of_way)}
    return {
        **ratios,
        "texts_per_second": {way: round(value, 2) for way, value in speed.items()},
        "latency_ms": {
            way: {f"p{p}": round(float(np.percentile(values, p)) * 1000, 1) for p in PERCENTILES}
            for way, values in latencies.items()
        },
        "texts_per_batch": {
            way: round(sum(measured.texts for measured in of_way) / sum(measured.batches for measured in of_way), 1)
            for way, of_way in counted.items()
        },
        "encoding_share": {
            way: round(statistics.median(measured.encoding_seconds / measured.seconds for measured in of_way), 3)
            for way, of_way in counted.items()
        },
        "calls": {way: len(values) for way, values in latencies.items()},
        "texts_per_second_of_rounds": {
            way: [round(measured.texts / measured.seconds, 2) for measured in of_way] for way, of_way in rounds.items()
        },
    }


def exported_model(model: Path, folder: Path) -> Path:
    """Random weights for a config.json and a vocab.txt, exported."""
    created, tokenizer = create_model(SemanticIndexBase, from_scratch=str(model), max_seq_length=MAX_SEQ_LENGTH)
    save_checkpoint(folder / "checkpoint", created, tokenizer)
    export(["--params_path", str(folder / "checkpoint"), "--output_path", str(folder / "output")])
    return folder / "output"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_input_args(parser)
    parser.add_argument("--model_dir", type=Path, help="exported model to serve (default: base ERNIE, random weights)")
    parser.add_argument("--serving_bin", type=Path, help="also the C++ server: what deploy/C++/build.sh prints")
    parser.add_argument("--batch_size", type=number_in_range(1), default=32, help="texts per batch, and clients")
    parser.add_argument("--threads", type=number_in_range(1), default=cpu_count(), help="CPU threads that encode")
    parser.add_argument("--texts", type=number_in_range(1), default=512, help="titles to encode, again and again")
    parser.add_argument("--seconds", type=number_in_range(0.1, float), default=20.0, help="of each way in each round")
    parser.add_argument("--rounds", type=number_in_range(1), default=3, help="turns of each way")
    parser.add_argument("--quick", action="store_true", help="a small model (4 layers of 256), 2 rounds of 8 s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args = build_parser().parse_args(argv)
    rounds, seconds, sizes = (2, 8.0, MEDIUM_ERNIE) if args.quick else (args.rounds, args.seconds, BASE_ERNIE)
    machine = describe_machine()
    with benchmark_inputs(args.train_set_file, args.model, sizes) as inputs:
        texts = [pair.title for pair in inputs.pairs[: args.texts]]
        if len(texts) < args.batch_size:
            raise InputError(f"--batch_size {args.batch_size}: is more than the {len(texts)} texts")
        model_dir = args.model_dir or exported_model(inputs.model, inputs.folder)
        model = load_exported(model_dir, threads=args.threads)
        vectors = encode_texts(model.encoder.embed, texts, model.tokenizer, args.batch_size)
        options = ["--batch_size", str(args.batch_size), "--threads", str(args.threads)]
        with ExitStack() as stack:
            service = stack.enter_context(running_service(model_dir, *options))
            ways = {
                way: Way(partial(client, service), partial(read_metrics, service)) for way, client in CLIENTS.items()
            }
            if args.serving_bin:
                folders = [f"--{name}_path={inputs.folder}/serving_{name}" for name in ("server", "client")]
                export_to_serving(["--dirname", str(model_dir), *folders])
                cpp_service = stack.enter_context(
                    running_cpp_service(args.serving_bin.absolute(), inputs.folder / "serving_server", model.tokenizer)
                )
                ways |= {way: Way(partial(client, cpp_service), None) for way, client in CPP_CLIENTS.items()}
            measured: dict[str, list[Measured]] = {way: [] for way in (DIRECT, *ways)}
            for number, way in product(range(1, rounds + 1), measured):  # a slow minute of the machine affects all ways
                if way == DIRECT:
                    measured[way].append(measure_direct(model, texts, args.batch_size, seconds))
                else:
                    measured[way].append(measure_service(ways[way], texts, vectors, args.batch_size, seconds))
                print(f"round {number} of {rounds}: {way}", file=sys.stderr, flush=True)
    result = summary(measured)
    columns = ["texts/s", *(f"p{p} ms" for p in PERCENTILES), "texts/batch", "encoding"]
    print(" " * 8 + "".join(f"{column:>13}" for column in columns))
    for way in measured:
        percentiles = result["latency_ms"][way].values()
        line = f"{way:8}" + "".join(f"{value:>13.1f}" for value in [result["texts_per_second"][way], *percentiles])
        if way in result["texts_per_batch"]:
            line += f"{result['texts_per_batch'][way]:>13.1f}{result['encoding_share'][way]:>13.1%}"
        print(line)
    print(json.dumps({**result, "batch_size": args.batch_size, "threads": args.threads, "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
