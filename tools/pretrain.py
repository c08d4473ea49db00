"""Pre-trains on texts without pairs: cuts pairs out of them, then trains on these with train_batch_neg.py."""

import argparse
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.cli import ArgumentParser, positive_int, run
from common.errors import InputError
from common.files import atomic_write, make_folder, read_json, sha256, write_json
from common.lines import read_lines
from common.logs import log, progress_bar
from data import TextPair, parse_texts
from retrieval.lexical_index import UNSPACED

PAIRS_FILE = "pretraining_pairs.csv"  # in --save_dir
UNIT = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")  # what a cut keeps whole: a word, or a character without spaces
FEWEST_UNITS = 6  # of a text that is cut
SHORTEST, LONGEST = 0.3, 0.7  # share of the text in a piece
