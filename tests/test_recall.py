"""A corpus cut over the ranks is searched as one index."""

from itertools import pairwise

import numpy as np
import pytest

import recall
from ann_util import build_index
from recall import ShardedIndex


@pytest.mark.parametrize("k", [1, 3, 40, 100])
@pytest.mark.parametrize("cuts", [(0, 30, 60), (0, 1, 60), (0, 0, 60), (0, 20, 40, 60)])
def test_shards_answer_as_one_index(monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...], k: int) -> None:
    """Also where vectors repeat, and where a rank has fewer than k of them, or none; cosines here have no rounding."""
    vectors = np.random.default_rng(1).choice(np.float32([-0.25, 0.25]), (60, 16))
    vectors[40:] = vectors[:20]
    queries = vectors[::7]

    def exact(share: np.ndarray) -> object:
        return build_index("exact", share)

    shares = [slice(start, stop) for start, stop in pairwise(cuts)]
    sent: list[list[np.ndarray]] = []  # by each rank, in the order of its gathers
    for rows in shares:
        mine: list[np.ndarray] = []
        monkeypatch.setattr(recall, "gather_arrays", lambda own, mine=mine: [mine.append(own), own][1:])
        ShardedIndex(exact, vectors[rows], rows, 60).search(queries, k)
        sent.append(mine)
    gathers = iter(zip(*sent, strict=True))
    monkeypatch.setattr(recall, "gather_arrays", lambda own: list(next(gathers)))
    ids, similarities = ShardedIndex(exact, vectors[shares[0]], shares[0], 60).search(queries, k)
    expected_ids, expected_similarities = exact(vectors).search(queries, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(similarities, expected_similarities)
