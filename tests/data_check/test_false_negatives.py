"""Estimates of false negatives against the mask that training uses."""

import numpy as np
import pytest

from batch_negative.batches import FalseNegativeMask
from data_check.false_negatives import count_answers, estimate_batches


@pytest.mark.parametrize("symmetric", [False, True])
def test_count_is_that_of_the_mask(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    query_ids, title_ids = rng.integers(30, size=(2, 200))
    mask = FalseNegativeMask(query_ids, title_ids, np.empty(0, np.int64), symmetric)
    rows = np.arange(200)
    masked = int(mask(rows, rows, rows[:0]).sum()) - 200
    assert count_answers(query_ids, title_ids, np.arange(30), symmetric) == masked > 200


def test_groups_count_as_one_text() -> None:
    query_ids, title_ids, groups = np.array([0, 1, 2]), np.array([3, 4, 5]), np.array([0, 1, 2, 3, 3, 5])
    assert count_answers(query_ids, title_ids, np.arange(6), symmetric=False) == 0
    assert count_answers(query_ids, title_ids, groups, symmetric=False) == 2  # titles 3 and 4 are nearly the same


def test_estimates_are_means_over_batches() -> None:
    rng = np.random.default_rng(1)
    query_ids, title_ids = rng.permutation(150), rng.integers(150, 180, size=150)
    groups = np.minimum(np.arange(180), 175)  # the last titles are near-duplicates
    (estimate,) = estimate_batches(query_ids, title_ids, groups)  # there are less than 512 pairs
    mask = FalseNegativeMask(query_ids, title_ids, np.empty(0, np.int64))
    near = FalseNegativeMask(query_ids, groups[title_ids], np.empty(0, np.int64))
    sums = []
    for _ in range(300):
        rows = rng.choice(150, 64, replace=False)
        known, answers = (each(rows, rows, rows[:0]).sum() - 64 for each in (mask, near))
        sums.append((answers, answers - known))
    assert estimate.batch_size == 64
    assert estimate.negatives == 64 * 63
    assert np.mean(sums, axis=0) == pytest.approx([estimate.without_mask, estimate.with_mask], rel=0.05)
    assert estimate.without_mask > estimate.with_mask > 0
