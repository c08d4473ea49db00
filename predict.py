"""Predicts the similarity of text pairs: the cosine of each line of a file, one a line, in the file's order."""

import argparse
from collections.abc import Sequence

import numpy as np

from data import TextPair, add_encoding_args, add_skip_bad_lines_arg, parse_pair, read_lines
from runtime import ArgumentParser, is_main_process, log, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import add_checkpoint_args, add_device_arg, set_device
from distributed import encode_share, init_ranks
from encoder import Encoder, add_engine_args, compare_with_fp32, load_encoder


def predict(encoder: Encoder, pairs: Sequence[TextPair]) -> np.ndarray:
    """Cosines of query and title, float32 [N, 1], in order; each rank computes its share."""

    def cosines(rows: slice) -> np.ndarray:
        queries = encoder([pair.query for pair in pairs[rows]], "queries")
        titles = encoder([pair.title for pair in pairs[rows]], "titles")
        return (queries * titles).sum(axis=1, keepdims=True)

    return encode_share(len(pairs), 1, cosines)


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--text_pair_file", required=True, help="pairs to compare, query<TAB>title a line")
    add_checkpoint_args(parser)
    add_skip_bad_lines_arg(parser)
    add_encoding_args(parser)
    parser.add_argument(
        "--pad_to_max_seq_len", action="store_true", help="pad every text to max_seq_length: slower, the same cosines"
    )
    add_engine_args(parser)
    add_device_arg(parser, default="gpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a cosine for each line of the file, and `nan` for a bad line that was skipped."""
    args = build_parser().parse_args(argv)
    lines = [line.row for line in read_lines(args.text_pair_file, parse_pair, args.skip_bad_lines)]

    set_device(args.device)
    init_ranks()
    pairs = [pair for pair in lines if pair is not None]
    encoder = load_encoder(
        args.params_path,
        batch_size=args.batch_size,
        text_count=2 * len(pairs),
        engine=args.engine,
        precision=args.precision,
        model_name_or_path=args.model_name_or_path,
        output_emb_size=args.output_emb_size,
        max_seq_length=args.max_seq_length,
    )
    encoder.collator.pad_to_max_seq_len = args.pad_to_max_seq_len
    cosines = predict(encoder, pairs)
    if encoder.embed_fp32:
        titles, queries = [pair.title for pair in pairs], [pair.query for pair in pairs]
        log(f"{encoder.precision}: {compare_with_fp32(encoder, titles, queries)}")
    if is_main_process():
        remaining = iter(cosines[:, 0].tolist())
        print("\n".join("nan" if pair is None else str(next(remaining)) for pair in lines))
    return 0


if __name__ == "__main__":
    run(main)
