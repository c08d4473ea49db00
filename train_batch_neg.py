"""Trains the dual tower on pairs of similar texts, with the other titles of a batch as negatives."""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from visualdl import LogWriter

from ann_util import VectorIndex, add_index_args, build_index, check_index_args
from data import (
    Corpus,
    PairCollator,
    TextCollator,
    TextPair,
    add_encoding_args,
    add_evaluation_file_args,
    add_skip_bad_lines_arg,
    atomic_write,
    epoch_batches,
    parse_pair,
    read_corpus,
    read_hits,
    read_lines,
    read_text_pairs,
    titles_by_query,
    write_hits,
)
from evaluate import Evaluation, evaluate, format_lines
from runtime import ArgumentParser, InputError, at_least, log, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

import paddle
from paddlenlp.transformers import LinearDecayWithWarmup

from base_model import add_device_arg, add_model_args, create_model, save_checkpoint, set_device, set_seed
from batch_negative.model import SemanticIndexBatchNeg
from distributed import average_gradients, broadcast_parameters, init_ranks
from recall import as_hits, recall, report_missing_positives

BEST_METRIC_CUTOFF = 5  # model_best is the one with the highest Recall@5, or at recall_num if that is less


class Step(NamedTuple):
    """What is known after a training step."""

    number: int  # from 1, over all epochs
    epoch: int  # from 1
    ends_epoch: bool
    loss: float  # mean over the pairs of all ranks
    learning_rate: float  # at which the step was taken
    pairs: int  # of all ranks


class Evaluator:
    """Recalls and evaluates as recall.py and evaluate.py do, and keeps the score of the best model so far."""

    def __init__(
        self,
        corpus: Corpus,
        positives: dict[str, set[str]],
        *,
        batch_size: int,
        recall_num: int,
        build: Callable[[np.ndarray], VectorIndex],
        result_file: Path,
        report_file: Path,
    ) -> None:
        self._corpus, self._positives = corpus, positives
        self._batch_size, self._recall_num, self._build = batch_size, recall_num, build
        self._result_file, self._report_file = result_file, report_file
        self._reports: list[str] = []
        self._best = -1.0

    def __call__(self, model: SemanticIndexBatchNeg, collator: TextCollator, step: Step) -> Evaluation | None:
        """Evaluates the model and writes both files; all ranks call it, rank 0 gets the result."""
        queries = list(self._positives)
        found = recall(
            model,
            collator,
            self._corpus,
            queries,
            batch_size=self._batch_size,
            recall_num=self._recall_num,
            build=self._build,
        )
        if found is None:
            return None
        write_hits(self._result_file, as_hits(found, self._corpus, queries))
        evaluation = evaluate(self._positives, read_hits(self._result_file), self._recall_num)
        self._reports.append(f"global step {step.number}, epoch {step.epoch}\t" + "\t".join(format_lines(evaluation)))
        with atomic_write(self._report_file) as file:
            file.writelines(line + "\n" for line in self._reports)
        return evaluation

    def is_best(self, evaluation: Evaluation) -> bool:
        """Whether no earlier evaluation was as good."""
        score = best_metric(evaluation)
        if score <= self._best:
            return False
        self._best = score
        return True


def best_metric(evaluation: Evaluation) -> float:
    """Recall@5, or at the largest K below it that was computed."""
    return evaluation.recall[max(k for k in evaluation.recall if k <= BEST_METRIC_CUTOFF)]


