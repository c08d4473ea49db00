"""Which texts of all columns are the same, and which are near-duplicates. Imports no Paddle."""

from collections.abc import Iterable, Sequence

import numpy as np

from common.logs import progress_bar
from common.texts import TextHashes
from data_check.files import Column
from data_check.sketches import BANDS, NO_TERM, similarities
from retrieval.near_duplicates import NEAR_DUPLICATE

COMPARED = 4  # texts of a bucket, the first ones, that each later one of it is compared with
PAIRS_AT_ONCE = 4096
SHIFT = 32  # bits: a pair of rows as one number


class TextGroups:
    """Which texts of columns are the same or nearly; the row of a text counts through all columns.

    ids: int64 [N], for each text the first row with the same `text_key`. groups: int64 [N], for each text the row of
    its leader: an earlier text that it is a near-duplicate of and that has no leader itself, or the text's own id. So
    texts of the training are the leaders of others, if its columns come first.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._starts = np.cumsum([0, *map(len, columns)])
        self.ids = TextHashes.join(column.hashes.texts for column in columns).ids(self.text)
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
        bands = (
            np.concatenate([column.hashes.bands[number] for column in self._columns])[distinct]
            for number in range(BANDS)
        )
        pairs = distinct[_candidates(bands)]
        with progress_bar(len(pairs), "near-duplicates", "pair") as progress:
            for start in range(0, len(pairs), PAIRS_AT_ONCE):
                block = pairs[start : start + PAIRS_AT_ONCE]
                progress.update(len(block))
                is_open = (leaders[block] == block).all(1)  # of those that have a leader, nothing is asked any more
                for row, other in self._near(block[is_open]):
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
        rows, order = np.arange(len(band)), np.argsort(band, kind="stable")
        starts = np.searchsorted(band, band, sorter=order)
        for position in range(COMPARED):
            others = order[np.minimum(starts + position, len(order) - 1)]
            is_pair = (band[others] == band) & (others < rows) & (band != NO_TERM)
            found.append(rows[is_pair] << SHIFT | others[is_pair])
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs >> SHIFT, pairs & ((1 << SHIFT) - 1)], axis=1)
