"""Where a search does well and where it fails: groups of queries, the worst ones, what was judged wrong in error.

Imports no Paddle.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from retrieval.metrics import JudgedQuery, Judgement
from retrieval.near_duplicates import NEAR_DUPLICATE, jaccard, terms_of

# Groups: label -> the least value.
POSITIVE_COUNTS = {"1": 1, "2": 2, "3–5": 3, "6–10": 6, "> 10": 11}
ABOVE_0 = math.nextafter(0, 1)
OVERLAPS = {"0 %": 0.0, "1–24 %": ABOVE_0, "25–49 %": 0.25, "50–74 %": 0.5, "75–99 %": 0.75, "100 %": 1.0}
SUSPECTED_RANKS = 10  # hits of a query that are compared with its titles
HISTOGRAM_BINS = 40
CURVE_POINTS = 50


class Group(NamedTuple):
    """Queries that have something in common."""

    label: str  # the range of a number
    rows: np.ndarray  # of the queries, int64


class Suspect(NamedTuple):
    """A hit that counts as wrong, but is a near-duplicate of a title: perhaps a false negative of the pairs."""

    row: int  # of the query
    rank: int  # of the hit, from 1
    document: str
    title: str
    similarity: float  # Jaccard, of the terms


class ScoreDistributions(NamedTuple):
    """How the scores of right and of wrong hits are distributed."""

    edges: np.ndarray  # of the bins, float64 [HISTOGRAM_BINS + 1]
    right: np.ndarray  # share of the right hits in each bin, float64 [HISTOGRAM_BINS]
    wrong: np.ndarray
    right_median: float
    wrong_median: float


def by_query_length(judged: Sequence[JudgedQuery]) -> list[Group]:
    """Four groups of about equal size, by the number of characters of the query; fewer if many are equally long."""
    lengths = np.array([len(each.query) for each in judged])
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="higher"))
    starts = [int(lengths.min()), *(int(edge) for edge in edges if edge > lengths.min())]
    ends = [start - 1 for start in starts[1:]] + [int(lengths.max())]
    labels = [f"{start}–{end}" if start < end else str(start) for start, end in zip(starts, ends, strict=True)]
    return _groups(lengths, dict(zip(labels, starts, strict=True)))


def by_positive_count(judged: Sequence[JudgedQuery]) -> list[Group]:
    """Groups by the number of a query's titles, see POSITIVE_COUNTS."""
    return _groups(np.array([len(each.titles) for each in judged]), POSITIVE_COUNTS)


def by_overlap(judged: Sequence[JudgedQuery]) -> list[Group]:
    """Groups by `overlap`, see OVERLAPS."""
    return _groups(np.array([overlap(each) for each in judged]), OVERLAPS)


def _groups(values: np.ndarray, starts: Mapping[str, float]) -> list[Group]:
    """The groups that aren't empty. starts: label -> the least value of the group, ascending."""
    numbers = np.searchsorted(list(starts.values()), values, side="right") - 1
    groups = [Group(label, np.flatnonzero(numbers == number)) for number, label in enumerate(starts)]
    return [group for group in groups if len(group.rows)]


def overlap(judged: JudgedQuery) -> float:
    """The share of the query's terms that a title has, from 0 to 1; of several titles, that with the most."""
    terms = terms_of(judged.query)
    return max(len(terms & terms_of(title)) for title in judged.titles) / max(1, len(terms))


def curve_cutoffs(judgements: Sequence[Judgement]) -> np.ndarray:
    """At most CURVE_POINTS values of K, from 1 to the most documents that a query found; int64 [P]."""
    longest = max(len(each.documents) for judgement in judgements for each in judgement.queries)
    return np.unique(np.geomspace(1, max(1, longest), CURVE_POINTS).round().astype(np.int64))


def recall_curve(judgement: Judgement, cutoffs: np.ndarray) -> np.ndarray:
    """Recall@K of each query, float64 [Q, P]. cutoffs: the values of K, int64 [P]."""
    recalls = np.zeros((len(judgement.queries), len(cutoffs)))
    for row, each in zip(recalls, judgement.queries, strict=True):
        found = np.cumsum([0, *(document in each.titles for document in each.documents)])
        row[:] = found[np.minimum(cutoffs, len(each.documents))] / len(each.titles)
    return recalls


def worst_first(judged: Sequence[JudgedQuery], ndcg: Sequence[float]) -> list[int]:
    """The rows of the queries whose first hit is wrong, worst first: by the rank of the first right one, then nDCG."""
    ranks = [each.first_rank or math.inf for each in judged]
    return sorted((row for row, rank in enumerate(ranks) if rank > 1), key=lambda row: (-ranks[row], ndcg[row]))


def suspected_false_negatives(judged: Iterable[JudgedQuery]) -> list[Suspect]:
    """The wrong hits among the first SUSPECTED_RANKS that are near-duplicates of a title, most similar first."""
    terms = cache(terms_of)  # titles and documents are those of many queries
    suspects = []
    for row, each in enumerate(judged):
        for rank, document in enumerate(each.documents[:SUSPECTED_RANKS], 1):
            if document in each.titles:
                continue
            similarity, title = max((jaccard(terms(title), terms(document)), title) for title in each.titles)
            if similarity >= NEAR_DUPLICATE:
                suspects.append(Suspect(row, rank, document, title, similarity))
    return sorted(suspects, key=lambda suspect: -suspect.similarity)


def score_distributions(judged: Iterable[JudgedQuery]) -> ScoreDistributions | None:
    """The distributions of the hits' scores; None without right or without wrong hits."""
    judged = [each for each in judged if each.scores]
    scores = np.array([score for each in judged for score in each.scores])
    is_right = np.array([document in each.titles for each in judged for document in each.documents], bool)
    if not is_right.any() or is_right.all():
        return None
    edges = np.histogram_bin_edges(scores, HISTOGRAM_BINS)
    right, wrong = scores[is_right], scores[~is_right]
    shares = [np.histogram(part, edges)[0] / len(part) for part in (right, wrong)]
    return ScoreDistributions(edges, shares[0], shares[1], float(np.median(right)), float(np.median(wrong)))


def changed_most(values: np.ndarray, others: np.ndarray, count: int) -> tuple[list[int], list[int]]:
    """The rows in which `values` exceed `others` most, and those in which they fall behind most; float64 [Q] each."""
    differences = values - others
    better, worse = (np.argsort(sign * differences, kind="stable") for sign in (-1, 1))
    return better[differences[better] > 0][:count].tolist(), worse[differences[worse] < 0][:count].tolist()
