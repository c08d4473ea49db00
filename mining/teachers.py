"""A teacher of mining: what scores queries with texts in place of the model that searches. Imports no Paddle."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.lines import read_lines
from common.texts import DOCUMENT, QUERY, text_key
from data import parse_hit
from retrieval.embedding_store import Embeddings

if TYPE_CHECKING:
    from encoding.text_encoder import Encoder


class Teacher(Protocol):
    """Scores titles and hits for their queries, the higher the better; 0 means that nothing is in common."""

    def __call__(
        self,
        queries: Sequence[str],
        titles: Sequence[str],
        query_of_title: np.ndarray,
        ids: np.ndarray,
        documents: Sequence[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The score of each title, float32 [T], and of each hit, float32 [Q, k]; NaN: there is none.

        query_of_title: int64 [T], the rows of their queries; ids: int64 [Q, k], of the hits in `documents`.
        """


@dataclass(frozen=True)
class TeacherEncoder:
    """The cosines of another dual encoder. embeddings: its vectors of all documents, by id."""

    encoder: "Encoder"
    embeddings: Embeddings

    def __call__(
        self,
        queries: Sequence[str],
        titles: Sequence[str],
        query_of_title: np.ndarray,
        ids: np.ndarray,
        documents: Sequence[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Teacher`."""
        query_vectors = self.encoder.encode(queries, role=QUERY)
        title_vectors = self.encoder.encode(titles, role=DOCUMENT)
        title_scores = np.einsum("td,td->t", query_vectors[query_of_title], title_vectors)
        return title_scores, self.embeddings.inner_products(query_vectors, ids)


class TeacherScores:
    """The scores of a file with lines `query<TAB>document<TAB>score`, such as a cross-encoder's.

    Of several scores of the same texts the first counts. Keeps a hash of the texts and the score, 12 bytes a line.
    Raises InputError as `read_lines` does.
    """

    def __init__(self, path: str | Path, *, lowercase: bool = True, skip_bad_lines: bool = False) -> None:
        self._lowercase = lowercase
        hashes, scores = array("q"), array("f")
        for line in read_lines(path, parse_hit, skip_bad_lines):
            if line.row:
                hashes.append(hash((self._key(line.row.query), self._key(line.row.document))))
                scores.append(line.row.score)
        order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        self._hashes, self._scores = np.frombuffer(hashes, np.int64)[order], np.frombuffer(scores, np.float32)[order]

    def _key(self, text: str) -> str:
        return text_key(text, self._lowercase)

    def __call__(
        self,
        queries: Sequence[str],
        titles: Sequence[str],
        query_of_title: np.ndarray,
        ids: np.ndarray,
        documents: Sequence[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Teacher`."""
        query_keys = [self._key(query) for query in queries]
        key_of_id = {each: self._key(documents[each]) for each in np.unique(ids).tolist()}
        title_scores = self._look_up(
            (query_keys[row], self._key(title)) for row, title in zip(query_of_title.tolist(), titles, strict=True)
        )
        hit_scores = self._look_up(
            (key, key_of_id[each]) for key, row in zip(query_keys, ids.tolist(), strict=True) for each in row
        )
        return title_scores, hit_scores.reshape(ids.shape)

    def _look_up(self, keys: Iterable[tuple[str, str]]) -> np.ndarray:
        """The scores of pairs of keys, float32 [N]; NaN where the file has none."""
        wanted = np.fromiter(map(hash, keys), np.int64)
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[places] == wanted, self._scores[places], np.float32(np.nan))
