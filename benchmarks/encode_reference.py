"""Encoding as in the original scripts; bench_encode.py runs it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import paddle
from paddlenlp.transformers import ErnieConfig, ErnieTokenizer

from benchmarks.harness import add_encoder_args, measure_encoding, write_report
from benchmarks.reference import ReferenceModel, encode
from common.cli import ArgumentParser, run
from modeling.checkpoint_files import find_weights
from modeling.weight_files import read_weights


def load_reference(folder: str) -> ReferenceModel:
    """The model of a checkpoint's folder, in evaluation mode."""
    model = ReferenceModel(ErnieConfig.from_pretrained(folder))
    model.set_state_dict(read_weights(find_weights(folder)))
    model.eval()
    return model


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Encodes and reports."""
    args = build_parser().parse_args(argv)
    paddle.set_device("cpu")
    model, tokenizer = load_reference(args.model), ErnieTokenizer.from_pretrained(args.model)

    def encode_all(texts: Sequence[str]) -> np.ndarray:
        return encode(model, tokenizer, texts, args.batch_size)

    write_report(
        args.report,
        measure_encoding(
            encode_all, args.corpus_file, ["paddlepaddle", "paddlenlp"], warm_up=args.warm_up, passes=args.passes
        ),
    )
    return 0


if __name__ == "__main__":
    run(main)
