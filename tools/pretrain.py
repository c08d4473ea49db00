"""Pre-trains on texts without pairs: cuts pairs out of them, then trains on these with train_batch_neg.py."""

import argparse
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, number_in_range, positive_int, run
from common.errors import InputError
from common.files import atomic_write
from common.lines import read_lines
from common.logs import log
from common.texts import has_visible_text, rough_key
from data import parse_text
from retrieval.lexical_index import UNSPACED

TRAINING = Path(__file__).resolve().parents[1] / "train_batch_neg.py"
PAIRS_FILE = "pretraining_pairs.csv"  # in --save_dir
UNIT = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # what a cut keeps whole: a word, or a character without spaces
FEWEST_UNITS = 6  # of a text that is cut
SHORTEST, LONGEST = 0.1, 0.5  # share of the text in a piece; docs/results.md compares it with 0.3, 0.7


def read_distinct_texts(files: Sequence[str], skip_bad_lines: bool) -> Iterator[str]:
    """The columns of all lines; of texts with the same `rough_key`, the first. Raises InputError as `read_lines`."""
    seen: set[int] = set()  # hashes, since the texts may not fit into memory
    for file in files:
        for line in read_lines(file, _parse_columns, skip_bad_lines):
            for text in line.row or ():
                key = hash(rough_key(text))
                if key not in seen:
                    seen.add(key)
                    yield text


def _parse_columns(text: str) -> list[str]:
    return [parse_text(column) for column in text.split("\t")]


def cut_pair(text: str, rng: random.Random) -> tuple[str, str] | None:
    """Two pieces of a text, which may overlap; None if the text is too short, both are the same, or one shows nothing.

    Independent cropping: Izacard et al. 2022 (Contriever), arXiv:2112.09118, section 3.1.
    """
    units = [match.span() for match in UNIT.finditer(text)]
    if len(units) < FEWEST_UNITS:
        return None
    first, second = _piece(text, units, rng), _piece(text, units, rng)
    return (first, second) if first != second and has_visible_text(first) and has_visible_text(second) else None


def _piece(text: str, units: Sequence[tuple[int, int]], rng: random.Random) -> str:
    length = round(len(units) * rng.uniform(SHORTEST, LONGEST))
    start = rng.randint(0, len(units) - length)
    return text[units[start][0] : units[start + length - 1][1]]


def cut_pairs(texts: Iterable[str], pairs_per_text: int, seed: int) -> Iterator[tuple[str, str]]:
    """The pairs of all texts that are long enough; the same for the same texts and seed."""
    rng = random.Random(seed)
    for text in texts:
        for _ in range(pairs_per_text):
            if pair := cut_pair(text, rng):
                yield pair


def write_pairs(pairs: Iterable[tuple[str, str]], file: Path) -> int:
    """Writes a training file, and returns its number of lines. Raises InputError if there would be none."""
    count = 0
    with atomic_write(file) as output:
        for first, second in pairs:
            output.write(f"{first}\t{second}\n")
            count += 1
        if not count:
            raise InputError(f"--text_file: all texts have fewer than {FEWEST_UNITS} words; there is nothing to cut")
    return count


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(f"{__doc__} All other options are passed on to that script.")
    add = parser.add_argument
    text_help = "texts, one per line; each column of a file of pairs counts; may be given several times"
    add("--text_file", action="append", required=True, metavar="FILE", help=text_help)
    add("--save_dir", required=True, help=f"folder of the checkpoints, and of the pairs, {PAIRS_FILE}")
    add("--pairs_per_text", type=positive_int, default=2, help="pairs that are cut from each text")
    add("--seed", type=number_in_range(0, below=2**32), default=1000, help="seed of the cuts and of the training")
    add("--skip_bad_lines", action="store_true", help="leave bad lines out and report how many")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the pairs, and becomes train_batch_neg.py; under paddle.distributed.launch every rank writes the same."""
    args, training_options = build_parser().parse_known_args(argv)
    pairs_file = Path(args.save_dir) / PAIRS_FILE
    texts = read_distinct_texts(args.text_file, args.skip_bad_lines)
    count = write_pairs(cut_pairs(texts, args.pairs_per_text, args.seed), pairs_file)
    log(f"{pairs_file}: {count} pairs, cut from the texts of {', '.join(args.text_file)}")
    options = ["--train_set_file", str(pairs_file), "--save_dir", args.save_dir, "--seed", str(args.seed)]
    os.execv(sys.executable, [sys.executable, str(TRAINING), *options, *training_options])


if __name__ == "__main__":
    run(main)
