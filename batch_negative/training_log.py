"""The log lines and VisualDL curves of a training."""

import time
from pathlib import Path

from visualdl import LogWriter

from batch_negative.trainer import Step
from retrieval.metrics import Evaluation, format_lines, metrics, report_own_texts


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, without days: 83:15:00."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


class TrainingLog:
    """Prints a line every `log_steps` steps and after the last, also to VisualDL; completed: steps taken before."""

    def __init__(self, folder: Path, log_steps: int, steps: int, completed: int) -> None:
        self._writer = LogWriter(str(folder))
        self._log_steps, self._steps, self._completed = log_steps, steps, completed
        self._pairs_since_line = self._steps_since_line = 0
        self._line_time = self._start_time = time.monotonic()

    def step(self, step: Step) -> None:
        """Counts a step, and prints and writes a line if one is due."""
        self._pairs_since_line += step.pairs
        self._steps_since_line += 1
        if step.number % self._log_steps and step.number != self._steps:
            return
        now = time.monotonic()
        steps_per_second = self._steps_since_line / (now - self._line_time)
        pairs_per_second = self._pairs_since_line / (now - self._line_time)
        left = (self._steps - step.number) * (now - self._start_time) / (step.number - self._completed)
        print(
            f"global step {step.number}/{self._steps}, epoch: {step.epoch}, loss: {step.loss:.5f}, "
            f"lr: {step.learning_rate:.3g}, speed: {steps_per_second:.2f} step/s, {pairs_per_second:.1f} pairs/s, "
            f"left: {format_duration(left)}",
            flush=True,
        )
        speeds = {"steps_per_second": steps_per_second, "pairs_per_second": pairs_per_second}
        for name, value in {"loss": step.loss, "learning_rate": step.learning_rate, **speeds}.items():
            self._writer.add_scalar(f"train/{name}", value, step.number)
        self._pairs_since_line, self._steps_since_line, self._line_time = 0, 0, now

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        """Prints and writes the metrics of an evaluation."""
        for name, value in metrics(evaluation).items():
            self._writer.add_scalar(f"evaluate/{name}", 100 * value, step)
        report_own_texts(evaluation)
        print("\n".join(format_lines(evaluation)), flush=True)

    def exclude(self, seconds: float) -> None:
        """Leaves seconds of saving or evaluating out of speed and time left."""
        self._line_time += seconds
        self._start_time += seconds

    def close(self) -> None:
        """Writes what VisualDL has buffered."""
        self._writer.close()
