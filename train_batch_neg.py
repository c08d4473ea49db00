"""Trains the dual tower on pairs of similar texts, with the other titles of a batch as negatives."""

import argparse
import math
import os
import shutil
import signal
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from ann_util import IndexOptions, add_index_args, check_index_args
from data import (
    PairCollator,
    add_encoding_args,
    add_evaluation_file_args,
    add_skip_bad_lines_arg,
    parse_pair,
    read_corpus,
    read_lines,
    read_text_pairs,
    titles_by_query,
)
from evaluate import metric_names
from files import clear_leftovers, make_folder, sha256, whole_folder
from runtime import (
    ArgumentParser,
    InputError,
    Stopped,
    StopSignals,
    at_least,
    is_main_process,
    log,
    run,
    set_up_paddle,
)

if __name__ == "__main__":
    set_up_paddle()

import paddle

from base_model import add_device_arg, add_model_args, set_device, set_seed
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import NonFiniteLoss, Plan, Trainer, check_batch_size, make_optimizer
from checkpoint import (
    LoadedModel,
    TrainingState,
    create_model,
    latest_checkpoint,
    load_checkpoint,
    other_training,
    read_training_state,
    remove_old_checkpoints,
    save_checkpoint,
    step_folder,
    step_folders,
)
from cpu_layers import speed_up_training
from distributed import barrier, broadcast_parameters, init_ranks, leave, wait_for_rank_0
from monitor import Evaluator, TrainingLog
from recall import report_missing_positives

STOP_SECONDS = 25.0  # that ranks wait for rank 0 to save when all are stopped: the launcher kills after 30
SHAPING_OPTIONS = (  # without the same values a training can't go on exactly
    "batch_size",
    "gradient_accumulation_steps",
    "epochs",
    "max_steps",
    "learning_rate",
    "warmup_proportion",
    "weight_decay",
    "max_grad_norm",
    "margin",
    "scale",
    "no_mask_duplicates",
    "no_cross_device_negatives",
    "grad_cache_chunk",
    "use_gradient_cache",
    "chunk_numbers",
    "group_by_length",
    "use_amp",
    "amp_dtype",
    "output_emb_size",
    "pooling",
    "dropout",
    "max_seq_length",
    "seed",
    "skip_bad_lines",
)
STARTING_OPTIONS = ("model_name_or_path", "from_scratch", "init_from_ckpt")  # tell trainings apart that go on alike
NEEDED_OPTIONS = {  # without the second the first would do nothing
    "eval_steps": "evaluate",
    "best_metric": "evaluate",
    "early_stop_patience": "evaluate",
    "chunk_numbers": "use_gradient_cache",
    "amp_dtype": "use_amp",
    "amp_loss_scale": "use_amp",
}


