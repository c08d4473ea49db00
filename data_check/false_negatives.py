"""How many false negatives a batch holds. Imports no Paddle."""

from typing import NamedTuple

import numpy as np

from batch_negative.batches import FalseNegativeMask

BATCH_SIZES = (64, 512, 4096)
SHIFT = 32  # bits: two ids as one number


class BatchEstimate(NamedTuple):
    """How many of the negatives of a random batch are likely to answer their query, on average."""

    batch_size: int
    without_mask: float  # titles that some pair gives the query, and their near-duplicates
    with_mask: float  # the near-duplicates alone, which the mask doesn't know

    @property
    def negatives(self) -> int:
        """The number of queries times that of the other titles of each."""
        return self.batch_size * (self.batch_size - 1)


def estimate_batches(query_ids: np.ndarray, title_ids: np.ndarray, groups: np.ndarray) -> list[BatchEstimate]:
    """What batches of BATCH_SIZES hold on average, as far as the file has so many pairs.

    query_ids, title_ids: int64 [pairs], equal for the same text; groups: int64, for each id the same as for the ids of
    its near-duplicates.
    """
    pairs = len(query_ids)
    symmetric = FalseNegativeMask(query_ids, title_ids, np.empty(0, np.int64)).symmetric
    known = count_answers(query_ids, title_ids, np.arange(len(groups)), symmetric)
    answers = count_answers(query_ids, title_ids, groups, symmetric)
    return [
        BatchEstimate(size, answers * share, (answers - known) * share)
        for size in BATCH_SIZES
        if size <= pairs
        # A query and another pair's title are in a batch together with this probability.
        for share in [size * (size - 1) / (pairs * (pairs - 1))]
    ]


def count_answers(query_ids: np.ndarray, title_ids: np.ndarray, groups: np.ndarray, symmetric: bool) -> int:
    """How many titles of other pairs answer the queries of all pairs: what the mask of the whole file would hide.

    A title answers a query if its group is that of one of the query's titles, or of the query itself; symmetric: also
    if it is that of a text whose title the query is. query_ids, title_ids, groups: see `estimate_batches`; with a group
    for each id, these are the titles that `FalseNegativeMask` masks.
    """
    texts, keys = [query_ids, query_ids], [groups[title_ids], groups[query_ids]]
    if symmetric:
        texts, keys = [*texts, title_ids], [*keys, groups[query_ids]]
    answers = np.unique(np.concatenate(texts) << SHIFT | np.concatenate(keys))
    queries = np.bincount(query_ids, minlength=len(groups))
    titles = np.bincount(groups[title_ids], minlength=len(groups))
    total = (queries[answers >> SHIFT] * titles[answers & ((1 << SHIFT) - 1)]).sum()
    return int(total) - len(query_ids)  # without each pair's own title
