"""Scores a training file with a trained model, for a training with `train_batch_neg.py --teacher_scores`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, run
from common.errors import InputError
from common.files import prepare_file, remove_folder, sha256
from common.logs import is_main_process, log
from common.options import add_encoder_args, call, pick
from common.paddle_setup import set_up_paddle
from common.texts import DOCUMENT, QUERY
from data import TextPair, pair_lines, read_texts
from modeling.checkpoint_files import check_checkpoint

WORK_SUFFIX = ".scoring"  # of the folder beside the output that keeps what is done, until the output is complete
SAMPLE = 2000  # pairs at the beginning of the file that are looked at for texts that the model can't see


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser, "gpu")
    file_help = "pairs with hard negatives, one per line: query<TAB>title<TAB>hard negative..."
    parser.add_argument("--train_set_file", required=True, help=file_help)
    output_help = "the file to write: the same texts, then a cosine for the title and each hard negative"
    parser.add_argument("--output", required=True, help=output_help)
    return parser


class TrainingFile(NamedTuple):
    """A training file that has been checked, and is then read a pair at a time."""

    path: str
    lines: int  # that are pairs or left out
    pairs: int

    def __call__(self) -> Iterator[TextPair]:
        """Reads the pairs."""
        lines = pair_lines(self.path, skip_bad_lines=True, check_columns=False)
        # Without asking for a line after the last one, after which bad lines would be reported again.
        return (line.row for line in islice(lines, self.lines) if line.row is not None)


def check_file(train_set_file: str, output: str, skip_bad_lines: bool, check_columns: bool) -> TrainingFile:
    """Reads the whole file. Raises InputError for one that can't be used, or an output that can't be written."""
    if os.path.realpath(train_set_file) == os.path.realpath(output):
        raise InputError(f"--output {output}: would replace a file that is read; give another one")
    lines = pairs = hard_negatives = 0
    for line in pair_lines(train_set_file, skip_bad_lines=skip_bad_lines, check_columns=check_columns):
        lines += 1
        if line.row is not None:
            pairs, hard_negatives = pairs + 1, hard_negatives + len(line.row.hard_negatives)
    if not hard_negatives:
        problem = "no line has a hard negative, so there is nothing to score higher or lower than a title"
        raise InputError(f"{train_set_file}: {problem}; add hard negatives, one or more a line")
    if is_main_process():
        prepare_file(output)
    return TrainingFile(train_set_file, lines, pairs)


def main(argv: Sequence[str] | None = None) -> int:
    """Scores the pairs, writes the file, and prints how many there are."""
    args = build_parser().parse_args(argv)
    check_checkpoint(args.params_path)
    training_file = call(check_file, args)
    calibration_texts = call(read_texts, args, path=args.calibration_file) if args.calibration_file else None

    set_up_paddle()
    from common.device import set_device
    from common.distributed import init_ranks
    from encoding.encoder import load_encoder
    from encoding.text_encoder import TextSample, compare_with_fp32
    from encoding.token_statistics import report_tokens
    from mining.blocks import PairBlocks
    from mining.pair_scores import cosines, texts_of, write_training_file

    set_device(args.device)
    init_ranks()
    pairs = list(islice(training_file(), SAMPLE))
    queries, documents = [pair.query for pair in pairs], [text for pair in pairs for text in texts_of(pair)]
    sample = TextSample(documents, queries)
    given_texts = {"text_count": 2 * training_file.pairs, "sample": sample, "calibration_texts": calibration_texts}
    encoder = load_encoder(**pick(args, load_encoder, **given_texts))
    report_tokens(encoder.tokenizer, {"queries": queries}, QUERY)
    report_tokens(encoder.tokenizer, {"titles and hard negatives": documents}, DOCUMENT)
    if encoder.embed_fp32:
        log(f"{encoder.precision}: {encoder.fidelity or compare_with_fp32(encoder, sample)}")
    model = {"params_path": encoder.fingerprint, "precision": encoder.precision}
    work = Path(f"{args.output}{WORK_SUFFIX}")
    metadata = {"train_set_file": sha256(args.train_set_file), **model}
    blocks = PairBlocks(work, training_file.pairs, metadata, "scoring")
    blocks.compute_missing(blocks.split(training_file()), lambda block: {"scores": cosines(encoder, block)})
    if is_main_process():
        write_training_file(args.output, training_file(), blocks)
        remove_folder(work)
        print(f"wrote {args.output}: the scores of {training_file.pairs} pairs")
    return 0


if __name__ == "__main__":
    run(main)
