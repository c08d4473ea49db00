"""Predicts the similarity of text pairs: prints the cosine of each line of a file, in the order of the lines."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from common.cli import ArgumentParser, run
from common.logs import is_main_process, log
from common.options import add_encoder_args, call, pick
from common.paddle_setup import set_up_paddle
from common.texts import DOCUMENT, QUERY
from data import pair_lines, read_texts
from modeling.checkpoint_files import check_checkpoint


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser, "gpu")
    parser.add_argument("--text_pair_file", required=True, help="pairs to compare, one per line: query<TAB>title")
    padding_help = "pad every text to --max_seq_length: slower, the same cosines"
    parser.add_argument("--pad_to_max_seq_len", action="store_true", help=padding_help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a cosine for each line of the file, or `nan` for a bad line that was skipped."""
    args = build_parser().parse_args(argv)
    check_checkpoint(args.params_path)
    pair_of_line = [line.row for line in call(pair_lines, args, path=args.text_pair_file, third_column=False)]
    pairs = [pair for pair in pair_of_line if pair is not None]
    calibration_texts = call(read_texts, args, path=args.calibration_file) if args.calibration_file else None

    set_up_paddle()
    from common.device import set_device
    from common.distributed import init_ranks
    from encoding.encoder import load_encoder
    from encoding.text_encoder import TextSample, compare_with_fp32
    from encoding.token_statistics import report_tokens
    from retrieval.pipeline import pair_cosines

    set_device(args.device)
    init_ranks()
    queries, titles = [pair.query for pair in pairs], [pair.title for pair in pairs]
    sample = TextSample(titles, queries)
    given_texts = {"text_count": 2 * len(pairs), "sample": sample, "calibration_texts": calibration_texts}
    encoder = load_encoder(**pick(args, load_encoder, **given_texts))
    encoder.tokenizer.pad_to_max_seq_len = args.pad_to_max_seq_len
    report_tokens(encoder.tokenizer, {"queries": queries}, QUERY)
    report_tokens(encoder.tokenizer, {"titles": titles}, DOCUMENT)
    cosines = pair_cosines(encoder, queries, titles)
    if encoder.embed_fp32:
        log(f"{encoder.precision}: {encoder.fidelity or compare_with_fp32(encoder, sample)}")
    if is_main_process():
        remaining = iter(cosines.tolist())
        print("\n".join("nan" if pair is None else str(next(remaining)) for pair in pair_of_line))
    return 0


if __name__ == "__main__":
    run(main)
