"""Encoding as in recall.py on a CPU, without shards on disk; bench_encode.py runs it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.harness import MAX_SEQ_LENGTH, add_encoder_args, measure_encoding, write_report
from common.cli import ArgumentParser, run
from common.logs import is_main_process
from common.paddle_setup import set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from common.device import set_device
from common.distributed import encode_on_all_ranks, init_ranks
from common.options import ENGINES, STATIC_FROM_TEXTS, add_precision_args
from encoding.encoder import load_encoder


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser)
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="see recall.py")
    add_precision_args(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Encodes and reports; under paddle.distributed.launch each rank encodes a share, and all get all vectors."""
    args = build_parser().parse_args(argv)
    set_device("cpu")
    init_ranks()
    encoder = load_encoder(
        args.model,
        batch_size=args.batch_size,
        text_count=STATIC_FROM_TEXTS,  # so that "auto" chooses the engine of a large corpus
        engine=args.engine,
        precision=args.precision,
        max_seq_length=MAX_SEQ_LENGTH,
    )

    def encode(texts: Sequence[str]) -> np.ndarray:
        return encode_on_all_ranks(len(texts), encoder.embedding_size, lambda share: encoder.encode(texts[share]))

    report = measure_encoding(
        encode, args.corpus_file, ["paddlepaddle", "paddlenlp"], warm_up=args.warm_up, passes=args.passes
    )
    if is_main_process():
        write_report(args.report, report)
    return 0


if __name__ == "__main__":
    run(main)
