"""Recall@K, MRR and nDCG of a recall result. Imports no Paddle."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import NamedTuple

from common.errors import InputError
from common.logs import log
from common.texts import TextSet, text_key
from data import Hit
from retrieval.corpus import Corpus

RECALL_CUTOFFS = (1, 5, 10, 20, 50)


class Evaluation(NamedTuple):
    """Metrics from 0 to 1, averaged over the distinct queries of the pairs."""

    recall: dict[int, float]  # K -> Recall@K, for the values of RECALL_CUTOFFS up to recall_num
    mrr: float  # at recall_num
    ndcg: float  # at recall_num
    recall_num: int
    queries: int  # number of distinct queries
    queries_without_results: list[str]  # they count as 0
    unknown_queries: list[str]  # in the recall result but not in the pairs; left out
    own_texts: int = 0  # number of queries that recalled their own text, which was left out


class JudgedQuery(NamedTuple):
    """A query, the documents that it should find, and those that it found."""

    query: str
    titles: set[str]  # the right documents, at least one
    documents: list[str]  # the first `recall_num` distinct ones, best first; titles are in their own spelling
    scores: list[float]  # of the documents; [] if the hits have none
    has_result: bool  # whether the recall result has hits for it
    has_own_text: bool  # whether it recalled its own text, which was left out

    @property
    def first_rank(self) -> int | None:
        """The rank of the first right document, from 1; None if there is none."""
        return next((rank for rank, document in enumerate(self.documents, 1) if document in self.titles), None)


class Judgement(NamedTuple):
    """Each query of the pairs with what it found, from which all metrics follow."""

    queries: list[JudgedQuery]
    unknown_queries: list[str]  # in the recall result but not in the pairs
    recall_num: int  # documents per query that count


def recall_at_k(documents: Sequence[str], titles: set[str], k: int) -> float:
    """|first k documents ∩ titles| / |titles|.

    documents: the distinct ones that a query found, best first; titles: the right ones, at least one.
    """
    return len(titles.intersection(documents[:k])) / len(titles)


def mrr_at_k(documents: Sequence[str], titles: set[str], k: int) -> float:
    """1 / rank of the first title, or 0 if the first k documents have none (Voorhees 1999, TREC-8).

    The mean over the queries is the MRR. Arguments as for `recall_at_k`.
    """
    return next((1 / rank for rank, document in enumerate(documents[:k], 1) if document in titles), 0.0)


def ndcg_at_k(documents: Sequence[str], titles: set[str], k: int) -> float:
    """DCG / ideal DCG, with gain 1 for a title and discount 1 / log2(rank + 1).

    Järvelin and Kekäläinen 2002, doi:10.1145/582415.582418, as trec_eval computes it. Arguments as for
    `recall_at_k`.
    """
    gain = sum(1 / math.log2(rank + 1) for rank, document in enumerate(documents[:k], 1) if document in titles)
    return gain / _ideal_dcg(min(len(titles), k))


@cache
def _ideal_dcg(count: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank in range(1, count + 1))


def evaluate(positives: Mapping[str, set[str]], ranking: Mapping[str, Sequence[str]], recall_num: int) -> Evaluation:
    """The means of the metrics over the queries, see `judge`. Raises InputError if there are no queries."""
    return summarize(judge(positives, ranking, recall_num))


def judge(
    positives: Mapping[str, set[str]],
    ranking: Mapping[str, Sequence[str]],
    recall_num: int,
    scores: Mapping[str, Sequence[float]] | None = None,
) -> Judgement:
    """Compares recalled documents with the right ones, for each query of `positives`.

    positives: query -> its titles; ranking: query -> its documents, best first; scores: query -> their scores. The
    first recall_num distinct documents count: a repeated document keeps its first rank, and later ones move up. So do
    those after the query's own text, which is no answer unless it is one of its titles. Texts with the same `text_key`
    are the same. Raises InputError if there are no queries.
    """
    if not positives:
        raise InputError("there are no queries to evaluate: the pair file holds no pairs")
    spellings = {text_key(query): query for query in ranking}
    keys = [text_key(query) for query in positives]
    judged = []
    for key, (query, titles) in zip(keys, positives.items(), strict=True):
        found = spellings.get(key)
        documents = ranking[found] if found is not None else ()
        distinct_titles = TextSet(titles)
        places, has_own_text = _distinct(query, distinct_titles, documents)
        kept = list(places)[:recall_num]
        kept_scores = [scores[found][places[document]] for document in kept] if scores and found is not None else []
        judged.append(JudgedQuery(query, set(distinct_titles), kept, kept_scores, bool(documents), has_own_text))
    known = set(keys)
    return Judgement(judged, [query for key, query in spellings.items() if key not in known], recall_num)


def judge_hits(positives: Mapping[str, set[str]], hits: Iterable[Hit], recall_num: int) -> Judgement:
    """Judges the hits of a recall result with their scores, see `judge`. Raises InputError if there are no queries."""
    documents: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    for hit in hits:
        documents.setdefault(hit.query, []).append(hit.document)
        scores.setdefault(hit.query, []).append(hit.score)
    return judge(positives, documents, recall_num, scores)


def _distinct(query: str, titles: TextSet, documents: Sequence[str]) -> tuple[dict[str, int], bool]:
    """The distinct documents with their first places, and whether the query's own text was left out of them.

    Titles are in the spelling of `titles`.
    """
    known = TextSet([*titles, query])
    own = query if titles.find(query) is None else None
    found: dict[str, int] = {}
    for place, document in enumerate(documents):
        found.setdefault(known.find(document) or document, place)
    has_own_text = own is not None and found.pop(own, None) is not None
    return found, has_own_text


def summarize(judgement: Judgement) -> Evaluation:
    """The means of the metrics over the queries."""
    judged, recall_num = judgement.queries, judgement.recall_num
    *recalls, mrr, ndcg = map(fmean, zip(*query_metrics(judgement), strict=True))
    return Evaluation(
        recall=dict(zip(cutoffs(recall_num), recalls, strict=True)),
        mrr=mrr,
        ndcg=ndcg,
        recall_num=recall_num,
        queries=len(judged),
        queries_without_results=[each.query for each in judged if not each.has_result],
        unknown_queries=judgement.unknown_queries,
        own_texts=sum(each.has_own_text for each in judged),
    )


def query_metrics(judgement: Judgement) -> list[list[float]]:
    """The metrics of each query, from 0 to 1, in the order of `metric_names`."""
    k = judgement.recall_num
    return [
        [
            *(recall_at_k(each.documents, each.titles, cutoff) for cutoff in cutoffs(k)),
            mrr_at_k(each.documents, each.titles, k),
            ndcg_at_k(each.documents, each.titles, k),
        ]
        for each in judgement.queries
    ]


def cutoffs(recall_num: int) -> list[int]:
    """The values of RECALL_CUTOFFS up to recall_num."""
    return [k for k in RECALL_CUTOFFS if k <= recall_num]


def metric_names(recall_num: int) -> list[str]:
    """Names of the metrics of an evaluation at `recall_num`, in the order in which they are printed."""
    return [*(f"recall@{k}" for k in cutoffs(recall_num)), f"mrr@{recall_num}", f"ndcg@{recall_num}"]


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """Name -> value from 0 to 1, in the order of `metric_names`."""
    values = [*evaluation.recall.values(), evaluation.mrr, evaluation.ndcg]
    return dict(zip(metric_names(evaluation.recall_num), values, strict=True))


def format_lines(evaluation: Evaluation) -> list[str]:
    """Lines `name@K=percent`: Recall@K in the original's form, then MRR and nDCG."""
    return [f"{name}={round(100 * value, 3)}" for name, value in metrics(evaluation).items()]


def report_own_texts(evaluation: Evaluation) -> None:
    """Logs how many queries recalled their own text, if any."""
    if evaluation.own_texts:
        log(f"{evaluation.own_texts} of {evaluation.queries} queries recalled their own text, which is left out")


def report_missing_positives(corpus: Corpus, positives: Mapping[str, set[str]]) -> None:
    """Logs how many titles of the evaluation pairs the corpus lacks, if any."""
    missing = TextSet(title for titles in positives.values() for title in sorted(titles))
    for document in corpus:
        missing.discard(document)
    if missing:
        first = next(iter(missing))
        log(f"{corpus.path}: lacks {len(missing)} titles of the pairs, which can't be recalled; first: {first}")
