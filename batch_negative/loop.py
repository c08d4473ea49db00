"""The training loop: steps, and what is logged, saved and evaluated between them."""

import time
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from batch_negative.batches import BatchSchedule
from batch_negative.evaluator import Evaluator
from batch_negative.resume import remove_old_checkpoints
from batch_negative.trainer import NonFiniteLoss, Trainer
from batch_negative.training_log import TrainingLog
from common.distributed import announce_exit, barrier
from common.errors import InputError
from common.files import write_json
from common.logs import is_main_process, log
from common.signals import Stopped, StopSignals
from data import pair_lines
from modeling.checkpoint import LoadedModel, save_checkpoint
from modeling.checkpoint_files import step_folder
from modeling.training_progress import EVALUATIONS_FILE

BEST_FOLDER = "model_best"
BEST_RESULT_FILE = "train_result.txt"  # in BEST_FOLDER: step and score, in the original's form


@dataclass
class TrainingLoop:
    """Takes the steps of a schedule, and logs, saves and evaluates between them.

    log: None on all ranks but rank 0; train_set_file, label_column, teacher_scores, unsupervised: for messages, see
    `data.pair_lines`; run_config: saved in checkpoints, must be unchanged to resume; keep_checkpoints: number of the
    newest ones to keep, None for all; early_stop_patience: evaluations without improvement after which the training
    ends, None for never.
    """

    loaded: LoadedModel
    trainer: Trainer
    schedule: BatchSchedule
    evaluator: Evaluator | None
    log: TrainingLog | None
    _: KW_ONLY
    train_set_file: str
    label_column: bool = False
    teacher_scores: bool = False
    unsupervised: bool = False
    save_dir: Path
    run_config: dict[str, Any]
    save_steps: int
    eval_steps: int | None = None
    keep_checkpoints: int | None = None
    early_stop_patience: int | None = None
    written: Path | None = field(default=None, init=False)  # the newest checkpoint that this process has written
    has_evaluated: bool = field(default=False, init=False)  # whether an evaluation has been made
    is_stopped: bool = field(default=False, init=False)  # by a signal that any rank has received
    _saved_step: int | None = field(default=None, init=False)  # the newest step whose checkpoint is in save_dir

    def run(self, completed: int, signals: StopSignals, *, is_saved: bool = True) -> int:
        """Takes the steps after the first `completed` ones, and returns the number of the last step.

        A signal ends the training after the current step, which is saved. Raises InputError for a NaN or infinite loss
        and, after saving the step, for an evaluation that fails. is_saved: whether save_dir has the checkpoint of step
        `completed`.
        """
        self._saved_step = completed if is_saved else None
        try:
            return self._run(completed, signals)
        except NonFiniteLoss as error:
            form = {"label_column": self.label_column, "teacher_scores": self.teacher_scores}
            explanation = explain(error, self.train_set_file, unsupervised=self.unsupervised, **form)
            raise InputError(explanation) from None
        finally:
            if self.log:
                self.log.close()

    def _run(self, completed: int, signals: StopSignals) -> int:
        is_complete = completed == self.schedule.total_steps
        if is_complete and self.evaluator and self.evaluator.last_step != completed:
            self._save(completed)  # in another save_dir nothing else would keep the evaluation
        if completed and self._evaluation_ends_training(completed, signals):
            return completed
        for planned in self.schedule.steps(completed):
            step = self.trainer.step(planned, stop=signals.received is not None)
            if self.log:
                self.log.step(step)
            paused_at = time.monotonic()
            if step.stop or step.number % self.save_steps == 0 or step.number == self.schedule.total_steps:
                self._save(step.number)
            self.is_stopped = step.stop
            if step.stop or self._evaluation_ends_training(step.number, signals):
                return step.number
            if self.log:
                self.log.exclude(time.monotonic() - paused_at)
        return self.schedule.total_steps

    def _evaluation_ends_training(self, step: int, signals: StopSignals) -> bool:
        """Evaluates if it is due after this step. Returns whether the training ends, by a signal or early stopping."""
        evaluator = self.evaluator
        if evaluator is None:
            return False
        if self._evaluation_is_due(step) and evaluator.last_step != step:
            epoch = self.schedule.epoch_of(step)
            try:
                with signals.raised():
                    evaluation = evaluator(*self.loaded, step, epoch)
                    barrier()  # if a rank was stopped during the evaluation, the others learn it before the next step
            except (Stopped, InputError) as error:
                announce_exit()
                self._save(step)
                if isinstance(error, InputError):
                    log(f"the evaluation after step {step} failed; it is repeated when the run is resumed")
                    raise
                self.is_stopped = True
                return True
            evaluator.record(evaluation, step, epoch)
            self.has_evaluated = True
            if self.log:
                self.log.evaluation(evaluation, step)
            self._keep_evaluation(evaluator, step, epoch)
        ends = self.early_stop_patience is not None and evaluator.evals_without_improvement >= self.early_stop_patience
        if ends:
            count = evaluator.evals_without_improvement
            log(f"no better {evaluator.best_metric} in {count} evaluations: stopping early")
            self._save(step)
        return ends

    def _evaluation_is_due(self, step: int) -> bool:
        at_end = step == self.schedule.total_steps
        return at_end or (step % self.eval_steps == 0 if self.eval_steps else self.schedule.ends_epoch(step))

    def _keep_evaluation(self, evaluator: Evaluator, step: int, epoch: int) -> None:
        """Saves the model if it is the best so far, writes the report on it, and adds the history to the checkpoint.

        The history goes into the step's checkpoint, if there is one.
        """
        if not is_main_process():
            return
        if evaluator.is_best:
            name = evaluator.best_metric.split("@")[0]
            result = f"epoch={epoch}, global_step: {step}, {name}: {evaluator.score}\n"
            save_checkpoint(
                self.save_dir / BEST_FOLDER,
                *self.loaded,
                add_files=lambda folder: (folder / BEST_RESULT_FILE).write_text(result, encoding="utf-8"),
            )
            evaluator.write_report()
        if self._saved_step == step:
            write_json(step_folder(self.save_dir, step) / EVALUATIONS_FILE, evaluator.state())

    def _save(self, step: int) -> None:
        """Rank 0 writes the step's checkpoint, unless it is there already."""
        if self._saved_step == step or not is_main_process():
            return
        evaluations = self.evaluator and self.evaluator.state()
        state = self.trainer.state({"step": step, "run_config": self.run_config, "evaluator": evaluations})
        self._saved_step, self.written = step, step_folder(self.save_dir, step)
        save_checkpoint(self.written, *self.loaded, add_files=state.write)
        if self.keep_checkpoints:
            remove_old_checkpoints(self.save_dir, step, self.keep_checkpoints, self.run_config)


def explain(error: NonFiniteLoss, train_set_file: str, **form: bool) -> str:
    """The error message for a NaN or infinite loss, which names the lines of the step's pairs.

    form: the options of `pair_lines` that say what the columns are.
    """
    pairs = pair_lines(train_set_file, skip_bad_lines=True, check_columns=False, **form)
    line_of_row = [line.number for line in pairs if line.row is not None]
    lines = ", ".join(str(line) for line in sorted(line_of_row[row] for row in error.rows))
    where = f"the batch has lines {lines} of {train_set_file}" if lines else "another process names the batch's lines"
    return f"{error}; {where}; look at them, or lower --learning_rate, and go on from a checkpoint before it went wrong"
