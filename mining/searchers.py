"""What finds the hits that hard negatives are chosen from: a trained model, or BM25. Imports no Paddle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from common.texts import DOCUMENT, QUERY
from retrieval.corpus import Corpus
from retrieval.documents import Documents
from retrieval.lexical_index import LexicalIndex
from retrieval.saved_index import LocalDocumentIndex

if TYPE_CHECKING:
    from encoding.encoder import Encoder


class Found(NamedTuple):
    """The hits of queries, best first, and how their titles score."""

    ids: np.ndarray  # int64 [Q, k], of documents; -1 where there are fewer hits
    scores: np.ndarray  # float32 [Q, k]
    title_scores: np.ndarray  # float32 [T]


class Searcher(Protocol):
    """Searches documents, and scores titles, which needn't be among them, as it scores these."""

    @property
    def documents(self) -> Corpus | Documents:
        """The documents by id."""

    def __call__(self, queries: Sequence[str], titles: Sequence[str], query_of_title: np.ndarray, k: int) -> Found:
        """The best k hits of each query. query_of_title: int64 [T], the rows of the titles' queries."""


@dataclass(frozen=True)
class VectorSearcher:
    """Searches by the cosines of a dual encoder."""

    encoder: "Encoder"
    document_index: LocalDocumentIndex

    @property
    def documents(self) -> Corpus | Documents:
        """`Searcher`."""
        return self.document_index.documents

    def __call__(self, queries: Sequence[str], titles: Sequence[str], query_of_title: np.ndarray, k: int) -> Found:
        """`Searcher`. Raises InputError as `VectorIndex.search` does."""
        query_vectors = self.encoder.encode(queries, role=QUERY)
        ids, scores = self.document_index.index.search(query_vectors, k)
        title_vectors = self.encoder.encode(titles, role=DOCUMENT)
        return Found(ids, scores, np.einsum("td,td->t", query_vectors[query_of_title], title_vectors))


@dataclass(frozen=True)
class LexicalSearcher:
    """Searches by words."""

    index: LexicalIndex
    documents: Corpus

    def __call__(self, queries: Sequence[str], titles: Sequence[str], query_of_title: np.ndarray, k: int) -> Found:
        """`Searcher`."""
        ids, scores = self.index.search(queries, k)
        pairs = zip(query_of_title.tolist(), titles, strict=True)
        title_scores = [self.index.score(queries[row], title) for row, title in pairs]
        return Found(ids, scores, np.array(title_scores, np.float32))
