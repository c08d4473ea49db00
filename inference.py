"""Turns texts into vectors: prints them, or writes them to a .npy file."""

import argparse
from collections.abc import Sequence

import numpy as np

from data import (
    SAMPLE_TEXTS,
    add_encoding_args,
    add_skip_bad_lines_arg,
    read_texts,
    text_argument,
)
from files import atomic_write, prepare_file
from runtime import ArgumentParser, log, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import add_checkpoint_args, add_device_arg, set_device
from encoder import add_engine_args, compare_with_fp32, load_encoder

DEFAULT_PARAMS_PATH = "checkpoints/inbatch/model_40/model_state.pdparams"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--text",
        action="append",
        type=text_argument,
        help="a text; may be given again (default: the document's sample)",
    )
    texts.add_argument("--text_file", help="a file with a text a line")
    parser.add_argument("--output", help="write the vectors, float32 [N, D] in the texts' order, to this .npy file")
    add_checkpoint_args(parser, params_path=DEFAULT_PARAMS_PATH)
    add_skip_bad_lines_arg(parser)
    add_encoding_args(parser)
    add_engine_args(parser)
    add_device_arg(parser, default=None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the shape and the vectors as the document shows them, or writes them and prints the file's name."""
    args = build_parser().parse_args(argv)
    texts = args.text or SAMPLE_TEXTS[:1]
    if args.text_file:
        texts = read_texts(args.text_file, skip_bad_lines=args.skip_bad_lines)

    set_device(args.device)
    encoder = load_encoder(
        args.params_path,
        batch_size=args.batch_size,
        text_count=len(texts),
        engine=args.engine,
        precision=args.precision,
        model_name_or_path=args.model_name_or_path,
        output_emb_size=args.output_emb_size,
        max_seq_length=args.max_seq_length,
    )
    if args.output:
        prepare_file(args.output)
    vectors = encoder(texts, "texts" if args.output else None)
    if encoder.embed_fp32:
        log(f"{encoder.precision}: {compare_with_fp32(encoder, texts, texts)}")
    print(list(vectors.shape))
    if args.output:
        with atomic_write(args.output, "wb") as file:
            np.save(file, vectors)
        print(f"wrote {args.output}")
    else:
        print(vectors)
    return 0


if __name__ == "__main__":
    run(main)
