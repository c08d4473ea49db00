"""What a model can't see of the texts of a column. Imports no Paddle."""

from typing import NamedTuple

import numpy as np

from data import TextTokenizer
from data_check.files import ROLES, Column
from data_check.rules import CUT, EXAMPLES, UNKNOWN, Finding
from encoding.token_statistics import sample_rows, statistics_of_counts


class LengthAdvice(NamedTuple):
    """The --max_seq_length that COVERED of a column's texts fit into, beside the one that was given."""

    path: str
    column: str
    given: int
    suggested: int


def token_findings(column: Column, tokenizer: TextTokenizer) -> tuple[list[Finding], LengthAdvice]:
    """The share of a sample of texts that is cut, the share of its tokens that is unknown, and the length to take."""
    rows = sample_rows(len(column)).tolist()
    sample = [column[row] for row in rows]
    lengths, unknown = tokenizer.count(sample)
    statistics = statistics_of_counts(tokenizer, sample, lengths, unknown, ROLES[column.name])
    longest = np.argsort(-lengths, kind="stable")[: min(EXAMPLES, statistics.cut)].tolist()
    strangest = np.argsort(-unknown / lengths, kind="stable")[:EXAMPLES].tolist()
    cut = [f"{lengths[number]}: {column.example(rows[number])}" for number in longest]
    strange = [f"{unknown[number]}: {column.example(rows[number])}" for number in strangest if unknown[number]]
    findings = [
        Finding(CUT, column.path, column.name, statistics.cut, statistics.texts, cut),
        Finding(UNKNOWN, column.path, column.name, int(unknown.sum()), int((lengths - 2).sum()), strange),
    ]
    return findings, LengthAdvice(column.path, column.name, tokenizer.max_seq_length, statistics.covering_length)
