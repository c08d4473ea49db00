"""Speed of training on a CPU: ours beside the loop of the original scripts and beside sentence-transformers.

Each trainer takes the same steps of the same pairs, in fresh processes that take turns. The last line is a JSON object;
a ratio above 1 means that ours is faster.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    BENCHMARKS_PYTHON,
    MEDIUM_ERNIE,
    PASSIVE,
    SLEEPING,
    SPINNING,
    Inputs,
    Training,
    add_input_args,
    benchmark_inputs,
    check_benchmarks_python,
    describe_machine,
    in_training_order,
    interleaved,
    median_step_seconds,
    write_pairs,
)
from common.cli import ArgumentParser, number_in_range, run
from common.errors import InputError

SEED = 0
FOLDER = Path(__file__).parent
REFERENCE, OURS, TWO_RANKS = "reference", "ours", "ours, two ranks"


def trainer_commands(inputs: Inputs, steps: int, batch_size: int) -> dict[str, list[str | Path]]:
    """The command of each trainer, for the same batches in the same order."""
    pairs = inputs.pairs[: steps * batch_size]
    train_set_file = write_pairs(inputs.folder / "train.csv", pairs)
    ordered_file = write_pairs(inputs.folder / "ordered.csv", in_training_order(pairs, batch_size, SEED))
    common = ["--model", inputs.model, "--steps", str(steps), "--seed", str(SEED)]
    one_process = [*common, "--batch_size", str(batch_size)]
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", inputs.folder / "log"]
    ours = [FOLDER / "train_ours.py", "--train_set_file", train_set_file]
    peer_script = FOLDER / "sentence_transformers_train.py"
    peer = [BENCHMARKS_PYTHON, peer_script, *one_process, "--train_set_file", train_set_file]
    return {
        REFERENCE: [sys.executable, FOLDER / "reference.py", *one_process, "--train_set_file", ordered_file],
        SPINNING: peer,
        SLEEPING: [*PASSIVE, *peer],
        OURS: [sys.executable, *ours, *one_process],
        TWO_RANKS: [sys.executable, *launch, *ours, *common, "--batch_size", str(batch_size // 2)],
    }


def summary(trainings: Mapping[str, Sequence[Training]], batch_size: int, warm_up: int) -> dict[str, object]:
    """The ratios, and the figures behind them."""
    seconds = {name: median_step_seconds(rounds, warm_up) for name, rounds in trainings.items()}
    peer_seconds = min(seconds[SPINNING], seconds[SLEEPING])
    return {
        "ratio_vs_reference": round(seconds[REFERENCE] / seconds[OURS], 3),
        "ratio_vs_sentence_transformers": round(peer_seconds / seconds[OURS], 3),
        "two_ranks_ratio_vs_sentence_transformers": round(peer_seconds / seconds[TWO_RANKS], 3),
        "steps_per_second": {name: round(1 / value, 4) for name, value in seconds.items()},
        "pairs_per_second": {name: round(batch_size / value, 2) for name, value in seconds.items()},
        "seconds_of_steps": {
            name: [[round(value, 3) for value in training.step_seconds] for training in rounds]
            for name, rounds in trainings.items()
        },
        "last_loss": {name: round(rounds[0].losses[-1], 4) for name, rounds in trainings.items()},
        "warm_up_steps": warm_up,
        "batch_size": batch_size,
        "versions": {k: v for rounds in trainings.values() for k, v in rounds[0].versions.items()},
    }


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_input_args(parser)
    parser.add_argument("--batch_size", type=number_in_range(2), default=64, help="pairs per step, over all processes")
    parser.add_argument("--steps", type=number_in_range(2), default=12, help="steps of each process, warm-up included")
    parser.add_argument("--warm_up", type=number_in_range(1), default=2, help="first steps that aren't counted")
    parser.add_argument("--rounds", type=number_in_range(1), default=5, help="processes of each trainer")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps, the first one not counted")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args = build_parser().parse_args(argv)
    check_benchmarks_python()
    steps, warm_up, rounds = (3, 1, 2) if args.quick else (args.steps, args.warm_up, args.rounds)
    if steps <= warm_up:
        raise InputError(f"--steps {steps}: must be more than --warm_up {warm_up}")
    if args.batch_size % 2:
        raise InputError(f"--batch_size {args.batch_size}: must be even, for two ranks of half of it")
    machine = describe_machine()
    with benchmark_inputs(args.train_set_file, args.model, MEDIUM_ERNIE) as inputs:
        if len(inputs.pairs) < steps * args.batch_size:
            needed = f"{steps} steps of {args.batch_size} pairs need {steps * args.batch_size}"
            raise InputError(f"{args.train_set_file}: has {len(inputs.pairs)} pairs, {needed}; lower --steps")
        trainings = interleaved(trainer_commands(inputs, steps, args.batch_size), rounds, inputs.folder, Training)
    result = summary(trainings, args.batch_size, warm_up)
    print(f"{'':48}{'steps/s':>10}{'pairs/s':>10}{'last loss':>12}")
    for name in trainings:
        figures = [result[column][name] for column in ("steps_per_second", "pairs_per_second", "last_loss")]
        print(f"{name:48}{figures[0]:>10.3f}{figures[1]:>10.1f}{figures[2]:>12.3f}")
    print(json.dumps({**result, "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
