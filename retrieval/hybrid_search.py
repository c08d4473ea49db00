"""Searching by vectors, by words, or by both, and the weight of each. Imports no Paddle."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from common.errors import InputError
from common.logs import progress_bar
from data import Hit
from retrieval.lexical_index import Fusion, LexicalIndex
from retrieval.metrics import RECALL_CUTOFFS, evaluate
from retrieval.saved_index import DocumentIndex

MODES = VECTOR, LEXICAL, HYBRID = ("vector", "lexical", "hybrid")
DEPTH = 100  # hits of each way that are fused, or more if more are wanted
TUNED_WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
TUNED_KS = (0, 5, 10, 20, 60)


class SearchHits(NamedTuple):
    """The hits of a search: a row per query, best first; the last ones of a row may be missing, with the id -1."""

    ids: np.ndarray  # int64 [Q, k], rows of the documents
    scores: np.ndarray  # float32 [Q, k]: cosines, BM25 scores or, with both ways, sums of reciprocal ranks
    vector_ranks: np.ndarray  # int64 [Q, k], from 1; 0: not among the hits by vectors
    lexical_ranks: np.ndarray  # the same for the hits by words

    def of(self, row: int, documents: Sequence[str] | Mapping[int, str]) -> Iterator[tuple[float, str, str]]:
        """The score, the way (`way_of`) and the document of each hit of a query, best first."""
        for each, score, vector_rank, lexical_rank in zip(*(values[row] for values in self), strict=True):
            if each >= 0:
                yield float(score), way_of(vector_rank, lexical_rank), documents[each]


class Judged(NamedTuple):
    """How good a way of searching is on pairs of queries and titles."""

    mode: str  # one of MODES
    fusion: Fusion | None  # of the mode hybrid
    recall: float  # from 0 to 1, at `tuned_cutoff`
    mrr: float


def way_of(vector_rank: int, lexical_rank: int) -> str:
    """Which way found a hit: one of MODES, where "hybrid" means both."""
    return HYBRID if vector_rank and lexical_rank else VECTOR if vector_rank else LEXICAL


def search_depth(mode: str, k: int) -> int:
    """How many hits by vectors, and by words, a search for k documents takes."""
    return max(k, DEPTH) if mode == HYBRID else k


def search(
    document_index: DocumentIndex, queries: Sequence[str], query_vectors: np.ndarray, k: int, mode: str
) -> SearchHits:
    """The best k documents of each query, fewer where a search by words finds fewer.

    query_vectors: float32 [Q, D] of the same queries; mode: one of MODES. Both ways are fused as the index's `fusion`
    says. Raises InputError as `VectorIndex.search` does, and for a mode that needs the words of an index without them.
    """
    if mode == VECTOR:
        return by_vectors(*document_index.index.search(query_vectors, k))
    if document_index.lexical is None:
        raise InputError(f"mode {mode}: the index has no words to search; build them with --lexical bm25")
    if mode == LEXICAL:
        return by_words(*document_index.lexical.search(queries, k))
    depth = search_depth(mode, k)
    vector_ids, _ = document_index.index.search(query_vectors, depth)
    lexical_ids, _ = document_index.lexical.search(queries, depth)
    return fuse(vector_ids, lexical_ids, document_index.fusion, k)


def hits_of(found: SearchHits, documents: Sequence[str] | Mapping[int, str], queries: Sequence[str]) -> Iterator[Hit]:
    """The hits of a search, query by query, best first."""
    for row, query in enumerate(queries):
        yield from (Hit(query, document, score) for score, _, document in found.of(row, documents))


def bm25_search(queries: Sequence[str], corpus: Sequence[str], k: int) -> Iterator[Hit]:
    """Up to `k` hits a query by BM25 alone, best first; documents that share no term with the query are left out."""
    return hits_of(by_words(*LexicalIndex.build(corpus, len(corpus)).search(queries, k)), corpus, queries)


def by_vectors(ids: np.ndarray, scores: np.ndarray) -> SearchHits:
    """The hits of `VectorIndex.search`."""
    return SearchHits(ids, scores, _ranks(ids), np.zeros_like(ids))


def by_words(ids: np.ndarray, scores: np.ndarray) -> SearchHits:
    """The hits of `LexicalIndex.search`."""
    return SearchHits(ids, scores, np.zeros_like(ids), _ranks(ids))


def _ranks(ids: np.ndarray) -> np.ndarray:
    """Ranks from 1, int64 [Q, k]; 0 for missing ids."""
    return np.where(ids >= 0, np.arange(1, ids.shape[1] + 1), 0)


def fuse(vector_ids: np.ndarray, lexical_ids: np.ndarray, fusion: Fusion, k: int) -> SearchHits:
    """Merges the hits of both ways by reciprocal rank fusion (Cormack, Clarke and Buettcher 2009).

    A document's score is 1 / (rrf_k + its rank by vectors) + lexical_weight / (rrf_k + its rank by words), where a way
    that didn't find it adds nothing. Of equal scores, the better rank by vectors comes first, then by words.
    vector_ids [Q, N] and lexical_ids [Q, M]: int64, best first, distinct in a row, -1 at the end of a row for missing
    ones. Returns min(k, N + M) hits.
    """
    shape = len(vector_ids), min(k, vector_ids.shape[1] + lexical_ids.shape[1])
    ranks = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    hits = SearchHits(np.full(shape, -1, np.int64), np.zeros(shape, np.float32), *ranks)
    for row, both in enumerate(zip(vector_ids, lexical_ids, strict=True)):
        for values, found in zip(hits, _fuse_one(*both, fusion, k), strict=True):
            values[row, : len(found)] = found
    return hits


def _fuse_one(vector_ids: np.ndarray, lexical_ids: np.ndarray, fusion: Fusion, k: int) -> SearchHits:
    """`fuse` for one query, without missing hits; all arrays have one axis."""
    vector_ids, lexical_ids = vector_ids[vector_ids >= 0], lexical_ids[lexical_ids >= 0]
    ids, places = np.unique(np.concatenate([vector_ids, lexical_ids]), return_inverse=True)
    vector_ranks, lexical_ranks = np.zeros_like(ids), np.zeros_like(ids)
    vector_ranks[places[: len(vector_ids)]] = np.arange(1, len(vector_ids) + 1)
    lexical_ranks[places[len(vector_ids) :]] = np.arange(1, len(lexical_ids) + 1)
    parts = [
        np.where(ranks > 0, 1 / (fusion.rrf_k + np.maximum(ranks, 1)), 0) for ranks in (vector_ranks, lexical_ranks)
    ]
    scores = parts[0] + fusion.lexical_weight * parts[1]
    best = np.lexsort((-parts[1], -parts[0], -scores))[:k]
    return SearchHits(ids[best], scores[best], vector_ranks[best], lexical_ranks[best])


def tuned_cutoff(k: int) -> int:
    """The K of the Recall@K that `tune_fusion` compares: the largest of RECALL_CUTOFFS up to k."""
    return max(cutoff for cutoff in RECALL_CUTOFFS if cutoff <= k)


def tune_fusion(
    document_index: DocumentIndex, positives: Mapping[str, set[str]], query_vectors: np.ndarray, k: int
) -> list[Judged]:
    """Judges each of TUNED_WEIGHTS with each of TUNED_KS, and both ways alone.

    Returns them best first: by Recall at `tuned_cutoff`, then by MRR@k. positives: query -> its titles; query_vectors:
    float32 [Q, D] of these queries. Raises InputError as `search` does.
    """
    if document_index.lexical is None:
        raise InputError("--tune_lexical_weight: the index has no words to search; build them with --lexical bm25")
    depth, queries, cutoff = search_depth(HYBRID, k), list(positives), tuned_cutoff(k)
    vector_ids, _ = document_index.index.search(query_vectors, depth)
    lexical_ids, _ = document_index.lexical.search(queries, depth)
    rows = np.union1d(vector_ids, lexical_ids).tolist()
    documents = {row: document_index.documents[row] for row in rows if row >= 0}

    def judge(mode: str, ids: np.ndarray, fusion: Fusion | None = None) -> Judged:
        ranking = [[documents[row] for row in found if row >= 0] for found in ids[:, :k].tolist()]
        evaluation = evaluate(positives, dict(zip(queries, ranking, strict=True)), k)
        return Judged(mode, fusion, evaluation.recall[cutoff], evaluation.mrr)

    judged = [judge(VECTOR, vector_ids), judge(LEXICAL, lexical_ids)]
    fusions = [Fusion(*each) for each in product(TUNED_WEIGHTS, TUNED_KS)]
    with progress_bar(len(fusions), "lexical weight", "candidate") as progress:
        for fusion in fusions:
            judged.append(judge(HYBRID, fuse(vector_ids, lexical_ids, fusion, k).ids, fusion))
            progress.update()
    return sorted(judged, key=lambda each: (each.recall, each.mrr), reverse=True)
