"""Which texts of all columns are the same, and which are near-duplicates. Imports no Paddle."""

from collections.abc import Iterable, Sequence

import numpy as np

from common.logs import progress_bar
from common.texts import TextHashes
from data_check.files import Column
from data_check.sketches import NO_TERM, BloomFilters, similarities
from retrieval.near_duplicates import NEAR_DUPLICATE

COMPARED = 4  # texts of a bucket, the first ones, that each later one of it is compared with
PAIRS_AT_ONCE = 4096
SHIFT, ROW = 32, (1 << 32) - 1  # two rows as one number


class TextGroups:
    """Which texts of columns are the same or nearly; the row of a text counts through all columns.

    ids: int64 [N], for each text the first row with the same `text_key`. groups: int64 [N], for each text the row of
    its leader: an earlier text that it is a near-duplicate of and that has no leader itself, or the text's own id. So
    texts of the training are the leaders of others, if its columns come first.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._starts = np.cumsum([0, *map(len, columns)])
        self.ids = TextHashes.join(column.hashes for column in columns).ids(self.text)
        self.groups = self._leaders()[self.ids]

    def rows(self, column: Column) -> slice:
        """The rows of a column."""
        number = next(number for number, other in enumerate(self._columns) if other is column)
        return slice(int(self._starts[number]), int(self._starts[number + 1]))

    def ids_of(self, column: Column) -> np.ndarray:
        """The ids of a column's texts, int64."""
        return self.ids[self.rows(column)]

    def groups_of(self, column: Column) -> np.ndarray:
        """The leaders of a column's texts, int64."""
        return self.groups[self.rows(column)]

    def text(self, row: int) -> str:
        """The text of a row."""
        column, row = self._place(row)
        return column[row]

    def example(self, row: int) -> str:
        """The text of a row with its file and line, shortened."""
        column, row = self._place(row)
        return column.example(row)

    def _place(self, row: int) -> tuple[Column, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._columns[number], row - int(self._starts[number])

    def _leaders(self) -> np.ndarray:
        """The leader of each row whose text no earlier one has; of the other rows itself."""
        leaders = np.arange(len(self.ids))
        distinct = np.flatnonzero(self.ids == leaders)
        sketches = [column.sketches for column in self._columns]
        bands = (np.concatenate(parts)[distinct] for parts in zip(*(each.bands for each in sketches), strict=True))
        pairs = distinct[_candidates(bands)]
        filters = BloomFilters.join([each.filters for each in sketches])
        with progress_bar(len(pairs), "near-duplicates", "pair") as progress:
            for start in range(0, len(pairs), PAIRS_AT_ONCE):
                block = pairs[start : start + PAIRS_AT_ONCE]
                progress.update(len(block))
                block = block[(leaders[block] == block).all(1)]  # of what has a leader, nothing is asked any more
                for row, other in self._near(block[filters.may_be_near(*block.T)]):
                    if leaders[row] == row and leaders[other] == other:
                        leaders[row] = other
        return leaders

    def _near(self, pairs: np.ndarray) -> list[tuple[int, int]]:
        """The pairs of rows, int64 [P, 2], whose texts are near-duplicates."""
        if not len(pairs):
            return []
        texts = [[self.text(row) for row in rows] for rows in pairs.T.tolist()]
        return [(row, other) for row, other in pairs[similarities(*texts) >= NEAR_DUPLICATE].tolist()]


def _candidates(bands: Iterable[np.ndarray]) -> np.ndarray:
    """Pairs of texts that may be near-duplicates, int64 [P, 2], the later one first, in order.

    bands: uint32 [N] each. A text is compared with the first COMPARED ones of each of its buckets, so that the number
    of pairs grows with that of the texts, also where thousands of them are alike.
    """
    found = []
    for band in bands:
        in_order = np.sort(band.astype(np.uint64) << SHIFT | np.arange(len(band), dtype=np.uint64))
        buckets, rows = in_order >> SHIFT, (in_order & ROW).astype(np.int64)
        later = 1 + np.flatnonzero((buckets[1:] == buckets[:-1]) & (buckets[1:] != NO_TERM))
        starts = np.searchsorted(buckets, buckets[later])
        for position in range(COMPARED):
            is_pair = starts + position < later
            found.append(rows[later[is_pair]] << SHIFT | rows[starts[is_pair] + position])
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs >> SHIFT, pairs & ROW], axis=1)