class Session:
    """A training from the step after `first` to its end, with what is logged, saved and evaluated on the way.

    shape: what must stay the same for another session to go on from a checkpoint; keep_checkpoints: how many of the
    newest steps' stay, None for all; patience: evaluations without a better one after which training ends, None for
    no end.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        trainer: Trainer,
        plan: Plan,
        evaluator: Evaluator | None,
        training_log: TrainingLog | None,
        *,
        save_dir: Path,
        shape: dict[str, Any],
        save_steps: int,
        eval_steps: int | None,
        keep_checkpoints: int | None,
        patience: int | None,
    ) -> None:
        self._loaded, self._trainer, self._plan = loaded, trainer, plan
        self._evaluator, self._log = evaluator, training_log
        self._save_dir, self._shape = save_dir, shape
        self._save_steps, self._eval_steps = save_steps, eval_steps
        self._keep_checkpoints, self._patience = keep_checkpoints, patience
        self.is_stopped = False  # by a signal, to whichever rank
        self.written: Path | None = None  # the newest checkpoint by this process, of the last step if there is one

    def run(self, first: int, signals: StopSignals) -> int:
        """Returns the number of the last step; a signal ends the training after the step in hand, saved."""
        if first and self._evaluation_ends_it(first, signals, is_saved=True):
            return first
        for planned in self._plan.steps(first):
            step = self._trainer.step(planned, stop=signals.received is not None)
            if self._log:
                self._log.step(step)
            paused_at = time.monotonic()
            is_saved = step.stop or step.number % self._save_steps == 0 or step.number == self._plan.total_steps
            if is_saved:
                self._save(step.number)
            self.is_stopped = step.stop
            if step.stop or self._evaluation_ends_it(step.number, signals, is_saved):
                return step.number
            if self._log:
                self._log.resume_clock(time.monotonic() - paused_at)
        return self._plan.total_steps

    def _evaluation_ends_it(self, step: int, signals: StopSignals, is_saved: bool) -> bool:
        """Evaluates if that is due after a step; whether training ends with it, by a signal or for lack of gain.

        Raises InputError where the evaluation can't be made, once the step is saved.
        """
        evaluator = self._evaluator
        if evaluator is None:
            return False
        epoch, ends_epoch = self._plan.epoch(step)
        is_due = step % self._eval_steps == 0 if self._eval_steps else ends_epoch
        if (is_due or step == self._plan.total_steps) and evaluator.last_step != step:
            before = evaluator.state()
            try:
                with signals.raised():
                    evaluation = evaluator(*self._loaded, step, epoch)
                    barrier()  # lest one that is stopped just now leaves the others to the next step
            except (Stopped, InputError) as error:
                leave()
                evaluator.restore(before)  # the resumed training makes all of it again
                if not is_saved:
                    self._save(step)
                if isinstance(error, InputError):
                    log(f"the evaluation after step {step} failed; a training that goes on from it makes it again")
                    raise
                self.is_stopped = True
                return True
            if self._log:
                self._log.evaluation(evaluation, step)
            if evaluator.is_best and is_main_process():
                name = evaluator.best_metric.split("@")[0]
                result = f"epoch={epoch}, global_step: {step}, {name}: {evaluator.score}\n"
                save_checkpoint(self._save_dir / "model_best", *self._loaded, notes={"train_result.txt": result})
            if is_saved:  # once more, now with this evaluation
                self._save(step)
        ends = self._patience is not None and evaluator.without_gain >= self._patience
        if ends:
            log(f"no better {evaluator.best_metric} in {evaluator.without_gain} evaluations: stopping early")
            if not is_saved:
                self._save(step)
        return ends

    def _save(self, step: int) -> None:
        if not is_main_process():
            return
        progress = {"step": step, "shape": self._shape, "evaluator": self._evaluator and self._evaluator.state()}
        self.written = step_folder(self._save_dir, step)
        save_checkpoint(self.written, *self._loaded, training=self._trainer.state(progress))
        if self._keep_checkpoints:
            remove_old_checkpoints(self._save_dir, step, self._keep_checkpoints, self._shape)


def lines_of_rows(train_set_file: str, rows: Sequence[int]) -> list[int]:
    """Line numbers of pairs in the training file."""
    good_lines = [line.number for line in read_lines(train_set_file, parse_pair, True) if line.row is not None]
    return sorted(good_lines[row] for row in rows)


def explain(error: NonFiniteLoss, train_set_file: str) -> str:
    """What the user can do about a loss that is no number."""
    lines = ", ".join(map(str, lines_of_rows(train_set_file, error.rows)))
    where = f"the batch has lines {lines} of {train_set_file}" if lines else "on a rank"
    return f"{error}; {where}; look at them, or lower --learning_rate, and go on from a checkpoint before it went wrong"


def check_same_shape(folder: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises InputError if the training that wrote `folder` isn't the one that these options describe.

    What an older version's checkpoint doesn't tell is taken to be the same: the user named the folder.
    """
    if other := other_training(folder, saved, {name: value for name, value in ours.items() if name in saved}):
        raise InputError(other)


