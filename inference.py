"""Turns texts into vectors: prints them, or writes them to a .npy file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from common.cli import ArgumentParser, run, text_argument
from common.errors import InputError
from common.files import prepare_file
from common.logs import log
from common.options import add_encoder_args, add_role_arg, add_vector_dtype_arg, call, pick
from common.paddle_setup import set_up_paddle
from common.vector_dtypes import FLOAT32, to_dtype
from data import SAMPLE_TEXTS, read_texts, write_vectors
from modeling.checkpoint_files import check_checkpoint

DEFAULT_PARAMS_PATH = "checkpoints/inbatch/model_40/model_state.pdparams"


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser, None, DEFAULT_PARAMS_PATH)
    group = parser.add_mutually_exclusive_group()
    text_help = "a text; may be given several times (default: the original's sample text)"
    group.add_argument("--text", action="append", type=text_argument, help=text_help)
    group.add_argument("--text_file", help="file with one text per line")
    add_role_arg(parser)
    parser.add_argument("--output", help="write the vectors, [N, D], to this .npy file and don't print them")
    add_vector_dtype_arg(parser, "type of the vectors in --output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the shape of the vectors, and prints them in the original's form or writes them to --output."""
    args = build_parser().parse_args(argv)
    check_checkpoint(args.params_path)
    if args.vector_dtype != FLOAT32 and not args.output:
        raise InputError(f"--vector_dtype {args.vector_dtype}: give the --output file that is to have it")
    texts = args.text or SAMPLE_TEXTS[:1]
    if args.text_file:
        texts = call(read_texts, args, path=args.text_file)
    calibration_texts = call(read_texts, args, path=args.calibration_file) if args.calibration_file else None
    if args.output:
        prepare_file(args.output)

    set_up_paddle()
    from common.device import set_device
    from encoding.encoder import load_encoder
    from encoding.text_encoder import TextSample, compare_with_fp32
    from encoding.token_statistics import report_tokens

    set_device(args.device)
    sample = TextSample(texts, roles=(args.role, args.role))
    given_texts = {"text_count": len(texts), "sample": sample, "calibration_texts": calibration_texts}
    encoder = load_encoder(**pick(args, load_encoder, **given_texts))
    report_tokens(encoder.tokenizer, {"texts": texts}, args.role)
    vectors = encoder.encode(texts, "texts" if args.output else None, args.role)
    if encoder.embed_fp32:
        log(f"{encoder.precision}: {encoder.fidelity or compare_with_fp32(encoder, sample)}")
    print(list(vectors.shape))
    if args.output:
        write_vectors(args.output, to_dtype(vectors, args.vector_dtype))
        print(f"wrote {args.output}")
    else:
        print(vectors)
    return 0


if __name__ == "__main__":
    run(main)
