"""Memory and time of the gradient cache on a CPU: its memory must hardly grow with the batch.

The last line is a JSON object: the peak memory of one step of a large batch, divided by that of a small one, and the
time per pair with the cache, divided by that of plain training.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    BASE_ERNIE,
    MAX_SEQ_LENGTH,
    MEDIUM_ERNIE,
    Training,
    add_input_args,
    benchmark_inputs,
    describe_machine,
    interleaved,
    median_step_seconds,
    run_process,
    write_pairs,
)
from common.cli import ArgumentParser, number_in_range, run
from data import TextPair

CHUNK = 32


class Sizes(NamedTuple):
    """The sizes of one run."""

    model: dict[str, int]
    large_batch: int  # its peak memory is compared with small_batch's
    small_batch: int
    cached_batch: int  # its time per pair is compared with plain_batch's
    plain_batch: int
    steps: int  # timed ones of each process
    rounds: int


FULL = Sizes(BASE_ERNIE, 2048, 256, 256, 64, 1, 3)
QUICK = Sizes(MEDIUM_ERNIE, 512, 64, 128, 64, 1, 2)


def full_length(pairs: Sequence[TextPair], count: int) -> list[TextPair]:
    """`count` different pairs of texts that fill MAX_SEQ_LENGTH: each is numbered and repeated."""
    texts = (pairs[row % len(pairs)] for row in range(count))
    return [TextPair(*(f"{row} {text} " * MAX_SEQ_LENGTH for text in pair[:2])) for row, pair in enumerate(texts)]


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_input_args(parser)
    parser.add_argument("--large_batch", type=number_in_range(CHUNK), help=f"pairs (default: {FULL.large_batch})")
    parser.add_argument("--small_batch", type=number_in_range(CHUNK), help=f"pairs (default: {FULL.small_batch})")
    parser.add_argument(
        "--rounds", type=number_in_range(1), help=f"timed processes of each kind (default: {FULL.rounds})"
    )
    parser.add_argument("--quick", action="store_true", help="a small model and small batches, in minutes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what it measured, and the JSON object."""
    args = build_parser().parse_args(argv)
    chosen = {name: value for name in ("large_batch", "small_batch", "rounds") if (value := getattr(args, name))}
    sizes = (QUICK if args.quick else FULL)._replace(**chosen)
    machine = describe_machine()
    with benchmark_inputs(args.train_set_file, args.model, sizes.model) as inputs:
        needed = max(sizes.large_batch, sizes.cached_batch * (sizes.steps + 1))
        train_set_file = write_pairs(inputs.folder / "train.csv", full_length(inputs.pairs, needed))

        def command(batch_size: int, steps: int, *options: str) -> list[str | Path]:
            trainer = [sys.executable, Path(__file__).parent / "train_ours.py", "--model", inputs.model]
            return [
                *trainer,
                "--train_set_file",
                train_set_file,
                "--batch_size",
                str(batch_size),
                "--steps",
                str(steps),
                *options,
            ]

        cache = ["--grad_cache_chunk", str(CHUNK)]
        # The first step of a process warms it up. Both kinds are timed on the same number of pairs.
        timed = interleaved(
            {
                "plain": command(sizes.plain_batch, sizes.steps * sizes.cached_batch // sizes.plain_batch + 1),
                "cached": command(sizes.cached_batch, sizes.steps + 1, *cache),
            },
            sizes.rounds,
            inputs.folder,
            Training,
        )
        peaks = {
            size: run_process(command(size, 1, *cache), inputs.folder / "report.json", Training).peak_bytes
            for size in (sizes.small_batch, sizes.large_batch)
        }
    result = summary(timed, peaks, sizes)
    for name, seconds in result["seconds_per_pair"].items():
        print(f"{name}: {seconds:.4f} s per pair")
    for size, mib in result["peak_mib"].items():
        print(f"{size} pairs through the cache: {mib} MiB at most")
    print(json.dumps({**result, "machine": machine}))
    return 0


def summary(timed: dict[str, list[Training]], peaks: dict[int, int], sizes: Sizes) -> dict[str, object]:
    """The ratios, and the figures behind them."""
    per_pair = {
        "plain": median_step_seconds(timed["plain"], 1) / sizes.plain_batch,
        "cached": median_step_seconds(timed["cached"], 1) / sizes.cached_batch,
    }
    return {
        "peak_memory_ratio": round(peaks[sizes.large_batch] / peaks[sizes.small_batch], 3),
        "time_per_pair_ratio": round(per_pair["cached"] / per_pair["plain"], 3),
        "peak_mib": {str(size): round(peak / 2**20) for size, peak in peaks.items()},
        "seconds_per_pair": {name: round(seconds, 5) for name, seconds in per_pair.items()},
        "seconds_of_steps": {
            name: [[round(value, 2) for value in training.step_seconds] for training in rounds]
            for name, rounds in timed.items()
        },
        "sizes": sizes._asdict(),
        "chunk": CHUNK,
        "length": MAX_SEQ_LENGTH,
    }


if __name__ == "__main__":
    run(main)
