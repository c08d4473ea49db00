"""Training as in train_batch_neg.py on a CPU, without logging, evaluation and checkpoints; the benchmarks run it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_negative.batches import PairBatcher
from benchmarks.harness import (
    EMBEDDING_SIZE,
    MARGIN,
    MAX_SEQ_LENGTH,
    SCALE,
    Training,
    add_trainer_args,
    timed_steps,
    used,
    write_report,
)
from common.cli import ArgumentParser, number_in_range, run
from common.logs import is_main_process, log
from common.paddle_setup import set_up_paddle
from data import read_text_pairs

if __name__ == "__main__":
    set_up_paddle()

from batch_negative.batches import BatchSchedule, PlannedStep, check_batch_size
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import Trainer, make_optimizer
from common.device import set_device, set_seed
from common.distributed import broadcast_parameters, init_ranks
from modeling.checkpoint import create_model
from train_batch_neg import prepare_model


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_trainer_args(parser)
    parser.add_argument("--grad_cache_chunk", type=number_in_range(1), help="as in train_batch_neg.py")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports."""
    args = build_parser().parse_args(argv)
    pairs = read_text_pairs(args.train_set_file)
    set_device("cpu")
    rank, world_size = init_ranks()
    check_batch_size(args.batch_size, world_size, pairs, args.train_set_file)
    set_seed(args.seed)
    model, tokenizer = create_model(
        SemanticIndexBatchNeg,
        from_scratch=args.model,
        output_emb_size=EMBEDDING_SIZE,
        pooling="mean",
        max_seq_length=MAX_SEQ_LENGTH,
    )
    broadcast_parameters(model)
    prepare_model(model, "cpu", use_recompute=False, unsupervised=False)
    schedule = BatchSchedule(
        len(pairs), args.batch_size, seed=args.seed, epochs=1, max_steps=args.steps, world_size=world_size
    )
    optimizer, scheduler = make_optimizer(
        model,
        learning_rate=args.learning_rate,
        total_steps=schedule.total_steps,
        warmup_proportion=0.1,
        weight_decay=0.0,
        max_grad_norm=5.0,
    )
    trainer = Trainer(
        model,
        PairBatcher(tokenizer, pairs, chunk_texts=args.grad_cache_chunk, chunk_count=model.chunks_per_batch),
        optimizer,
        scheduler,
        rank=rank,
        seed=args.seed,
        margin=MARGIN,
        scale=SCALE,
        backward=cached_backward if args.grad_cache_chunk else direct_backward,
    )

    def step(planned: PlannedStep) -> float:
        return trainer.step(planned).loss

    seconds, losses = timed_steps(step, schedule.steps(0))
    if args.report and is_main_process():
        write_report(args.report, Training(seconds, losses, *used(["paddlepaddle", "paddlenlp"])))
    log(f"{len(losses)} steps, last loss {losses[-1]:.4f}")
    return 0


if __name__ == "__main__":
    run(main)
