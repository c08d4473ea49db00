"""Training batches: which pairs a step sees, their token ids, and the false-negative mask. Imports no Paddle."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from common.errors import InputError
from common.logs import progress_bar
from common.texts import DOCUMENT, QUERY
from data import SORTING_WINDOW, TextPair, TextTokenizer, TokenIds

Item = TypeVar("Item")

# Padding was measured on classical Chinese sentences of 30 tokens on average.
CHUNKS_PER_BATCH = 4  # pads them to 36 tokens on average; 1 chunk to 64, 8 chunks to 33
# Paraphrases are written down both ways for all pairs or for none. Among 150,000 pairs of queries and titles there was
# no pair whose query is also a title of its title.
SYMMETRIC_SHARE = 0.01
LENGTH_SORT_BATCHES = 4  # batches that --group_by_length sorts together: pads to 32.6 tokens; 32 batches to 32.1


class ScoredDocuments(NamedTuple):
    """Which documents of a batch the teacher has scored for each of its P queries: the title, then the hard negatives.

    Queries with fewer than M documents are padded.
    """

    columns: np.ndarray  # int64 [P, M], places among the documents of all ranks: the titles, then the hard negatives
    scores: np.ndarray  # float32 [P, M]
    is_document: np.ndarray  # bool [P, M], False for padding


class PairBatch(NamedTuple):
    """What one rank encodes for a batch, and how its vectors are scored.

    A rank's B pairs with H hard negatives in all have T = 2 B + H texts in the order queries, titles, hard negatives.
    The queries of all ranks in `sizes` are scored against all their titles and hard negatives.
    """

    chunks: list[TokenIds]  # this rank's texts, longest first
    row_of_text: np.ndarray  # int64 [T], the row of each text in the concatenated chunks
    sizes: list[tuple[int, int]]  # (B, H) of each of the ranks that are scored together
    rank: int  # this rank's position in sizes; 0 if it is scored alone
    # bool [sum of B, sum of B + sum of H], True where a text is no negative of the query; the diagonal is ignored
    mask: np.ndarray | None
    teacher: ScoredDocuments | None  # None if the training file has no scores

    @property
    def text_counts(self) -> list[int]:
        """Number of texts of each rank."""
        return [2 * pairs + hard_negatives for pairs, hard_negatives in self.sizes]

    def split(self, rows: Any, rank: int) -> tuple[Any, Any, Any]:
        """Splits an array or tensor [T, ...] of a rank into the rows of its queries, titles and hard negatives."""
        pairs, _ = self.sizes[rank]
        return rows[:pairs], rows[pairs : 2 * pairs], rows[2 * pairs :]


class FalseNegativeMask:
    """Which texts of a batch are no negatives of a query: its own text, and those that any pair gives as its title.

    query_ids, title_ids: int64 [N]; hard_negative_ids: int64 [H], of all pairs; equal for texts with equal tokens.
    symmetric: whether the query of a pair is a title of its title, too; None: whether SYMMETRIC_SHARE of the pairs say
    so.
    """

    def __init__(
        self, query_ids: np.ndarray, title_ids: np.ndarray, hard_negative_ids: np.ndarray, symmetric: bool | None = None
    ) -> None:
        self._query_ids, self._title_ids, self._hard_negative_ids = query_ids, title_ids, hard_negative_ids
        self._text_count = int(max(query_ids.max(), title_ids.max(), hard_negative_ids.max(initial=0))) + 1
        # Each (query, title) of the file as one number, sorted, so that many can be looked up at once.
        positives = np.unique(self._combined(query_ids, title_ids))
        reversed_positives = self._combined(title_ids, query_ids)
        self.reversed_share = float((_is_in(reversed_positives, positives) & (query_ids != title_ids)).mean())
        self.symmetric = self.reversed_share >= SYMMETRIC_SHARE if symmetric is None else symmetric
        self._positives = np.union1d(positives, reversed_positives) if self.symmetric else positives

    def __call__(self, query_rows: np.ndarray, title_rows: np.ndarray, hard_negative_rows: np.ndarray) -> np.ndarray:
        """The mask, bool [len(query_rows), len(title_rows) + len(hard_negative_rows)].

        query_rows, title_rows: pairs of the training file; hard_negative_rows: places in hard_negative_ids. A query's
        own title is True too: the loss ignores the diagonal.
        """
        columns = np.concatenate([self._title_ids[title_rows], self._hard_negative_ids[hard_negative_rows]])[None, :]
        queries = self._query_ids[query_rows][:, None]
        return _is_in(self._combined(queries, columns), self._positives) | (queries == columns)

    def _combined(self, query_ids: np.ndarray, title_ids: np.ndarray) -> np.ndarray:
        return query_ids * self._text_count + title_ids


def _is_in(values: np.ndarray, values_in_order: np.ndarray) -> np.ndarray:
    """Whether each value is among the sorted ones."""
    positions = np.searchsorted(values_in_order, values)
    return values_in_order[np.minimum(positions, len(values_in_order) - 1)] == values


class TokenizedTexts:
    """The token ids of many texts, in one array of the smallest possible dtype."""

    def __init__(self, tokenizer: TextTokenizer, texts: Sequence[str]) -> None:
        dtype = np.min_scalar_type(tokenizer.vocabulary_size)
        tokens, lengths = [], []
        with progress_bar(len(texts), "tokenizing", "text") as progress:
            for window in batched(texts, SORTING_WINDOW):  # because Python's lists of ids take much memory
                token_ids = tokenizer.tokenize(window)
                tokens.append(np.fromiter(chain.from_iterable(token_ids), dtype))
                lengths.append(np.array([len(text_ids) for text_ids in token_ids]))
                progress.update(len(window))
        self.lengths = np.concatenate(lengths)
        self._tokens = np.concatenate(tokens)
        self._ends = np.cumsum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._tokens[self._ends[row] - self.lengths[row] : self._ends[row]]

    def ids(self) -> np.ndarray:
        """A number for each text, int64 [N], equal for texts with equal tokens."""
        id_of_tokens: dict[bytes, int] = {}
        rows = (self[row].tobytes() for row in range(len(self)))
        return np.array([id_of_tokens.setdefault(tokens, len(id_of_tokens)) for tokens in rows])


class _ScoresOfPairs:
    """The teacher's scores of a training file: makes a batch's from rows of the file."""

    def __init__(self, pairs: Sequence[TextPair]) -> None:
        self._scores = np.fromiter(chain.from_iterable(pair.teacher_scores for pair in pairs), dtype=np.float32)
        self._starts = np.cumsum([0, *(len(pair.teacher_scores) for pair in pairs)])

    def __call__(self, rows: np.ndarray) -> ScoredDocuments:
        """The scores of a batch; rows: int64 [P], of all its pairs."""
        starts, counts = self._starts[rows], np.diff(self._starts)[rows]
        places = np.arange(max(2, counts.max()))  # a column of hard negatives, even if it is all padding
        is_document = places < counts[:, None]
        is_hard_negative = is_document[:, 1:]
        columns = np.zeros(is_document.shape, dtype=np.int64)
        columns[:, 0] = np.arange(len(rows))
        columns[:, 1:][is_hard_negative] = len(rows) + np.arange(is_hard_negative.sum())
        scores = np.zeros(is_document.shape, dtype=np.float32)
        scores[is_document] = self._scores[(starts[:, None] + places)[is_document]]
        return ScoredDocuments(columns, scores, is_document)


class PairBatcher:
    """Makes a PairBatch from rows of the training file; tokenizes all texts once, when it is created.

    symmetric_pairs: see `FalseNegativeMask`; unsupervised: each text is its own title, and is held once as such;
    chunk_texts: maximum number of texts in a chunk; without it a batch has `chunk_count` chunks of similar size.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        pairs: Sequence[TextPair],
        *,
        mask_false_negatives: bool = True,
        symmetric_pairs: bool | None = None,
        unsupervised: bool = False,
        chunk_texts: int | None = None,
        chunk_count: int = CHUNKS_PER_BATCH,
    ) -> None:
        self._tokenizer, self._count = tokenizer, len(pairs)
        self._chunk_texts, self._chunk_count = chunk_texts, chunk_count
        queries = [] if unsupervised else [pair.query for pair in pairs]
        documents = [pair.title for pair in pairs]
        documents += [text for pair in pairs for text in pair.hard_negatives]
        # Queries, titles and hard negatives, in this order; if unsupervised, the titles are the queries, too.
        self._texts = TokenizedTexts(
            tokenizer, [*tokenizer.prefixed(queries, QUERY), *tokenizer.prefixed(documents, DOCUMENT)]
        )
        self._first_title = len(queries)
        # The hard negatives of a pair are those from its number to that of the next one.
        self._hard_negative_starts = np.cumsum([0, *(len(pair.hard_negatives) for pair in pairs)])
        self._scores = _ScoresOfPairs(pairs) if pairs[0].teacher_scores else None
        self.mask = None
        if mask_false_negatives:
            # The same text as a query and as a title has the same tokens only without prefixes.
            has_prefixes = any(tokenizer.prefixes.values())
            texts = TokenizedTexts(tokenizer, [*queries, *documents]) if has_prefixes else self._texts
            self.mask = FalseNegativeMask(*self._parts(texts.ids()), symmetric_pairs)

    def _parts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Splits an array with a row for each of the texts into the rows of queries, titles and hard negatives."""
        titles_end = self._first_title + self._count
        return rows[: self._count], rows[self._first_title : titles_end], rows[titles_end:]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 [N]: of its query, its title and its hard negatives together."""
        queries, titles, hard_negatives = self._parts(self._texts.lengths)
        lengths_before = np.concatenate([[0], np.cumsum(hard_negatives)])
        return queries + titles + np.diff(lengths_before[self._hard_negative_starts])

    def masked_share(self, rows: np.ndarray) -> float:
        """The share of the other titles of a batch that are no negatives of its queries. rows: int64 [B]."""
        if self.mask is None or len(rows) < 2:
            return 0.0
        masked = self.mask(rows, rows, rows[:0])
        return float(masked[~np.eye(len(rows), dtype=bool)].mean())

    def _hard_negatives_of(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the hard negatives of pairs, int64 [H], in the pairs' order. rows: int64 [B]."""
        starts = self._hard_negative_starts
        return np.array([number for row in rows for number in range(starts[row], starts[row + 1])], dtype=np.int64)

    def __call__(self, rank_rows: Sequence[np.ndarray], rank: int = 0) -> PairBatch:
        """The batch of rank_rows[rank]. rank_rows: int64 [B], B may be 0, for each of the ranks scored together."""
        hard_negatives = [self._hard_negatives_of(rows) for rows in rank_rows]
        queries = rank_rows[rank]
        titles = self._first_title + queries
        numbers = np.concatenate([queries, titles, self._first_title + self._count + hard_negatives[rank]])
        token_ids = [self._texts[number] for number in numbers]
        longest_first = np.argsort([-len(text_ids) for text_ids in token_ids], kind="stable")
        chunk_count = math.ceil(len(token_ids) / self._chunk_texts) if self._chunk_texts else self._chunk_count
        chunks = [chunk for chunk in np.array_split(longest_first, max(1, chunk_count)) if len(chunk)]
        all_rows, all_hard_negatives = np.concatenate(rank_rows), np.concatenate(hard_negatives)
        return PairBatch(
            chunks=[self._tokenizer.pad([token_ids[position] for position in chunk]) for chunk in chunks],
            row_of_text=np.argsort(longest_first),  # the inverse permutation
            sizes=[(len(rows), len(negatives)) for rows, negatives in zip(rank_rows, hard_negatives, strict=True)],
            rank=rank,
            mask=self.mask(all_rows, all_rows, all_hard_negatives) if self.mask else None,
            teacher=self._scores(all_rows) if self._scores else None,
        )


def check_batch_size(
    batch_size: int, world_size: int, pairs: Sequence[TextPair], train_set_file: str, *, cross_device: bool = True
) -> None:
    """Raises InputError if a batch of all ranks needs more pairs than there are, or would have no negatives."""
    if batch_size * world_size > len(pairs):
        largest = len(pairs) // world_size
        remedy = f"use at most --batch_size {largest}" if largest else f"use at most {len(pairs)} processes"
        problem = f"--batch_size {batch_size} on {world_size} process(es): {train_set_file} has {len(pairs)} pairs"
        raise InputError(f"{problem}; {remedy}")
    titles = batch_size * (world_size if cross_device else 1)
    if titles == 1 and not any(pair.hard_negatives for pair in pairs):
        raise InputError("--batch_size 1: leaves no other title as a negative; use 2 or more")


class PlannedStep(NamedTuple):
    """A step, and the rows of the training file that it trains on."""

    number: int  # from 1, over all epochs
    epoch: int  # from 1
    batches: list[list[np.ndarray]]  # for each batch the rows of each rank, int64 [B]


class BatchSchedule:
    """Which pairs each step trains on; depends on these arguments only.

    batch_size: pairs on each rank; max_steps: replaces `epochs`; gradient_accumulation_steps: batches per step;
    lengths: tokens of each pair, to make batches of pairs of similar length.
    """

    def __init__(
        self,
        pair_count: int,
        batch_size: int,
        *,
        seed: int,
        epochs: int,
        max_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        world_size: int = 1,
        lengths: np.ndarray | None = None,
    ) -> None:
        self._batches_per_step = gradient_accumulation_steps
        self._epoch_batches = partial(
            epoch_batches, pair_count, batch_size, seed=seed, world_size=world_size, lengths=lengths
        )
        batches_per_epoch = math.ceil(pair_count / (batch_size * world_size))
        self.steps_per_epoch = math.ceil(batches_per_epoch / gradient_accumulation_steps)
        self.total_steps = max_steps or epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch of a step; both count from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        """Whether a step is the last one of its epoch."""
        return step % self.steps_per_epoch == 0

    def steps(self, completed: int) -> Iterator[PlannedStep]:
        """The steps after the first `completed` ones."""
        epoch_steps: list[list[list[np.ndarray]]] = []
        for number in range(completed + 1, self.total_steps + 1):
            epoch, position = divmod(number - 1, self.steps_per_epoch)
            if position == 0 or not epoch_steps:
                epoch_steps = list(batched(self._epoch_batches(epoch=epoch + 1), self._batches_per_step))
            yield PlannedStep(number, epoch + 1, epoch_steps[position])


def epoch_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, world_size: int = 1, lengths: np.ndarray | None = None
) -> list[list[np.ndarray]]:
    """For each batch of an epoch the rows of each rank, int64 [at most batch_size].

    The shuffle depends on (seed, epoch) only. A batch's rows are dealt to the ranks one by one, which balances lengths
    if they are sorted. No row is dropped: the last batch may be smaller, and empty on some ranks. lengths: int64
    [count]; if given, the rows of LENGTH_SORT_BATCHES batches at a time are sorted by length and cut into batches
    again, which are shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    batch_rows = batch_size * world_size
    batches = [order[start : start + batch_rows] for start in range(0, count, batch_rows)]
    if lengths is not None:
        windows = batched(batches, LENGTH_SORT_BATCHES)
        batches = [batch for window in windows for batch in _regroup_by_length(window, lengths, rng)]
    return [[rows[rank::world_size] for rank in range(world_size)] for rows in batches]


def _regroup_by_length(batches: list[np.ndarray], lengths: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of `batches` sorted by length and cut into batches of the same sizes, in random order."""
    rows = np.concatenate(batches)
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    by_length = np.split(rows, np.cumsum([len(batch) for batch in batches])[:-1])
    return [by_length[position] for position in rng.permutation(len(by_length))]


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last may be shorter; Python 3.12 has `itertools.batched`, which yields tuples."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
