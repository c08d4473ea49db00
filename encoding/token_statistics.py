"""What a model can't see of texts: tokens beyond its maximum length, and words that its vocabulary lacks."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from common.logs import log
from data import TextTokenizer

SAMPLE = 2000  # texts that are looked at, evenly spaced; takes 0.1 s
MANY_CUT = 0.05  # of the texts; of titles with keywords, 2 % have more tokens than the original's 64
COVERED = 0.99  # of the texts have at most the length that a message names
MANY_UNKNOWN = 0.05  # of the tokens; it was 0.1 to 1 % of Chinese texts with ERNIE's vocabulary, 4 % of English ones
MOSTLY_UNKNOWN = 0.5  # of a text's tokens: the rest, often punctuation, doesn't tell texts apart
ALMOST_ALL = 0.9  # of the texts are mostly unknown: the vocabulary is of another language
FEWEST_TEXTS = 10  # to refuse; of fewer, a user may know what he does


class TokenStatistics(NamedTuple):
    """Counts and shares of a sample of texts."""

    cut: float  # share of the texts that have more tokens than max_seq_length
    covering_length: int  # max_seq_length that COVERED of the texts fit into
    unknown: float  # share of the tokens that are [UNK]
    mostly_unknown: float  # share of the texts that are mostly [UNK]
    example: str  # a text with the largest share of [UNK]


def token_statistics(tokenizer: TextTokenizer, texts: Sequence[str]) -> TokenStatistics:
    """The statistics of evenly spaced texts; texts: at least one."""
    step = -(-len(texts) // SAMPLE)
    sample = list(islice((texts[row] for row in range(0, len(texts), step)), SAMPLE))
    lengths, unknown = tokenizer.count(sample)
    shares = unknown / np.maximum(1, lengths - 2)  # without [CLS] and [SEP]
    return TokenStatistics(
        cut=float((lengths > tokenizer.max_seq_length).mean()),
        covering_length=int(np.quantile(lengths, COVERED, method="higher")),
        unknown=float(unknown.sum() / max(1, (lengths - 2).sum())),
        mostly_unknown=float((shares >= MOSTLY_UNKNOWN).mean()),
        example=sample[int(shares.argmax())],
    )


def report_tokens(tokenizer: TextTokenizer, texts_by_name: Mapping[str, Sequence[str]]) -> None:
    """Logs the shares of cut texts and of unknown tokens, if they are large.

    texts_by_name: a name, in the plural, and its texts. Raises InputError if almost all of them are mostly unknown.
    """
    for name, texts in texts_by_name.items():
        if texts:
            _report(tokenizer, texts, name)


def _report(tokenizer: TextTokenizer, texts: Sequence[str], name: str) -> None:
    statistics = token_statistics(tokenizer, texts)
    if statistics.cut >= MANY_CUT:
        limit = f"are cut to {tokenizer.max_seq_length} tokens"
        remedy = f"--max_seq_length {statistics.covering_length} covers {100 * COVERED:.0f} %"
        log(f"{100 * statistics.cut:.0f} % of the {name} {limit}; {remedy}")
    unknown = (
        f"{100 * statistics.unknown:.0f} % of the tokens of the {name} are [UNK], as in {statistics.example[:40]!r}"
    )
    remedy = "use a model whose vocabulary fits the language"
    if statistics.mostly_unknown >= ALMOST_ALL and len(texts) >= FEWEST_TEXTS:
        raise InputError(f"{unknown}: the model can't tell them apart; {remedy}")
    if statistics.unknown >= MANY_UNKNOWN:
        log(f"{unknown}; {remedy}")
