"""Which hits of a search are hard negatives of a training pair. Imports no Paddle."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from common.texts import TextSet
from data import TextPair
from retrieval.near_duplicates import are_near_duplicates, terms_of

# Why a hit is no hard negative; each one counts under the first that holds.
REASONS = EARLY_RANK, OWN_TEXT, POSITIVE, UNSCORED, TOO_SIMILAR, NEAR_DUPLICATE = (
    "of a rank before --from_rank",
    "that are the query's own text",
    "that are known positives of the query",
    "without a score of the teacher, or whose positive has none",
    "above --max_relative_score of the positive's score",
    "that are near-duplicates of a positive or of the query",
)


class MiningRules(NamedTuple):
    """Which and how many hard negatives a pair gets."""

    negatives: int = 1  # for each pair
    from_rank: int = 1  # ranks are those of the search, from 1
    to_rank: int = 100
    max_relative_score: float = 0.95  # see `score_limits`; NV-Retriever's value
    random_share: float = 0.0  # of the negatives is drawn at random, the others are the first ones
    seed: int = 0

    def check(self) -> None:
        """Raises InputError if the values don't fit together."""
        if self.random_share > 1:
            raise InputError(f"--random_share {self.random_share}: is a share; give 0 to 1")
        if self.negatives > self.to_rank - self.from_rank + 1:
            ranks = f"--from_rank {self.from_rank} to --to_rank {self.to_rank}"
            raise InputError(f"--negatives {self.negatives}: {ranks} has fewer hits; raise --to_rank")


def score_limits(positive_scores: np.ndarray, max_relative_score: float) -> np.ndarray:
    """The highest scores of negatives: a share of the positives' (NV-Retriever, arXiv:2407.15831, TopK-PercPos).

    A share of a score below 0 would be above it; there the limit is as far below. float32 [N] each.
    """
    return positive_scores - (1 - max_relative_score) * np.abs(positive_scores)


class _RowsById:
    """Finds the rows that have an id. ids: int64 [N], one per row."""

    def __init__(self, ids: np.ndarray) -> None:
        self._rows = np.argsort(ids, kind="stable")
        self._ids = ids[self._rows]

    def __call__(self, wanted: int) -> list[int]:
        first, end = np.searchsorted(self._ids, [wanted, wanted + 1])
        return self._rows[first:end].tolist()


class KnownPositives:
    """What is no negative of a query, as the pairs of a training file say: all titles of the query.

    query_ids, title_ids: int64 [N], equal for the same texts; symmetric: the queries that a text is the title of are
    positives of it, too, see `batch_negative.batches.FalseNegativeMask`. lowercase: see `text_key`.
    """

    def __init__(
        self,
        pairs: Sequence[TextPair],
        query_ids: np.ndarray,
        title_ids: np.ndarray,
        symmetric: bool,
        lowercase: bool = True,
    ) -> None:
        self.symmetric = symmetric
        self._pairs, self._query_ids, self._lowercase = pairs, query_ids, lowercase
        self._rows_of_query = _RowsById(query_ids)
        self._rows_of_title = _RowsById(title_ids) if symmetric else None

    def of(self, row: int) -> "QueryPositives":
        """Those of the query of a pair, with the query itself. row: of the pair."""
        query_id = self._query_ids[row]
        texts = [self._pairs[each].title for each in self._rows_of_query(query_id)]
        if self._rows_of_title:
            texts += [self._pairs[each].query for each in self._rows_of_title(query_id)]
        return QueryPositives(self._pairs[row].query, texts, self._lowercase)


class QueryPositives:
    """A query and its known positives, and why a document is too close to them. lowercase: see `text_key`."""

    def __init__(self, query: str, positives: Sequence[str], lowercase: bool = True) -> None:
        self._query = TextSet([query], lowercase)
        self._positives = TextSet(positives, lowercase)
        self._terms = [terms_of(text) for text in (query, *self._positives)]

    def reason(self, document: str, score: float, limit: float) -> str | None:
        """Why the document is no hard negative, one of REASONS; None if it is one. limit: the highest score allowed."""
        if self._query.find(document) is not None:
            return OWN_TEXT
        if self._positives.find(document) is not None:
            return POSITIVE
        if math.isnan(score) or math.isnan(limit):
            return UNSCORED
        if score > limit:
            return TOO_SIMILAR
        terms = terms_of(document)  # last, as it takes the longest
        return NEAR_DUPLICATE if any(are_near_duplicates(terms, other) for other in self._terms) else None


class PairHits(NamedTuple):
    """The hits of a pair's query, best first, and what their scores are compared with."""

    ids: Sequence[int]  # of documents
    scores: Sequence[float]  # by the search, or by a teacher: then they needn't go down
    limit: float  # the highest score of a negative


def choose_negatives(
    hits: PairHits,
    documents: Sequence[str],
    positives: QueryPositives,
    rules: MiningRules,
    row: int,
    left_out: Counter[str],
) -> list[int]:
    """The places of a pair's hard negatives in its hits: the first, then those at random; fewer if hits are used up.

    documents: by id; row: of the pair, which together with the seed decides on what is random. Counts in left_out why
    hits that were looked at are none.
    """
    start = min(rules.from_rank - 1, len(hits.ids))
    left_out[EARLY_RANK] += start

    def is_negative(place: int) -> bool:
        reason = positives.reason(documents[hits.ids[place]], hits.scores[place], hits.limit)
        if reason:
            left_out[reason] += 1
        return reason is None

    places = iter(range(start, len(hits.ids)))
    rng = np.random.default_rng([rules.seed, row]) if rules.random_share else None
    # Rounded up or down at random, so that half of the pairs with one negative have a random one at a share of 0.5.
    random_count = math.floor(rules.negatives * rules.random_share + rng.random()) if rng else 0
    chosen = list(islice(filter(is_negative, places), rules.negatives - random_count))
    if rng:
        others = filter(is_negative, rng.permutation(list(places)).tolist())
        chosen += islice(others, rules.negatives - len(chosen))
    return chosen
