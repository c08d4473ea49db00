"""What a training says while it runs: its log, and the evaluations that tell which model is the best."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from visualdl import LogWriter

from ann_util import IndexOptions
from base_model import SemanticIndexBase
from batch_negative.trainer import Step
from data import Corpus, TextCollator, documents_by_query, write_hits
from encoder import Encoder
from evaluate import Evaluation, evaluate, format_lines, metrics
from files import atomic_write, prepare_file
from recall import as_hits, recall
from runtime import is_main_process


def format_duration(seconds: float) -> str:
    """Whole hours, however many, minutes and seconds: 83:15:00."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


class Evaluator:
    """Recalls and evaluates as recall.py and evaluate.py do, and keeps the score of the best model so far.

    embedding_parent: where the corpus's vectors lie meanwhile.
    """

    def __init__(
        self,
        corpus: Corpus,
        positives: dict[str, set[str]],
        *,
        batch_size: int,
        recall_num: int,
        index_options: IndexOptions,
        embedding_parent: Path,
        result_file: Path,
        report_file: Path,
        best_metric: str,
    ) -> None:
        self._corpus, self._positives = corpus, positives
        self._batch_size, self._recall_num = batch_size, recall_num
        self._index_options, self._embedding_parent = index_options, embedding_parent
        self._result_file, self._report_file = result_file, report_file
        self.best_metric = best_metric
        pairs = json.dumps({query: sorted(titles) for query, titles in positives.items()})
        self.conditions = {  # without the same ones two scores can't be compared
            "best_metric": best_metric,
            "recall_num": recall_num,
            "SHA-256 of the corpus": corpus.sha256,
            "SHA-256 of the evaluation pairs": hashlib.sha256(pairs.encode()).hexdigest(),
        }
        self._reports: list[str] = []
        self._best: float | None = None
        self.last_step = 0
        self.score = 0.0  # of the last evaluation, by `best_metric`
        self.without_gain = 0  # evaluations since the best one

    def prepare_files(self) -> None:
        """Makes the folders of both files, before a training that would fail at its first evaluation."""
        prepare_file(self._result_file)
        prepare_file(self._report_file)

    def __call__(self, model: SemanticIndexBase, collator: TextCollator, step: int, epoch: int) -> Evaluation:
        """Evaluates the model, all ranks together; rank 0 writes both files. Afterwards `is_best` tells about it."""
        queries = list(self._positives)
        found = recall(
            Encoder(model.embed, collator, model.embedding_size, self._batch_size),
            self._corpus,
            queries,
            recall_num=self._recall_num,
            options=self._index_options,
            folder=self._embedding_parent,
        )
        hits = list(as_hits(found, self._corpus, queries))
        evaluation = evaluate(self._positives, documents_by_query(hits), self._recall_num)
        self._reports.append(f"global step {step}, epoch {epoch}\t" + "\t".join(format_lines(evaluation)))
        if is_main_process():
            write_hits(self._result_file, hits)
            with atomic_write(self._report_file) as file:
                file.writelines(line + "\n" for line in self._reports)
        self._judge(step, metrics(evaluation)[self.best_metric])
        return evaluation

    def _judge(self, step: int, score: float) -> None:
        self.last_step, self.score = step, score
        self.without_gain += 1
        if self._best is None or score > self._best:
            self._best, self.without_gain = score, 0

    @property
    def is_best(self) -> bool:
        """Whether no earlier evaluation was as good as the last one."""
        return self.without_gain == 0

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON can hold it."""
        return {
            **self.conditions,
            "last_step": self.last_step,
            "best": self._best,
            "without_gain": self.without_gain,
            "reports": list(self._reports),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was read, of an evaluator under the same conditions."""
        self.last_step, self._best = state["last_step"], state["best"]
        self.without_gain, self._reports = state["without_gain"], list(state["reports"])


class TrainingLog:
    """Prints a line every `log_steps` and writes the same to VisualDL. first: the step that training goes on from."""

    def __init__(self, folder: Path, log_steps: int, steps: int, first: int) -> None:
        self._writer = LogWriter(str(folder))
        self._log_steps, self._steps, self._first = log_steps, steps, first
        self._pairs = self._taken = 0
        self._since = self._start = time.monotonic()

    def step(self, step: Step) -> None:
        """Counts a step and, if it is due, prints and writes a line."""
        self._pairs += step.pairs
        self._taken += 1
        if step.number % self._log_steps and step.number != self._steps:
            return
        now = time.monotonic()
        steps_per_second = self._taken / (now - self._since)
        pairs_per_second = self._pairs / (now - self._since)
        left = (self._steps - step.number) * (now - self._start) / (step.number - self._first)
        print(
            f"global step {step.number}/{self._steps}, epoch: {step.epoch}, loss: {step.loss:.5f}, "
            f"lr: {step.learning_rate:.3g}, speed: {steps_per_second:.2f} step/s, {pairs_per_second:.1f} pairs/s, "
            f"left: {format_duration(left)}",
            flush=True,
        )
        for name, value in (
            ("loss", step.loss),
            ("learning_rate", step.learning_rate),
            ("steps_per_second", steps_per_second),
            ("pairs_per_second", pairs_per_second),
        ):
            self._writer.add_scalar(f"train/{name}", value, step.number)
        self._pairs, self._taken, self._since = 0, 0, now

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        """Prints and writes the metrics of an evaluation, whose time doesn't count as training time."""
        for name, value in metrics(evaluation).items():
            self._writer.add_scalar(f"evaluate/{name}", 100 * value, step)
        print("\n".join(format_lines(evaluation)), flush=True)

    def resume_clock(self, paused: float) -> None:
        """Takes `paused` seconds of saving or evaluating off the training time."""
        self._since += paused
        self._start += paused

    def close(self) -> None:
        """Writes what VisualDL still holds."""
        self._writer.close()
