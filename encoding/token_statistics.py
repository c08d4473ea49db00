"""What a model can't see of texts: tokens beyond its maximum length, and words that its vocabulary lacks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from common.logs import log
from data import TextTokenizer

SAMPLE = 2000  # texts that are looked at; takes 0.1 s
MANY_CUT = 0.05  # of the texts; of titles with keywords, 2 % have more tokens than the original's 64
COVERED = 0.99  # of the texts have at most the length that a message names
MANY_UNKNOWN = 0.05  # of the tokens; it was 0.1 to 1 % of Chinese texts with ERNIE's vocabulary, 4 % of English ones
MOSTLY_UNKNOWN = 0.5  # of a text's tokens: the rest, often punctuation, doesn't tell texts apart
ALMOST_ALL = 0.9  # of the texts are mostly unknown: the vocabulary is of another language
FEWEST_FOR_PERCENT = 100
FEWEST_TEXTS = 10  # to refuse; of fewer, a user may know what he does


class TokenStatistics(NamedTuple):
    """What a model can't see of a sample of texts."""

    texts: int
    cut: int  # texts that have more tokens than max_seq_length
    covering_length: int  # max_seq_length that COVERED of the texts fit into
    unknown: float  # share of the tokens that are [UNK]
    mostly_unknown: int  # texts of which MOSTLY_UNKNOWN of the tokens are [UNK]
    example: str  # a text with the largest share of [UNK]


def token_statistics(tokenizer: TextTokenizer, texts: Sequence[str], role: str | None = None) -> TokenStatistics:
    """The statistics of a random sample, the same in each call; texts: at least one.

    role: see `TextTokenizer.prefixed`; a prefix counts for the length alone.
    """
    sample = [texts[row] for row in sample_rows(len(texts)).tolist()]
    return statistics_of_counts(tokenizer, sample, *tokenizer.count(sample), role)


def statistics_of_counts(
    tokenizer: TextTokenizer, sample: Sequence[str], lengths: np.ndarray, unknown: np.ndarray, role: str | None = None
) -> TokenStatistics:
    """The statistics of all texts of a sample. lengths, unknown: int64 [N] each, what the tokenizer counts of them."""
    shares = _unknown_shares(lengths, unknown)
    prefixed_lengths = lengths + tokenizer.prefix_length(role)
    return TokenStatistics(
        texts=len(sample),
        cut=int((prefixed_lengths > tokenizer.max_seq_length).sum()),
        covering_length=int(np.quantile(prefixed_lengths, COVERED, method="higher")),
        unknown=float(unknown.sum() / max(1, (lengths - 2).sum())),
        mostly_unknown=int((shares >= MOSTLY_UNKNOWN).sum()),
        example=sample[int(shares.argmax())],
    )


def sample_rows(count: int, size: int = SAMPLE) -> np.ndarray:
    """Rows of `count` texts that stand for all, in order, the same in each call: int64 [at most `size`]."""
    return np.sort(np.random.default_rng(0).choice(count, min(count, size), replace=False))


def count_unseen(tokenizer: TextTokenizer, texts: Sequence[str], role: str | None = None) -> tuple[int, int]:
    """How many texts of a role are cut, and how many mostly unknown, see TokenStatistics; of all texts."""
    lengths, unknown = tokenizer.count(texts)
    mostly_unknown = _unknown_shares(lengths, unknown) >= MOSTLY_UNKNOWN
    room = tokenizer.max_seq_length - tokenizer.prefix_length(role)
    return int((lengths > room).sum()), int(mostly_unknown.sum())


def _unknown_shares(lengths: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    return unknown / np.maximum(1, lengths - 2)  # without [CLS] and [SEP]


def report_tokens(
    tokenizer: TextTokenizer, texts_by_name: Mapping[str, Sequence[str]], role: str | None = None
) -> None:
    """Logs the shares of cut texts and of unknown tokens, if they are large.

    texts_by_name: a name, in the plural, and its texts, which all have this role. Raises InputError if almost all of
    them are mostly unknown.
    """
    for name, texts in texts_by_name.items():
        if texts:
            _report(token_statistics(tokenizer, texts, role), name, tokenizer.max_seq_length)


def _report(statistics: TokenStatistics, name: str, max_seq_length: int) -> None:
    if statistics.cut >= MANY_CUT * statistics.texts:
        remedy = f"--max_seq_length {statistics.covering_length} covers {100 * COVERED:.0f} % of them"
        log(f"{_share(statistics.cut, statistics.texts)} {name} are cut to {max_seq_length} tokens; {remedy}")
    unknown = f"{100 * statistics.unknown:.0f} % of the tokens of {name} are [UNK], as in {statistics.example[:40]!r}"
    remedy = "use a model whose vocabulary fits the language"
    if statistics.mostly_unknown >= ALMOST_ALL * statistics.texts and statistics.texts >= FEWEST_TEXTS:
        raise InputError(f"{unknown}: the model can't tell them apart; {remedy}")
    if statistics.unknown >= MANY_UNKNOWN:
        log(f"{unknown}; {remedy}")


def _share(count: int, total: int) -> str:
    return f"{count} of {total}" if total < FEWEST_FOR_PERCENT else f"{100 * count / total:.0f} % of the"
