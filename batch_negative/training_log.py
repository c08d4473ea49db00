"""The log lines and VisualDL curves of a training."""

import time
from pathlib import Path

from visualdl import LogWriter

from batch_negative.trainer import Step
from retrieval.metrics import Evaluation, format_lines, metrics


def format_duration(seconds: float) -> str:
    """Hours (any number), minutes and seconds, as in 83:15:00."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


class TrainingLog:
    """Prints a line every `log_steps` and writes the same values to VisualDL.

    first: the step after which this training starts.
    """

    def __init__(self, folder: Path, log_steps: int, steps: int, first: int) -> None:
        self._writer = LogWriter(str(folder))
        self._log_steps, self._steps, self._first = log_steps, steps, first
        self._pairs = self._taken = 0
        self._since = self._start = time.monotonic()

    def step(self, step: Step) -> None:
        """Counts a step, and prints and writes a line if one is due."""
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
        """Prints and writes the metrics of an evaluation."""
        for name, value in metrics(evaluation).items():
            self._writer.add_scalar(f"evaluate/{name}", 100 * value, step)
        print("\n".join(format_lines(evaluation)), flush=True)

    def resume_clock(self, paused: float) -> None:
        """Subtracts `paused` seconds, of saving or evaluating, from the training time."""
        self._since += paused
        self._start += paused

    def close(self) -> None:
        """Writes what VisualDL has buffered."""
        self._writer.close()
