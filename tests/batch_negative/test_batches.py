"""Training batches: which pairs a step sees, their token ids, and the false-negative mask."""

import math
import random
from itertools import zip_longest

import numpy as np
import pytest

from batch_negative.batches import (
    LENGTH_SORT_BATCHES,
    BatchSchedule,
    FalseNegativeMask,
    PairBatch,
    PairBatcher,
    TokenizedTexts,
    batched,
    epoch_batches,
)
from data import TextPair, TextTokenizer
from helpers import random_texts, small_tokenizer


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (2, 1), (24, 4), (25, 4), (47, 8), (7, 100)])
def test_every_row_comes_once_an_epoch(count: int, batch_size: int, world_size: int) -> None:
    steps = epoch_batches(count, batch_size, seed=1, epoch=0, world_size=world_size)
    assert sorted(np.concatenate([rows for step in steps for rows in step]).tolist()) == list(range(count))
    assert len(steps) == math.ceil(count / (batch_size * world_size))
    assert all(len(step) == world_size for step in steps)
    assert all(len(rows) == batch_size for step in steps[:-1] for rows in step)
    sizes = [len(rows) for rows in steps[-1]]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


def test_fewer_rows_than_ranks_leave_ranks_without_any() -> None:
    (step,) = epoch_batches(2, 4, seed=0, epoch=0, world_size=5)
    assert sorted(map(len, step)) == [0, 0, 0, 1, 1]
    assert all(rows.dtype == np.int64 for rows in step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_pairs_of_similar_length_come_together_in_random_order(world_size: int) -> None:
    lengths = np.random.default_rng(0).integers(4, 100, 805)
    options = {"seed": 1, "epoch": 1, "world_size": world_size}
    plain, grouped = (
        [np.concatenate(ranks) for ranks in epoch_batches(805, 10, lengths=given, **options)]
        for given in (None, lengths)
    )
    assert sorted(np.concatenate(grouped)) == list(range(805))

    def padding(batches: list[np.ndarray]) -> int:
        return sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in batches)

    assert padding(grouped) < padding(plain) / 2
    windows = [grouped[start : start + LENGTH_SORT_BATCHES] for start in range(0, len(grouped), LENGTH_SORT_BATCHES)]
    means = [[lengths[rows].mean() for rows in window] for window in windows[:-1]]
    assert any(window != sorted(window) for window in means)


@pytest.mark.parametrize("world_size", [2, 8])
def test_ranks_get_pairs_of_similar_length(world_size: int) -> None:
    """In a collective all ranks wait for the one with the longest texts."""
    lengths = np.random.default_rng(0).integers(4, 64, 4096)
    steps = epoch_batches(4096, 64 // world_size, seed=0, epoch=0, world_size=world_size, lengths=lengths)
    slowest = sum(max(lengths[rows].sum() for rows in step) for step in steps)
    assert slowest * world_size < 1.05 * lengths.sum()


def test_a_pair_s_length_is_that_of_its_texts() -> None:
    tokenizer = small_tokenizer(64)
    texts = [[pair.query, pair.title, *pair.hard_negatives] for pair in PAIRS]
    expected = [sum(map(len, tokenizer.tokenize(texts_of_pair))) for texts_of_pair in texts]
    assert PairBatcher(tokenizer, PAIRS).lengths.tolist() == expected


def test_a_vocabulary_beyond_16_bits() -> None:
    words = [f"w{number}" for number in range(70_000)]
    tokenizer = TextTokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words], 8)
    texts = ["w1 w69999", "w65533"]
    assert [ids.tolist() for ids in TokenizedTexts(tokenizer, texts)] == tokenizer.tokenize(texts)


def test_the_shuffle_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, batch_size: int = 10, world_size: int = 1) -> list[int]:
        steps = epoch_batches(200, batch_size, seed=seed, epoch=epoch, world_size=world_size)
        in_turns = [row for step in steps for rows in zip_longest(*step) for row in rows]
        return [row for row in in_turns if row is not None]

    first = order(7, 0)
    np.random.seed(99)
    random.seed(99)
    assert order(7, 0) == first == order(7, 0, batch_size=50) == order(7, 0, batch_size=5, world_size=4)
    others = [order(7, 1), order(8, 0), order(0, 7), order(7, 2)]
    assert len({tuple(rows) for rows in [first, *others]}) == 5
    assert first != list(range(200))


def random_pairs(rng: random.Random, count: int) -> list[TextPair]:
    """Pairs over so few texts that queries, titles and hard negatives repeat and a text serves as all three."""
    texts = [f"text {number}" for number in range(12)]
    return [
        TextPair(rng.choice(texts[:8]), rng.choice(texts[4:]), tuple(rng.choices(texts, k=rng.choice([0, 0, 1, 3]))))
        for _ in range(count)
    ]