def make_optimizer(
    model: paddle.nn.Layer,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_proportion: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[paddle.optimizer.AdamW, paddle.optimizer.lr.LRScheduler]:
    """AdamW without weight decay on biases and norms, and its learning rate: a linear warm-up, then linear decay."""
    decayed = {
        parameter.name
        for name, parameter in model.named_parameters()
        if not any(part == "bias" or "norm" in part for part in name.split("."))
    }
    scheduler = LinearDecayWithWarmup(learning_rate, total_steps, warmup_proportion)
    optimizer = paddle.optimizer.AdamW(
        learning_rate=scheduler,
        parameters=model.parameters(),
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(max_grad_norm),
    )
    return optimizer, scheduler


def train(
    model: SemanticIndexBatchNeg,
    collate: PairCollator,
    optimizer: paddle.optimizer.Optimizer,
    scheduler: paddle.optimizer.lr.LRScheduler,
    batches: Iterator[tuple[int, bool, list[np.ndarray]]],
    *,
    rank: int,
    margin: float,
    scale: float,
) -> Iterator[Step]:
    """Takes a step for each of `batches` (epoch, whether it ends it, rows of each rank) and yields after each.

    Raises NonFiniteLoss instead of taking a step on a loss that is no number.
    """
    for number, (epoch, ends_epoch, rank_rows) in enumerate(batches, 1):
        rows = rank_rows[rank]
        loss = 0.0
        if len(rows):
            batch_loss = model(collate(rows), margin, scale)
            batch_loss.backward()
            loss = float(batch_loss)
        mean_loss, pairs = average_gradients(model.parameters(), loss, len(rows))
        if not math.isfinite(mean_loss):
            raise NonFiniteLoss(number, mean_loss, rows if not math.isfinite(loss) else rows[:0])
        learning_rate = optimizer.get_lr()
        optimizer.step()
        optimizer.clear_grad()
        scheduler.step()
        yield Step(number, epoch, ends_epoch, mean_loss, learning_rate, pairs)


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is NaN or infinite; `rows` are this rank's pairs if theirs is, else none."""

    def __init__(self, step: int, loss: float, rows: np.ndarray) -> None:
        super().__init__(f"the loss of step {step} is {loss}")
        self.rows = rows


def schedule(
    count: int, batch_size: int, *, seed: int, epochs: int, max_steps: int | None, world_size: int
) -> Iterator[tuple[int, bool, list[np.ndarray]]]:
    """(epoch from 1, whether the step ends it, rows of each rank) of every step."""
    remaining = total_steps(count, batch_size, epochs=epochs, max_steps=max_steps, world_size=world_size)
    epoch = 0
    while remaining:
        epoch += 1
        steps = epoch_batches(count, batch_size, seed=seed, epoch=epoch, world_size=world_size)[:remaining]
        remaining -= len(steps)
        for number, rank_rows in enumerate(steps, 1):
            yield epoch, number == len(steps), rank_rows


def total_steps(count: int, batch_size: int, *, epochs: int, max_steps: int | None, world_size: int) -> int:
    """Steps of all epochs, or `max_steps` if it is given: then epochs go on until it is reached."""
    return max_steps or epochs * math.ceil(count / (batch_size * world_size))


class TrainingLog:
    """Prints a line every `log_steps` and writes the same to VisualDL."""

    def __init__(self, folder: Path, log_steps: int, steps: int) -> None:
        self._writer = LogWriter(str(folder))
        self._log_steps, self._steps = log_steps, steps
        self._pairs = 0
        self._since = self._start = time.monotonic()

    def step(self, step: Step) -> None:
        """Counts a step and, if it is due, prints and writes a line."""
        self._pairs += step.pairs
        if step.number % self._log_steps and step.number != self._steps:
            return
        now = time.monotonic()
        steps_per_second = ((step.number - 1) % self._log_steps + 1) / (now - self._since)
        pairs_per_second = self._pairs / (now - self._since)
        left = (self._steps - step.number) * (now - self._start) / step.number
        print(
            f"global step {step.number}/{self._steps}, epoch: {step.epoch}, loss: {step.loss:.5f}, "
            f"lr: {step.learning_rate:.3g}, speed: {steps_per_second:.2f} step/s, {pairs_per_second:.1f} pairs/s, "
            f"left: {time.strftime('%H:%M:%S', time.gmtime(left))}",
            flush=True,
        )
        for name, value in (
            ("loss", step.loss),
            ("learning_rate", step.learning_rate),
            ("steps_per_second", steps_per_second),
            ("pairs_per_second", pairs_per_second),
        ):
            self._writer.add_scalar(f"train/{name}", value, step.number)
        self._pairs, self._since = 0, now

    def evaluation(self, evaluation: Evaluation, step: Step) -> None:
        """Prints and writes the metrics of an evaluation, whose time doesn't count as training time."""
        for line in format_lines(evaluation):
            name, value = line.split("=")
            self._writer.add_scalar(f"evaluate/{name}", float(value), step.number)
            print(line, flush=True)

    def resume_clock(self, paused: float) -> None:
        """Takes `paused` seconds of saving or evaluating off the training time."""
        self._since += paused
        self._start += paused

    def close(self) -> None:
        """Writes what VisualDL still holds."""
        self._writer.close()


def lines_of_rows(train_set_file: str, rows: np.ndarray) -> list[int]:
    """Line numbers of pairs in the training file."""
    good_lines = [line.number for line in read_lines(train_set_file, parse_pair, True) if line.row is not None]
    return sorted(good_lines[row] for row in rows)


def check_batch_size(batch_size: int, world_size: int, pairs: Sequence[TextPair], train_set_file: str) -> None:
    """Raises InputError where a step would need more pairs than there are."""
    if batch_size * world_size > len(pairs):
        remedy = f"{train_set_file} has {len(pairs)} pairs; use at most --batch_size {len(pairs) // world_size}"
        raise InputError(f"--batch_size {batch_size} on {world_size} process(es): {remedy}")


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--train_set_file", default="./recall/train.csv", help="pairs: query<TAB>title a line")
    add_skip_bad_lines_arg(parser)
    parser.add_argument("--save_dir", default="./checkpoints", help="folder of the checkpoints and of VisualDL's logs")
    add_model_args(parser)
    add_encoding_args(parser)
    parser.add_argument("--epochs", type=at_least(1), default=10, help="times that each pair is seen")
    parser.add_argument("--max_steps", type=at_least(1), help="stop after so many steps, in place of --epochs")
    parser.add_argument("--learning_rate", type=at_least(0.0, float), default=5e-5, help="highest learning rate")
    parser.add_argument(
        "--warmup_proportion", type=at_least(0.0, float, 1.0), default=0.0, help="share of the steps to warm up"
    )
    parser.add_argument("--weight_decay", type=at_least(0.0, float), default=0.0, help="AdamW's weight decay")
    parser.add_argument("--max_grad_norm", type=at_least(0.0, float), default=5.0, help="gradients are clipped to it")
    parser.add_argument("--margin", type=at_least(0.0, float), default=0.2, help="taken off the positive's cosine")
    parser.add_argument("--scale", type=at_least(0.0, float), default=30.0, help="factor of the cosines")
    parser.add_argument(
        "--no_mask_duplicates",
        action="store_true",
        help="let a title count as a negative even where the training file pairs it with the query",
    )
    parser.add_argument(
        "--seed", type=at_least(0, below=2**32), default=1000, help="seed of the weights, dropout and shuffle"
    )
    parser.add_argument("--log_steps", type=at_least(1), default=10, help="steps between log lines")
    parser.add_argument("--save_steps", type=at_least(1), default=10000, help="steps between checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="evaluate after each epoch and keep model_best")
    parser.add_argument("--eval_steps", type=at_least(1), help="evaluate every so many steps instead, and at the end")
    add_evaluation_file_args(parser, required=False)
    parser.add_argument("--evaluate_result", default="evaluate_result.txt", help="all metrics, in recall_result_dir")
    parser.add_argument("--recall_num", type=at_least(1), default=50, help="documents recalled for a query")
    add_index_args(parser)
    add_device_arg(parser, default="cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, saves and evaluates."""
    args = build_parser().parse_args(argv)
    pairs = read_text_pairs(args.train_set_file, skip_bad_lines=args.skip_bad_lines)
    evaluator = None
    if args.evaluate:
        dev_pairs = read_text_pairs(args.similar_text_pair_file, skip_bad_lines=args.skip_bad_lines)
        corpus = read_corpus(args.corpus_file, skip_bad_lines=args.skip_bad_lines)
        check_index_args(args.ann, len(corpus), args.hnsw_max_elements)
        report_missing_positives(corpus, titles_by_query(dev_pairs), args.corpus_file)
        evaluator = Evaluator(
            corpus,
            titles_by_query(dev_pairs),
            batch_size=args.batch_size,
            recall_num=args.recall_num,
            build=partial(
                build_index,
                args.ann,
                hnsw_m=args.hnsw_m,
                hnsw_ef=args.hnsw_ef,
                hnsw_max_elements=args.hnsw_max_elements,
            ),
            result_file=Path(args.recall_result_dir) / args.recall_result_file,
            report_file=Path(args.recall_result_dir) / args.evaluate_result,
        )

    set_device(args.device)
    rank, world_size = init_ranks()
    check_batch_size(args.batch_size, world_size, pairs, args.train_set_file)
    set_seed(args.seed)
    model, collator = create_model(
        SemanticIndexBatchNeg,
        model_name_or_path=args.model_name_or_path,
        from_scratch=args.from_scratch,
        init_from_ckpt=args.init_from_ckpt,
        output_emb_size=args.output_emb_size,
        pooling=args.pooling,
        dropout=args.dropout,
        max_seq_length=args.max_seq_length,
    )
    broadcast_parameters(model)
    set_seed(args.seed + rank)  # ranks start from the same weights and drop different values
    plan = {"epochs": args.epochs, "max_steps": args.max_steps, "world_size": world_size}
    steps = total_steps(len(pairs), args.batch_size, **plan)
    optimizer, scheduler = make_optimizer(
        model,
        learning_rate=args.learning_rate,
        total_steps=steps,
        warmup_proportion=args.warmup_proportion,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
    )
    save_dir = Path(args.save_dir)
    training_log = TrainingLog(save_dir / "visualdl", args.log_steps, steps) if rank == 0 else None
    log(f"training on {len(pairs)} pairs: {steps} steps of {args.batch_size} pairs on each of {world_size} process(es)")

    try:
        for step in train(
            model,
            PairCollator(collator, pairs, mask_duplicates=not args.no_mask_duplicates),
            optimizer,
            scheduler,
            schedule(len(pairs), args.batch_size, seed=args.seed, **plan),
            rank=rank,
            margin=args.margin,
            scale=args.scale,
        ):
            if training_log:
                training_log.step(step)
            paused_at = time.monotonic()
            is_last = step.number == steps
            if rank == 0 and (is_last or step.number % args.save_steps == 0):
                save_checkpoint(save_dir / f"model_{step.number}", model, collator)
            is_due = step.number % args.eval_steps == 0 if args.eval_steps else step.ends_epoch
            if evaluator and (is_due or is_last):
                evaluation = evaluator(model, collator, step)
                if evaluation and training_log:
                    training_log.evaluation(evaluation, step)
                    if evaluator.is_best(evaluation):
                        recall_5 = best_metric(evaluation)
                        result = f"epoch={step.epoch}, global_step: {step.number}, recall: {recall_5}\n"
                        save_checkpoint(save_dir / "model_best", model, collator, {"train_result.txt": result})
            if training_log:
                training_log.resume_clock(time.monotonic() - paused_at)
    except NonFiniteLoss as error:
        lines = lines_of_rows(args.train_set_file, error.rows)
        where = f"the batch has lines {', '.join(map(str, lines))} of {args.train_set_file}" if lines else "on a rank"
        remedy = "look at them, or lower --learning_rate; the last checkpoint is kept"
        raise InputError(f"{error}; {where}; {remedy}") from None
    finally:
        if training_log:
            training_log.close()
    if rank == 0:
        print(f"wrote {save_dir / f'model_{steps}'}")
    return 0


if __name__ == "__main__":
    run(main)
