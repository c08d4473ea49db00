"""The report of an evaluation: metrics, where a search is good and where it fails, examples. Imports no Paddle."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from markupsafe import Markup

from reporting.charts import Line, histogram, line_chart
from reporting.marking import mark_shared, shorten
from reporting.page import Bilingual, Content, Section, heading, join, paragraph, table, write_report
from reporting.query_cards import Found, query_card
from retrieval.error_analysis import (
    SUSPECTED_RANKS,
    Group,
    by_overlap,
    by_positive_count,
    by_query_length,
    changed_most,
    curve_cutoffs,
    recall_curve,
    score_distributions,
    suspected_false_negatives,
    worst_first,
)
from retrieval.hybrid_search import bm25_search
from retrieval.metrics import JudgedQuery, Judgement, judge_hits, metric_names, query_metrics
from retrieval.near_duplicates import NEAR_DUPLICATE
from retrieval.significance import bootstrap_intervals, randomization_test

TITLE = Bilingual("Evaluation of a search", "检索评估")
INTERVAL = Bilingual("95 % interval", "95% 置信区间")
QUERIES = Bilingual("queries", "查询数")
WORST_QUERIES = 100
CHANGED_QUERIES = 20  # in each direction
SHOWN_SUSPECTS = 50
GROUPINGS: tuple[tuple[Bilingual, Callable[[Sequence[JudgedQuery]], list[Group]]], ...] = (
    (Bilingual("Characters of the query", "查询的字符数"), by_query_length),
    (Bilingual("Right answers of the query", "查询的正确答案数"), by_positive_count),
    (Bilingual("Share of the query's words that a right answer has", "查询中的词出现在正确答案中的比例"), by_overlap),
)


@dataclass(frozen=True)
class Result:
    """What a search found for the queries. name: what the report calls it."""

    name: Bilingual
    judgement: Judgement

    @cached_property
    def metrics(self) -> np.ndarray:
        """Of each query, in percent, in the order of `metric_names`; float64 [Q, M]."""
        return 100 * np.array(query_metrics(self.judgement))

    @property
    def ndcg(self) -> np.ndarray:
        """Of each query, in percent, float64 [Q]."""
        return self.metrics[:, -1]

    @property
    def queries(self) -> list[JudgedQuery]:
        """Each query with what it found."""
        return self.judgement.queries


def bm25_result(positives: Mapping[str, set[str]], corpus: Sequence[str], recall_num: int) -> Result:
    """What BM25 finds. positives: query -> its titles."""
    hits = bm25_search(list(positives), corpus, recall_num)
    return Result(Bilingual("BM25", "BM25"), judge_hits(positives, hits, recall_num))


def write_evaluation_report(path: str | Path, ours: Result, bm25: Result | None, other: Result | None = None) -> None:
    """Writes the report on a result, beside BM25's and another one of the same queries. Raises InputError if it can't.

    bm25: None if there is no corpus for it. Equal results give equal bytes.
    """
    others = [each for each in (bm25, other) if each]
    sections = [
        metrics_section(ours, others),
        curve_section([ours, *others]),
        groups_section(ours, others),
        bm25_section(ours, bm25),
        *([comparison_section(ours, other)] if other else []),
        scores_section(ours),
        suspects_section(ours),
        worst_section(ours),
        method_section(),
    ]
    write_report(path, TITLE, about(ours), sections)


def about(ours: Result) -> Markup:
    """What the report is of."""
    queries, depth = len(ours.queries), ours.judgement.recall_num
    titles = sum(len(each.titles) for each in ours.queries)
    empty = sum(not each.has_result for each in ours.queries)
    counts = Bilingual(
        f"{queries:,} queries with {titles:,} right answers; the first {depth:,} documents of each query count. "
        f"{empty:,} queries have no result.",
        f"{queries:,} 个查询，共 {titles:,} 个正确答案；每个查询只计前 {depth:,} 条文档。{empty:,} 个查询没有结果。",
    )
    return paragraph(ours.name, name="quiet") + paragraph(counts)


def metrics_section(ours: Result, others: Sequence[Result]) -> Section:
    """The metrics with their intervals; with each other result, the difference from it and its p-value."""
    head: list[Content] = [Bilingual("Metric, %", "指标（%）"), Bilingual("mean", "均值"), INTERVAL]
    columns = [_numbers(ours.metrics.mean(axis=0)), _intervals(ours.metrics)]
    for other in others:
        differences = ours.metrics - other.metrics
        head += [other.name, Bilingual("difference", "差值"), INTERVAL, "p"]
        columns += [_numbers(other.metrics.mean(axis=0)), _numbers(differences.mean(axis=0), "+.1f")]
        columns += [_intervals(differences, "+.1f"), _numbers(randomization_test(ours.metrics, other.metrics), ".4f")]
    rows = zip(metric_names(ours.judgement.recall_num), *columns, strict=True)
    return Section(Bilingual("Metrics", "指标"), table(head, list(rows)))


def _numbers(values: np.ndarray, form: str = ".1f") -> list[str]:
    return [format(value, form) for value in values]


def _intervals(values: np.ndarray, form: str = ".1f") -> list[str]:
    """The interval of the mean of each column. values: float64 [Q, M]."""
    ends = (_numbers(each, form) for each in bootstrap_intervals(values))
    return [f"{low} … {high}" for low, high in zip(*ends, strict=True)]


def curve_section(results: Sequence[Result]) -> Section:
    """Recall@K over K, with the interval of the first result."""
    cutoffs = curve_cutoffs([each.judgement for each in results])
    recalls = [100 * recall_curve(each.judgement, cutoffs) for each in results]
    lines = [Line(each.name, recall.mean(axis=0)) for each, recall in zip(results, recalls, strict=True)]
    lines[0] = lines[0]._replace(interval=bootstrap_intervals(recalls[0]))
    caption = Bilingual(
        "Recall@K in percent over K; the band is the 95 % interval of the first line.",
        "Recall@K（%）随 K 的变化；色带是第一条曲线的 95% 置信区间。",
    )
    return Section(Bilingual("Recall@K", "Recall@K"), line_chart(caption, cutoffs, lines))


def groups_section(ours: Result, others: Sequence[Result]) -> Section:
    """The metrics in each group of each of GROUPINGS."""
    parts: list[Markup] = []
    names = metric_names(ours.judgement.recall_num)
    head: list[Content] = [QUERIES, names[0], names[-2], names[-1], INTERVAL]
    for title, group_queries in GROUPINGS:
        rows: list[list[Content]] = []
        for group in group_queries(ours.queries):
            metrics = ours.metrics[group.rows]
            means = _numbers(metrics.mean(axis=0))
            row: list[Content] = [
                group.label,
                f"{len(group.rows):,}",
                means[0],
                means[-2],
                means[-1],
                *_intervals(metrics[:, -1:]),
            ]
            rows.append([*row, *(f"{other.ndcg[group.rows].mean():.1f}" for other in others)])
        other_heads = [join([other.name, f" {names[-1]}"]) for other in others]
        parts += [heading(title), table(["", *head, *other_heads], rows)]
    return Section(Bilingual("Groups of queries", "查询分组"), join(parts))


def bm25_section(ours: Result, bm25: Result | None) -> Section:
    """Where the search wins and loses against BM25."""
    if bm25:
        return comparison_section(ours, bm25)
    remedy = Bilingual(
        "BM25 needs the documents: evaluate.py --corpus_file compares it on the same queries.",
        "BM25 需要召回库：用 evaluate.py --corpus_file 可在相同的查询上与它比较。",
    )
    return Section(Bilingual("Beside BM25", "与 BM25 对比"), paragraph(remedy))


def comparison_section(ours: Result, other: Result) -> Section:
    """How many queries are better and worse than with another result, and those that differ most."""
    better, worse = int((ours.ndcg > other.ndcg).sum()), int((ours.ndcg < other.ndcg).sum())
    equal = len(ours.queries) - better - worse
    counts = Bilingual(
        f"By nDCG, {better:,} queries are better than there, {worse:,} worse, and {equal:,} equal.",
        f"按 nDCG，{better:,} 个查询优于对方，{worse:,} 个更差，{equal:,} 个相同。",
    )
    parts = [paragraph(counts)]
    titles = Bilingual("Better here", "此处更好"), Bilingual("Worse here", "此处更差")
    for title, rows in zip(titles, changed_most(ours.ndcg, other.ndcg, CHANGED_QUERIES), strict=True):
        parts += [heading(title)] if rows else []
        parts += [query_card([Found(each.name, each.queries[row]) for each in (ours, other)]) for row in rows]
    return Section(Bilingual(f"Beside {other.name.en}", f"与 {other.name.zh} 对比"), join(parts))


def scores_section(ours: Result) -> Section:
    """How the scores of right and of wrong hits are distributed."""
    title = Bilingual("Scores of right and wrong hits", "正确与错误结果的分数")
    found = score_distributions(ours.queries)
    if found is None:
        nothing = Bilingual("There are no right or no wrong hits with scores.", "没有带分数的正确结果或错误结果。")
        return Section(title, paragraph(nothing))
    caption = Bilingual(
        "Share of the hits in percent over the score, which is the third column of the recall result: a cosine, if "
        "vectors were searched.",
        "各分数区间的结果占比（%）；分数是召回结果的第三列，按向量检索时为余弦相似度。",
    )
    right = Bilingual(f"right, median {found.right_median:.3f}", f"正确，中位数 {found.right_median:.3f}")
    wrong = Bilingual(f"wrong, median {found.wrong_median:.3f}", f"错误，中位数 {found.wrong_median:.3f}")
    lines = [Line(right, 100 * found.right), Line(wrong, 100 * found.wrong)]
    return Section(title, histogram(caption, found.edges, lines))


def suspects_section(ours: Result) -> Section:
    """The hits that count as wrong say nearly the same as a right answer."""
    suspects = suspected_false_negatives(ours.queries)
    queries = len({suspect.row for suspect in suspects})
    counts = Bilingual(
        f"{len(suspects):,} hits of {queries:,} queries, among the first {SUSPECTED_RANKS} of each, count as wrong "
        f"but have at least {NEAR_DUPLICATE:.0%} of their words in common with a right answer. If they are right, "
        "too, add them to the pairs.",
        f"{queries:,} 个查询的前 {SUSPECTED_RANKS} 条结果中，有 {len(suspects):,} 条被判为错误，"
        f"但与某个正确答案的词重合度不低于 {NEAR_DUPLICATE:.0%}。如果它们也正确，请补充到 Pair 文件中。",
    )
    head = [
        Bilingual("query", "查询"),
        Bilingual("hit", "结果"),
        Bilingual("right answer", "正确答案"),
        Bilingual("rank", "排名"),
        Bilingual("similarity", "重合度"),
    ]
    rows = [
        [
            shorten(ours.queries[each.row].query),
            mark_shared(each.title, each.document),
            shorten(each.title),
            str(each.rank),
            f"{each.similarity:.2f}",
        ]
        for each in suspects[:SHOWN_SUSPECTS]
    ]
    parts = [paragraph(counts), *([table(head, rows, text_columns=3)] if rows else [])]
    return Section(Bilingual("Suspected false negatives", "疑似漏标的正确结果"), join(parts))


def worst_section(ours: Result) -> Section:
    """The queries whose first right answer comes latest."""
    worst = worst_first(ours.queries, ours.ndcg.tolist())
    none = sum(each.first_rank is None for each in ours.queries)
    shown = min(len(worst), WORST_QUERIES)
    counts = Bilingual(
        f"The first hit of {len(worst):,} queries is wrong; {none:,} have no right answer at all. The worst {shown}:",
        f"{len(worst):,} 个查询的第一条结果不正确，其中 {none:,} 个完全没有召回正确答案。最差的 {shown} 个：",
    )
    name = Bilingual("came", "已召回")
    cards = [query_card([Found(name, ours.queries[row])]) for row in worst[:WORST_QUERIES]]
    return Section(Bilingual("Worst queries", "最差的查询"), join([paragraph(counts), *cards]))


def method_section() -> Section:
    """How the numbers were computed."""
    method = Bilingual(
        "Intervals: percentile bootstrap over the queries, 1,000 resamples (Efron and Tibshirani 1993). p: two-sided "
        "randomization test over the queries, 10,000 permutations (Smucker, Allan and Carterette 2007); of many p, "
        "some are below 0.05 by chance. Words: those that BM25 counts, in Chinese single characters and pairs of "
        "adjacent ones. Marked: words and runs of characters that the query has, too. When texts are the same, and "
        "what happens to a query's own text, is in docs/data.md.",
        "置信区间：对查询做百分位 bootstrap，重采样 1,000 次（Efron 与 Tibshirani，1993）。"
        "p：对查询做双侧随机化检验，10,000 次置换（Smucker、Allan 与 Carterette，2007）；"
        "指标或结果较多时，总有个别 p 值偶然低于 0.05。词：BM25 统计的词，中文为单字及相邻两字。"
        "标记：查询中也有的词和连续的字。文本相同的判定以及查询自身文本的处理见 docs/data_cn.md。",
    )
    return Section(Bilingual("Method", "方法"), paragraph(method))