def find_resumed(resume_from: str, save_dir: Path, shape: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None if it is this training's latest and the folder has none yet.

    Raises InputError.
    """
    if resume_from != "latest":
        folder = whole_folder(resume_from)
        if not folder.is_dir():
            raise InputError(f"--resume_from {resume_from}: no such folder; give a checkpoint's folder or latest")
        return folder
    folder = latest_checkpoint(save_dir, shape)
    log(f"going on from {folder}" if folder else f"{save_dir}: no checkpoint to go on from yet; starting at step 0")
    return folder


def resume(checkpoint: Path, shape: dict[str, Any], evaluator: Evaluator | None) -> tuple[LoadedModel, TrainingState]:
    """What `checkpoint` holds. Raises InputError if it is of another training than the options describe."""
    state = read_training_state(checkpoint)
    check_same_shape(checkpoint, state.progress["shape"], shape)
    if evaluator and state.progress["evaluator"]:
        check_same_shape(checkpoint, state.progress["evaluator"], evaluator.conditions)
    loaded = load_checkpoint(checkpoint, SemanticIndexBatchNeg)
    loaded.model.train()
    return loaded, state


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train_set_file", default="./recall/train.csv", help="pairs: query<TAB>title a line")
    add_skip_bad_lines_arg(parser)
    parser.add_argument("--save_dir", default="./checkpoints", help="folder of the checkpoints and of VisualDL's logs")
    add_model_args(parser)
    add_encoding_args(parser, batch="pairs, on each process", length="512, or the size of the position table")
    parser.add_argument("--epochs", type=at_least(1), default=10, help="times that each pair is seen")
    parser.add_argument("--max_steps", type=at_least(1), help="stop after so many steps, in place of --epochs")
    parser.add_argument("--learning_rate", type=at_least(0.0, float), default=5e-5, help="highest learning rate")
    parser.add_argument(
        "--warmup_proportion", type=at_least(0.0, float, 1.0), default=0.0, help="share of the steps to warm up"
    )
    parser.add_argument("--weight_decay", type=at_least(0.0, float), default=0.0, help="AdamW's weight decay")
    parser.add_argument(
        "--max_grad_norm", type=at_least(0.0, float), default=5.0, help="gradients are clipped to it; 0: not at all"
    )
    parser.add_argument(
        "--gradient_accumulation_steps",
        type=at_least(1),
        default=1,
        help="batches whose gradients make a step; unlike a larger --batch_size it adds no negatives",
    )
    parser.add_argument("--margin", type=at_least(0.0, float), default=0.2, help="taken off the positive's cosine")
    parser.add_argument("--scale", type=at_least(0.0, float), default=30.0, help="factor of the cosines")
    parser.add_argument(
        "--no_mask_duplicates",
        action="store_true",
        help="let a title count as a negative even where the training file pairs it with the query",
    )
    parser.add_argument(
        "--no_cross_device_negatives",
        action="store_true",
        help="score each query against the titles of its own process alone",
    )
    parser.add_argument(
        "--grad_cache_chunk",
        type=at_least(1),
        help="encode so many texts at a time, each twice: memory hardly grows with --batch_size",
    )
    parser.add_argument(
        "--use_gradient_cache", action="store_true", help="the same, with chunks as --chunk_numbers says"
    )
    parser.add_argument(
        "--chunk_numbers", type=at_least(1), default=50, help="chunks of a batch's queries, and of its titles"
    )
    parser.add_argument("--use_amp", action="store_true", help="mixed precision, on a GPU")
    parser.add_argument(
        "--amp_dtype", choices=["float16", "bfloat16"], default="float16", help="type of the matrix products"
    )
    parser.add_argument(
        "--amp_loss_scale", type=at_least(1.0, float), default=32768.0, help="first loss scale for float16"
    )
    parser.add_argument(
        "--use_recompute", action="store_true", help="compute activations again in the backward pass: saves memory"
    )
    parser.add_argument(
        "--group_by_length",
        action="store_true",
        help="batches of pairs of like length: less padding, a bit less random",
    )
    parser.add_argument(
        "--seed", type=at_least(0, below=2**32), default=1000, help="seed of the weights, dropout and shuffle"
    )
    parser.add_argument("--log_steps", type=at_least(1), default=10, help="steps between log lines")
    parser.add_argument("--save_steps", type=at_least(1), default=10000, help="steps between checkpoints")
    parser.add_argument(
        "--keep_checkpoints", type=at_least(1), help="keep so many of the newest steps' checkpoints (default: all)"
    )
    parser.add_argument(
        "--resume_from",
        metavar="DIR|latest",
        help="go on from a checkpoint, exactly; latest: this training's newest usable one in --save_dir, if any",
    )
    parser.add_argument("--evaluate", action="store_true", help="evaluate after each epoch and keep model_best")
    parser.add_argument("--eval_steps", type=at_least(1), help="evaluate every so many steps instead, and at the end")
    parser.add_argument(
        "--best_metric",
        help="metric that decides on model_best (default: recall@5, or recall@1 where --recall_num is less)",
    )
    parser.add_argument(
        "--early_stop_patience", type=at_least(1), help="end after so many evaluations in a row without a better one"
    )
    add_evaluation_file_args(parser, train=True)
    parser.add_argument("--evaluate_result", default="evaluate_result.txt", help="all metrics, in recall_result_dir")
    parser.add_argument("--recall_num", type=at_least(1), default=50, help="documents recalled for a query")
    add_index_args(parser)
    add_device_arg(parser, default="cpu")
    return parser


def warn_of_small_disk(save_dir: Path, model: SemanticIndexBatchNeg, checkpoints: int) -> None:
    """Logs it if the checkpoints to come won't fit on the disk."""
    size = 4 * sum(4 * parameter.size for parameter in model.parameters())  # float32: weights twice, AdamW's moments
    folder = next(path for path in (save_dir.absolute(), *save_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if checkpoints * size > free:
        log(
            f"{save_dir}: {checkpoints} checkpoints of {size / 1e9:.1f} GB won't fit into the {free / 1e9:.0f} GB that "
            "are free; save less often (--save_steps) or keep fewer (--keep_checkpoints)"
        )


def choose_metric(best_metric: str | None, recall_num: int) -> str:
    """The metric that tells the best model. Raises InputError if it isn't computed."""
    names = metric_names(recall_num)
    if best_metric and best_metric not in names:
        raise InputError(f"--best_metric {best_metric}: with --recall_num {recall_num} give one of {', '.join(names)}")
    return best_metric or [name for name in ("recall@1", "recall@5") if name in names][-1]


def check_options(given: Container[str]) -> None:
    """Raises InputError for an option without effect; given: those that differ from their defaults."""
    for name, needed in NEEDED_OPTIONS.items():
        if name in given and needed not in given:
            raise InputError(f"--{name}: does nothing without --{needed}; add that, or leave it out")
    for name, other in (("model_name_or_path", "from_scratch"), ("use_gradient_cache", "grad_cache_chunk")):
        if name in given and other in given:
            raise InputError(f"--{name}: --{other} takes its place; leave one of them out")


def check_amp(use_amp: bool, amp_dtype: str) -> None:
    """Raises InputError if the device doesn't have mixed precision."""
    if use_amp and paddle.get_device() == "cpu":
        raise InputError("--use_amp: Paddle trains in float32 on a CPU; leave it out, or use --device gpu")
    if use_amp and amp_dtype == "bfloat16" and not paddle.amp.is_bfloat16_supported():
        raise InputError("--amp_dtype bfloat16: this GPU has no bfloat16; use --amp_dtype float16")


def cache_chunk(grad_cache_chunk: int | None, use_cache: bool, chunk_numbers: int, batch_size: int) -> int | None:
    """Texts that the gradient cache encodes at a time, None without it.

    The original's chunk_numbers says in how many parts the queries, and as many in which the titles, are encoded.
    """
    if grad_cache_chunk is None and use_cache:
        return math.ceil(batch_size / chunk_numbers)
    return grad_cache_chunk


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, saves and evaluates."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_options({name for name, value in vars(args).items() if value != parser.get_default(name)})
    save_dir = Path(args.save_dir)
    pairs = read_text_pairs(args.train_set_file, skip_bad_lines=args.skip_bad_lines)
    evaluator = None
    if args.evaluate:
        dev_pairs = read_text_pairs(args.similar_text_pair_file, skip_bad_lines=args.skip_bad_lines)
        corpus = read_corpus(args.corpus_file, skip_bad_lines=args.skip_bad_lines)
        index_options = IndexOptions(**{name: getattr(args, name) for name in IndexOptions._fields})
        check_index_args(index_options, len(corpus))
        report_missing_positives(corpus, titles_by_query(dev_pairs), args.corpus_file)
        evaluator = Evaluator(
            corpus,
            titles_by_query(dev_pairs),
            batch_size=args.batch_size,
            recall_num=args.recall_num,
            index_options=index_options,
            embedding_parent=save_dir,
            result_file=Path(args.recall_result_dir) / args.recall_result_file,
            report_file=Path(args.recall_result_dir) / args.evaluate_result,
            best_metric=choose_metric(args.best_metric, args.recall_num),
        )

    set_device(args.device)
    check_amp(args.use_amp, args.amp_dtype)
    rank, world_size = init_ranks()
    cross_device = not args.no_cross_device_negatives
    check_batch_size(args.batch_size, world_size, pairs, args.train_set_file, cross_device=cross_device)
    shape = {name: getattr(args, name) for name in SHAPING_OPTIONS}
    shape |= {name: getattr(args, name) and os.path.normpath(getattr(args, name)) for name in STARTING_OPTIONS}
    shape |= {"number of processes": world_size, "SHA-256 of the training file": sha256(args.train_set_file)}
    if is_main_process():
        make_folder(save_dir)
        if evaluator:
            evaluator.prepare_files()
        clear_leftovers(save_dir)
    barrier()

    checkpoint = find_resumed(args.resume_from, save_dir, shape) if args.resume_from else None
    state = None
    if checkpoint:
        loaded, state = resume(checkpoint, shape, evaluator)
    else:
        if earlier := step_folders(save_dir):
            kept = "this one's will replace those of the same steps"
            log(f"{save_dir}: holds an earlier training's checkpoints, up to {earlier[-1].name}; {kept}")
        set_seed(args.seed)
        loaded = create_model(
            SemanticIndexBatchNeg,
            model_name_or_path=args.model_name_or_path,
            from_scratch=args.from_scratch,
            init_from_ckpt=args.init_from_ckpt,
            output_emb_size=args.output_emb_size,
            pooling=args.pooling,
            dropout=args.dropout,
            max_seq_length=args.max_seq_length,
        )
        broadcast_parameters(loaded.model)
    if args.device == "cpu":
        speed_up_training(loaded.model)
    if args.use_recompute:
        loaded.model.ptm.recompute_enable()

    chunk_texts = cache_chunk(args.grad_cache_chunk, args.use_gradient_cache, args.chunk_numbers, args.batch_size)
    collate = PairCollator(loaded.collator, pairs, mask_duplicates=not args.no_mask_duplicates, chunk_texts=chunk_texts)
    plan = Plan(
        len(pairs),
        args.batch_size,
        seed=args.seed,
        epochs=args.epochs,
        max_steps=args.max_steps,
        accumulation=args.gradient_accumulation_steps,
        world_size=world_size,
        lengths=collate.lengths if args.group_by_length else None,
    )
    optimizer, scheduler = make_optimizer(
        loaded.model,
        learning_rate=args.learning_rate,
        total_steps=plan.total_steps,
        warmup_proportion=args.warmup_proportion,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
    )
    trainer = Trainer(
        loaded.model,
        collate,
        optimizer,
        scheduler,
        rank=rank,
        seed=args.seed,
        margin=args.margin,
        scale=args.scale,
        cross_device=cross_device,
        backward=cached_backward if chunk_texts else direct_backward,
        amp_dtype=args.amp_dtype if args.use_amp else None,
        loss_scale=args.amp_loss_scale,
    )
    first = 0
    if state:
        first = state.progress["step"]
        trainer.restore(state)
        if evaluator and state.progress["evaluator"]:
            evaluator.restore(state.progress["evaluator"])

    scored = args.batch_size * (world_size if cross_device else 1)
    log(
        f"training on {len(pairs)} pairs: steps {first + 1} to {plan.total_steps} of {args.batch_size} pairs on each "
        f"of {world_size} process(es); a query has {scored - 1} other titles as negatives"
    )
    saved = -(-(plan.total_steps - first) // args.save_steps)
    warn_of_small_disk(save_dir, loaded.model, min(saved, args.keep_checkpoints or saved))
    training_log = (
        TrainingLog(save_dir / "visualdl", args.log_steps, plan.total_steps, first) if is_main_process() else None
    )
    session = Session(
        loaded,
        trainer,
        plan,
        evaluator,
        training_log,
        save_dir=save_dir,
        shape=shape,
        save_steps=args.save_steps,
        eval_steps=args.eval_steps,
        keep_checkpoints=args.keep_checkpoints,
        patience=args.early_stop_patience,
    )
    with StopSignals() as signals:
        try:
            last = session.run(first, signals)
        except NonFiniteLoss as error:
            raise InputError(explain(error, args.train_set_file)) from None
        finally:
            if training_log:
                training_log.close()
        if session.is_stopped:
            wait_for_rank_0(STOP_SECONDS)
            number = signal.Signals(signals.received or signal.SIGTERM)  # another rank may be the one that got it
            # Nothing is written if it was in the evaluation of what it went on from.
            go_on = f": wrote {session.written}; go on with --resume_from latest"
            go_on = go_on if session.written else f"; go on with --resume_from {checkpoint}"
            log(f"stopped by {number.name} after step {last}{go_on}")
            return 128 + number
    if is_main_process():
        print(f"wrote {session.written}" if session.written else f"{checkpoint}: training is complete, nothing to do")
    return 0


if __name__ == "__main__":
    run(main)