def ids_of(pairs: list[TextPair]) -> list[np.ndarray]:
    """The ids of queries, titles and hard negatives: equal for equal texts."""
    columns = [
        [pair.query for pair in pairs],
        [pair.title for pair in pairs],
        [text for pair in pairs for text in pair.hard_negatives],
    ]
    texts = sorted({text for column in columns for text in column})
    return [np.array([texts.index(text) for text in column], dtype=np.int64) for column in columns]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_false_negative_mask_equals_a_double_loop(seed: int, symmetric: bool) -> None:
    rng = random.Random(seed)
    pairs = random_pairs(rng, rng.randrange(1, 40))
    mask = FalseNegativeMask(*ids_of(pairs), symmetric)
    hard_negatives = [text for pair in pairs for text in pair.hard_negatives]
    queries, titles, negatives = (
        np.array(rng.choices(range(count), k=rng.randrange(1, 12) if count else 0), dtype=np.int64)
        for count in (len(pairs), len(pairs), len(hard_negatives))
    )
    columns = [pairs[row].title for row in titles] + [hard_negatives[number] for number in negatives]
    expected = np.zeros((len(queries), len(columns)), dtype=bool)
    for i, query_row in enumerate(queries):
        query = pairs[query_row].query
        for j, column in enumerate(columns):
            is_positive = any((pair.query, pair.title) == (query, column) for pair in pairs)
            is_reversed = any((pair.query, pair.title) == (column, query) for pair in pairs)
            expected[i, j] = is_positive or (symmetric and is_reversed) or column == query
    found = mask(queries, titles, negatives)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)


PAIRS = [
    TextPair("深度", "学习综述"),
    TextPair("图像", "医学图像", ("图像分割方法", "综述")),
    TextPair("深度", "学习", ("学习综述",)),  # its hard negative is another title of its query
    TextPair("方法", "综述"),
]


def batch_ids(batch: PairBatch) -> list[list[int]]:
    """Token ids of the batch's texts in their order, without padding."""
    padded = [row for input_ids, _ in batch.chunks for row in input_ids.tolist()]
    return [[token for token in padded[row] if token] for row in batch.row_of_text]


def test_pair_batcher_gathers_texts_and_mask() -> None:
    tokenizer = small_tokenizer()
    rows = np.array([2, 1, 0], dtype=np.int64)
    batch = PairBatcher(tokenizer, PAIRS)([rows])
    assert (batch.sizes, batch.rank) == ([(3, 3)], 0)
    queries, titles = ["深度", "图像", "深度"], ["学习", "医学图像", "学习综述"]
    assert batch_ids(batch) == tokenizer.tokenize([*queries, *titles, "学习综述", "图像分割方法", "综述"])
    np.testing.assert_array_equal(
        batch.mask,
        [
            [True, False, True, True, False, False],
            [False, True, False, False, False, False],
            [True, False, True, True, False, False],
        ],
    )


def test_pair_batcher_without_hard_negatives_and_without_mask() -> None:
    tokenizer, rows = small_tokenizer(), np.array([3, 0], dtype=np.int64)
    batch = PairBatcher(tokenizer, PAIRS)([rows])
    assert batch_ids(batch) == tokenizer.tokenize(["方法", "深度", "综述", "学习综述"])
    assert batch.mask.tolist() == [[True, False], [False, True]]
    assert PairBatcher(tokenizer, PAIRS, mask_false_negatives=False)([rows]).mask is None


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_chunks_hold_every_text_once_with_little_padding(count: int) -> None:
    tokenizer, texts = small_tokenizer(64), random_texts(3 * count, seed=count)
    pairs = [
        TextPair(*texts[3 * row : 3 * row + 2], tuple(texts[3 * row + 2 : 3 * row + 2 + row % 2]))
        for row in range(count)
    ]
    batch = PairBatcher(tokenizer, pairs)([np.arange(count)])
    negatives = [text for pair in pairs for text in pair.hard_negatives]
    expected = tokenizer.tokenize([pair.query for pair in pairs] + [pair.title for pair in pairs] + negatives)
    assert batch_ids(batch) == expected
    assert sorted(batch.row_of_text) == list(range(len(expected)))
    lengths = [input_ids.shape[1] for input_ids, _ in batch.chunks]
    assert lengths == sorted(lengths, reverse=True)
    for input_ids, token_type_ids in batch.chunks:
        assert input_ids.dtype == token_type_ids.dtype == np.int64
        assert input_ids.shape == token_type_ids.shape
        assert not token_type_ids.any()
        assert input_ids[:, -1].any()  # no wider than its longest text
    if count == 100:
        padded = sum(input_ids.size for input_ids, _ in batch.chunks)
        assert padded < 1.5 * sum(map(len, expected)) < max(lengths) * len(expected)


def test_a_schedule_gives_each_pair_a_step_in_each_epoch() -> None:
    """41 pairs in batches of 8, four batches a step: both divisions have a remainder."""
    schedule = BatchSchedule(41, 8, seed=0, epochs=2, gradient_accumulation_steps=4)
    steps = list(schedule.steps(0))
    assert [(step.number, step.epoch, len(step.batches)) for step in steps] == [
        (1, 1, 4),
        (2, 1, 2),
        (3, 2, 4),
        (4, 2, 2),
    ]
    assert [schedule.epoch_of(step.number) for step in steps] == [1, 1, 2, 2]
    assert [schedule.ends_epoch(step.number) for step in steps] == [False, True, False, True]
    for part in (steps[:2], steps[2:]):
        rows = [row for step in part for batch in step.batches for row in batch[0]]
        assert sorted(rows) == list(range(41))


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5])
def test_a_schedule_continues_after_any_step(first: int) -> None:
    schedule = BatchSchedule(41, 8, seed=0, epochs=1, max_steps=5, gradient_accumulation_steps=4, world_size=2)
    whole, rest = list(schedule.steps(0)), list(schedule.steps(first))
    assert schedule.total_steps == len(whole) == 5
    assert [step.number for step in rest] == list(range(first + 1, 6))
    for ours, theirs in zip(rest, whole[first:], strict=True):
        assert str(ours) == str(theirs)


def test_batched() -> None:
    assert list(batched(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []
