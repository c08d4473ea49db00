"""Writes what bench_encode.py's encoders load: a checkpoint of random weights, and its export with an ONNX graph."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import EMBEDDING_SIZE, MAX_SEQ_LENGTH
from common.cli import ArgumentParser, number_in_range, run
from common.paddle_setup import set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

import export_model
from base_model import SemanticIndexBase
from common.device import set_device, set_seed
from data import read_texts
from encoding.encoder import load_encoder
from encoding.text_encoder import TextSample
from modeling.checkpoint import create_model, save_checkpoint


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with a config.json and a vocab.txt")
    parser.add_argument("--checkpoint", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--exported", required=True, help="folder to export it to")
    parser.add_argument("--calibration_file", help="texts, one per line; both folders then have the graph in int8, too")
    parser.add_argument("--seed", type=number_in_range(0), default=0, help="seed of the weights")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes both folders."""
    args = build_parser().parse_args(argv)
    set_device("cpu")
    set_seed(args.seed)
    loaded = create_model(
        SemanticIndexBase,
        from_scratch=args.model,
        output_emb_size=EMBEDDING_SIZE,
        pooling="cls",  # the reference's
        max_seq_length=MAX_SEQ_LENGTH,
    )
    save_checkpoint(args.checkpoint, *loaded)
    if args.calibration_file:
        load_encoder(args.checkpoint, precision="int8", sample=TextSample(read_texts(args.calibration_file)))
    return export_model.main(["--params_path", args.checkpoint, "--output_path", args.exported, "--format", "onnx"])


if __name__ == "__main__":
    run(main)
