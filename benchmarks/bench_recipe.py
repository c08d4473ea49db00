"""Quality of each stage of docs/recipe.md and of all together, at the same number of steps, over several seeds.

All options that it doesn't know go to every training, such as --from_scratch or --model_name_or_path, --pooling,
--learning_rate. recall.py and evaluate.py's metrics judge the models. The last line is a JSON object. What is done is
kept in --output, and an interrupted training goes on.
"""

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import ROOT, describe_machine, run_checked
from benchmarks.quality import SHOWN, Metrics, judge, kept, means_of, print_table, recall_of_seeds, settings_of
from common.cli import ArgumentParser, number_in_range, positive_int, run
from common.files import atomic_write, remove_folder, scratch_folder
from common.lines import read_lines

PAIRS, PIECES, SIMCSE, WORDS, MINED = "pairs", "pieces", "simcse", "words", "mined"  # what a stage trains on
RECIPES = {  # method -> its stages, which share the steps
    "plain": (PAIRS,),
    "pre-training": (PIECES, PAIRS),
    "SimCSE": (SIMCSE, PAIRS),
    "hard negatives": (PAIRS, MINED),
    "BM25's scores": (WORDS,),
    "all": (PIECES, WORDS, MINED),
}
SAMPLE_FILE, MINED_FILE = "pairs.csv", "mined.csv"  # in the folder of a stage
TRAINING_SECONDS = "training_s"  # of all stages, without mining


class Task(NamedTuple):
    """What is trained on what, and how long."""

    data: Path  # folder with train.csv, test.csv and corpus.csv
    steps: int  # of all stages together
    batch_size: int
    pieces_batch_size: int
    pairs_per_text: int  # that are cut from a text
    mined_negatives: int
    word_negatives: int
    max_seq_length: int
    options: tuple[str, ...]  # of every training; among them the model to start from


class Stage(NamedTuple):
    """A training of a recipe."""

    task: Task
    kind: str
    steps: int
    seed: int
    start: Path | None  # the checkpoint of the stage before
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """What it trains."""
        return self.folder / f"model_{self.steps}"


def training_command(stage: Stage) -> list[str | Path]:
    """The command that trains a stage, or goes on with it."""
    task = stage.task
    train_set_file, corpus_file, mined = task.data / "train.csv", task.data / "corpus.csv", stage.folder / MINED_FILE
    pieces = ["--text_file", corpus_file, "--text_file", train_set_file, "--pairs_per_text", str(task.pairs_per_text)]
    simcse = ["--unsupervised", "--margin", "0", "--scale", "20"]  # see docs/training.md
    script, *own = {
        PAIRS: ["train_batch_neg.py", "--train_set_file", train_set_file],
        PIECES: ["tools/pretrain.py", *pieces, "--batch_size", str(task.pieces_batch_size)],
        SIMCSE: ["train_batch_neg.py", "--train_set_file", corpus_file, *simcse],
        WORDS: ["train_batch_neg.py", "--train_set_file", mined, "--teacher_scores", "--teacher_scale", "0.3"],
        MINED: ["train_batch_neg.py", "--train_set_file", mined],
    }[stage.kind]
    command = [sys.executable, ROOT / script, "--batch_size", str(task.batch_size), *task.options]
    command += [*own, "--save_dir", stage.folder, "--max_steps", str(stage.steps), "--seed", str(stage.seed)]
    command += ["--max_seq_length", str(task.max_seq_length), "--resume_from", "latest"]
    return [*command, "--init_from_ckpt", stage.start] if stage.start else command


def mining_command(stage: Stage) -> list[str | Path]:
    """The command that finds hard negatives for the pairs of a stage: BM25's, or those of the model before it."""
    script = ROOT / "tools" / "mine_hard_negatives.py"
    command = [sys.executable, script, "--device", "cpu", "--corpus_file", stage.task.data / "corpus.csv"]
    command += ["--train_set_file", stage.folder / SAMPLE_FILE, "--output", stage.folder / MINED_FILE]
    if stage.kind == WORDS:
        words = ["--lexical", "bm25", "--random_share", "1", "--max_relative_score", "1", "--write_scores"]
        return [*command, *words, "--negatives", str(stage.task.word_negatives)]
    model = ["--params_path", stage.start, "--max_seq_length", str(stage.task.max_seq_length), "--ann", "exact"]
    return [*command, *model, "--negatives", str(stage.task.mined_negatives)]


