"""How sure the mean of a metric is, and the difference of two means over the same queries. Imports no Paddle."""

import numpy as np

RESAMPLES = 1000
PERMUTATIONS = 10_000
CONFIDENCE = 0.95
SEED = 0
BLOCK_VALUES = 1 << 22  # random numbers at a time


def bootstrap_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper ends of the percentile bootstrap's interval of each mean (Efron and Tibshirani 1993, ch. 13).

    values: of each query, float64 [Q, M]. Draws Q queries with replacement, RESAMPLES times; of the means, CONFIDENCE
    lie in the interval. Returns float64 [M] twice, the same for the same values.
    """
    queries = len(values)
    rng = np.random.default_rng(SEED)
    means = [
        np.stack([np.bincount(row, minlength=queries) for row in rng.integers(queries, size=(size, queries))]) @ values
        for size in _block_sizes(RESAMPLES, queries)
    ]
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means) / queries, [outside, 1 - outside], axis=0)
    return low, high


def randomization_test(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The two-sided p-value of each difference of means, by Fisher's randomization test.

    Smucker, Allan and Carterette 2007 (doi:10.1145/1321440.1321528) recommend it for comparing two searches: if both
    were equally good, each query's two values could be swapped. values, others: of the same queries, float64 [Q, M].
    PERMUTATIONS random swaps; the smallest p-value is 1 / (PERMUTATIONS + 1). Returns float64 [M].
    """
    differences = values - others
    queries = len(differences)
    rng = np.random.default_rng(SEED)
    observed = np.abs(differences.sum(axis=0))
    at_least = np.zeros(differences.shape[1], np.int64)
    for size in _block_sizes(PERMUTATIONS, queries):
        swapped = rng.integers(2, size=(size, queries), dtype=np.int8)
        sums = differences.sum(axis=0) - 2 * (swapped.astype(np.float64) @ differences)
        at_least += (np.abs(sums) >= observed - 1e-9).sum(axis=0)  # equal sums may differ in their last digits
    return (at_least + 1) / (PERMUTATIONS + 1)


def _block_sizes(total: int, queries: int) -> list[int]:
    """Parts of `total` rows with a number for each query, such that memory stays small."""
    block = max(1, BLOCK_VALUES // queries)
    return [min(block, total - start) for start in range(0, total, block)]
