"""Intervals and p-values against the obvious computation and against known results."""

from itertools import product

import numpy as np
import pytest

from retrieval import significance
from retrieval.significance import bootstrap_intervals, randomization_test


def test_the_interval_is_that_of_a_normal_mean() -> None:
    """Of many normal values, mean ± 1.96 standard errors."""
    values = np.random.default_rng(1).normal([0.5, 0.2], [0.1, 0.05], (2000, 2))
    low, high = bootstrap_intervals(values)
    error = 1.96 * values.std(axis=0) / np.sqrt(len(values))
    np.testing.assert_allclose(low, values.mean(axis=0) - error, atol=0.1 * error.max())
    np.testing.assert_allclose(high, values.mean(axis=0) + error, atol=0.1 * error.max())


def test_equal_values_have_no_width_and_repeat() -> None:
    low, high = bootstrap_intervals(np.full((7, 1), 0.25))
    assert (low, high) == (0.25, 0.25)
    values = np.random.default_rng(2).random((50, 3))
    assert np.array_equal(bootstrap_intervals(values), bootstrap_intervals(values))


def test_the_p_value_is_the_share_of_all_swaps() -> None:
    """With few queries, all swaps can be counted."""
    rng = np.random.default_rng(3)
    values, others = rng.random((10, 2)), rng.random((10, 2)) - [0.3, 0]
    differences = values - others
    signs = np.array(list(product([1, -1], repeat=10)))
    exact = (np.abs(signs @ differences) >= np.abs(differences.sum(axis=0)) - 1e-9).mean(axis=0)
    np.testing.assert_allclose(randomization_test(values, others), exact, atol=0.02)
    assert exact[0] < 0.05 < exact[1]


def test_equal_searches_differ_by_chance_alone() -> None:
    values = np.random.default_rng(4).random((20, 1))
    assert randomization_test(values, values) == 1


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_blocks_change_nothing_but_the_random_numbers(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(significance, "BLOCK_VALUES", block)
    values = np.random.default_rng(5).random((200, 1))
    low, high = bootstrap_intervals(values)
    assert low < values.mean() < high
    assert randomization_test(values, values - 0.2) == pytest.approx(1 / (significance.PERMUTATIONS + 1))