def write_sample(train_set_file: Path, count: int, seed: int, output: Path) -> None:
    """As many lines of a training file as a stage sees, drawn at random; all of them if there are no more.

    Raises InputError as `read_lines`.
    """
    lines = [line.row for line in read_lines(train_set_file, lambda text: text.rstrip("\r\n"))]
    with atomic_write(output) as file:
        file.writelines(f"{line}\n" for line in random.Random(seed).sample(lines, min(count, len(lines))))


def train(stage: Stage) -> float:
    """Trains a stage, unless that is done, and returns how many seconds the training took in this run."""
    if stage.checkpoint.is_dir():
        return 0.0
    stage.folder.mkdir(parents=True, exist_ok=True)
    if stage.kind in (WORDS, MINED) and not (stage.folder / MINED_FILE).is_file():
        pairs = stage.steps * stage.task.batch_size
        write_sample(stage.task.data / "train.csv", pairs, stage.seed, stage.folder / SAMPLE_FILE)
        run_checked(mining_command(stage))
    begin = time.perf_counter()
    run_checked(training_command(stage))
    return time.perf_counter() - begin


def result_of(task: Task, method: str, seed: int, output: Path) -> Metrics:
    """Trains and judges a model, unless `output` has the result already."""
    settings = settings_of(task)
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]  # stages of another task aren't used
    unfinished = output / "unfinished" / f"{method.replace(' ', '_')}_{seed}_{digest}"

    def compute() -> Metrics:
        start, seconds = None, 0.0
        kinds = RECIPES[method]
        for kind in kinds:
            stage = Stage(task, kind, task.steps // len(kinds), seed, start, unfinished / kind)
            seconds += train(stage)
            start = stage.checkpoint
        with scratch_folder() as scratch:
            return {**judge(start, task.data, task.max_seq_length, scratch), TRAINING_SECONDS: round(seconds, 1)}

    result = kept(output, method, seed, settings, compute)
    remove_folder(unfinished)
    return result


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.csv, test.csv and corpus.csv")
    add("--output", type=Path, required=True, help="folder for the results")
    add("--methods", nargs="+", choices=RECIPES, default=list(RECIPES), help="which rows to compute")
    add("--seeds", type=positive_int, default=3, help="trainings of each method")
    add("--steps", type=number_in_range(3), default=600, help="steps of all stages of a method together")
    add("--batch_size", type=number_in_range(2), default=64, help="pairs per step")
    add("--pieces_batch_size", type=number_in_range(2), help="the same in pre-training (default: --batch_size)")
    add("--pairs_per_text", type=positive_int, default=2, help="pairs of pieces that are cut from a text")
    add("--mined_negatives", type=positive_int, default=1, help="hard negatives that a model finds for a pair")
    add("--word_negatives", type=positive_int, default=7, help="hard negatives that BM25 finds for a pair")
    add("--max_seq_length", type=number_in_range(3), default=64, help="tokens of a text, in training and in recall")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, and the JSON object."""
    args, options = build_parser().parse_known_args(argv)
    task = Task(
        data=args.data,
        steps=args.steps,
        batch_size=args.batch_size,
        pieces_batch_size=args.pieces_batch_size or args.batch_size,
        pairs_per_text=args.pairs_per_text,
        mined_negatives=args.mined_negatives,
        word_negatives=args.word_negatives,
        max_seq_length=args.max_seq_length,
        options=tuple(options),
    )
    machine = describe_machine()
    results: dict[str, list[Metrics]] = {method: [] for method in args.methods}
    for seed in range(args.seeds):  # in turn, so that an interrupted run has as many of each
        for method in args.methods:
            results[method].append(result_of(task, method, seed, args.output))
    means = means_of(results)
    print_table(means, (*SHOWN, TRAINING_SECONDS))
    print(json.dumps({"means": means, "recall@10_of_seeds": recall_of_seeds(results), "machine": machine}))
    return 0


if __name__ == "__main__":
    run(main)
