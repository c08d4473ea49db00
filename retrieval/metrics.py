"""Recall@K, MRR and nDCG of a recall result. Imports no Paddle."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from statistics import fmean
from typing import NamedTuple

from common.errors import InputError
from common.logs import log
from common.texts import TextSet, text_key
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


def recall_at_k(ranked: Sequence[Sequence[str]], positives: Sequence[set[str]], k: int) -> float:
    """Mean over the queries of |first k documents ∩ positives| / |positives|.

    ranked: each query's distinct documents, best first; positives: the right ones, at least one per query.
    """
    return fmean(
        len(relevant.intersection(documents[:k])) / len(relevant)
        for documents, relevant in zip(ranked, positives, strict=True)
    )


def mrr_at_k(ranked: Sequence[Sequence[str]], positives: Sequence[set[str]], k: int) -> float:
    """Mean over the queries of 1 / rank of the first positive, or 0 if the first k have none (Voorhees 1999, TREC-8).

    Arguments as for `recall_at_k`.
    """
    return fmean(
        next((1 / rank for rank, document in enumerate(documents[:k], 1) if document in relevant), 0.0)
        for documents, relevant in zip(ranked, positives, strict=True)
    )


def ndcg_at_k(ranked: Sequence[Sequence[str]], positives: Sequence[set[str]], k: int) -> float:
    """Mean over the queries of DCG / ideal DCG, with gain 1 for a positive and discount 1 / log2(rank + 1).

    Järvelin and Kekäläinen 2002, doi:10.1145/582415.582418, as trec_eval computes it. Arguments as for
    `recall_at_k`.
    """
    longest = max(len(documents) for documents in chain(ranked, positives))
    discounts = [1 / math.log2(rank + 1) for rank in range(1, min(k, longest) + 1)]
    ideal = list(accumulate(discounts))
    return fmean(
        sum(discount for document, discount in zip(documents, discounts, strict=False) if document in relevant)
        / ideal[min(len(relevant), k) - 1]
        for documents, relevant in zip(ranked, positives, strict=True)
    )


def evaluate(positives: Mapping[str, set[str]], ranking: Mapping[str, Sequence[str]], recall_num: int) -> Evaluation:
    """Compares recalled documents with the right ones.

    positives: query -> its titles; ranking: query -> its documents, best first. The first recall_num distinct documents
    count: a repeated document keeps its first rank, and later ones move up. So do those after the query's own text,
    which is no answer unless it is one of its titles. Texts with the same `text_key` are the same. Raises InputError if
    there are no queries.
    """
    if not positives:
        raise InputError("there are no queries to evaluate: the pair file holds no pairs")
    found_queries = {text_key(query): query for query in ranking}
    keys = [text_key(query) for query in positives]
    known = set(keys)
    results = [ranking[found_queries[key]] if key in found_queries else () for key in keys]
    titles = [TextSet(texts) for texts in positives.values()]
    rankings = [_rank(*each) for each in zip(positives, titles, results, strict=True)]
    ranked = [documents[:recall_num] for documents, _ in rankings]
    relevant = [set(texts) for texts in titles]
    return Evaluation(
        recall={k: recall_at_k(ranked, relevant, k) for k in RECALL_CUTOFFS if k <= recall_num},
        mrr=mrr_at_k(ranked, relevant, recall_num),
        ndcg=ndcg_at_k(ranked, relevant, recall_num),
        recall_num=recall_num,
        queries=len(positives),
        queries_without_results=[query for query, documents in zip(positives, results, strict=True) if not documents],
        unknown_queries=[query for key, query in found_queries.items() if key not in known],
        own_texts=sum(has_own_text for _, has_own_text in rankings),
    )


def _rank(query: str, titles: TextSet, documents: Sequence[str]) -> tuple[list[str], bool]:
    """The distinct documents, titles in their own spelling, and whether the query's own text was left out of them."""
    known = TextSet([*titles, query])
    own = query if titles.find(query) is None else None
    found = dict.fromkeys(known.find(document) or document for document in documents)
    return [document for document in found if document != own], own in found


def metric_names(recall_num: int) -> list[str]:
    """Names of the metrics of an evaluation at `recall_num`, in the order in which they are printed."""
    return [*(f"recall@{k}" for k in RECALL_CUTOFFS if k <= recall_num), f"mrr@{recall_num}", f"ndcg@{recall_num}"]


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
