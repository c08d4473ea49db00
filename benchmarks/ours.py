"""Training as train_batch_neg.py does it on a CPU, less logging, evaluation and checkpoints: for the benchmarks."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
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
from data import PairCollator, read_text_pairs
from runtime import ArgumentParser, at_least, is_main_process, log, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import set_device, set_seed
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import Plan, PlannedStep, Trainer, check_batch_size, make_optimizer
from checkpoint import create_model
from cpu_layers import speed_up_training
from distributed import broadcast_parameters, init_ranks


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_trainer_args(parser)
    parser.add_argument("--grad_cache_chunk", type=at_least(1), help="as in train_batch_neg.py")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports."""
    args = build_parser().parse_args(argv)
    pairs = read_text_pairs(args.train_set_file)
    set_device("cpu")
    rank, world_size = init_ranks()
    check_batch_size(args.batch_size, world_size, pairs, args.train_set_file)
    set_seed(args.seed)
    model, collator = create_model(
        SemanticIndexBatchNeg,
        from_scratch=args.model,
        output_emb_size=EMBEDDING_SIZE,
        pooling="mean",
        max_seq_length=MAX_SEQ_LENGTH,
    )
    broadcast_parameters(model)
    speed_up_training(model)
    plan = Plan(len(pairs), args.batch_size, seed=args.seed, epochs=1, max_steps=args.steps, world_size=world_size)
    optimizer, scheduler = make_optimizer(
        model,
        learning_rate=args.learning_rate,
        total_steps=plan.total_steps,
        warmup_proportion=0.1,
        weight_decay=0.0,
        max_grad_norm=5.0,
    )
    trainer = Trainer(
        model,
        PairCollator(collator, pairs, chunk_texts=args.grad_cache_chunk),
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

    seconds, losses = timed_steps(step, plan.steps(0))
    if args.report and is_main_process():
        write_report(args.report, Training(seconds, losses, *used(["paddlepaddle", "paddlenlp"])))
    log(f"{len(losses)} steps, last loss {losses[-1]:.4f}")
    return 0


if __name__ == "__main__":
    run(main)
