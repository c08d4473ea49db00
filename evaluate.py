"""Recall@K, MRR and nDCG of a recall result, and a report on where it fails. Imports no Paddle."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from common.cli import ArgumentParser, positive_int, run
from common.errors import InputError
from common.files import prepare_file
from common.logs import log
from common.options import add_pair_file_arg, add_reading_args, call
from data import Hit, positives_by_query, read_scored_hits, read_text_pairs
from reporting.evaluation_report import Result, bm25_result, write_evaluation_report
from reporting.page import Bilingual
from retrieval.corpus import read_corpus
from retrieval.metrics import Judgement, format_lines, judge_hits, metrics, report_own_texts, summarize
from retrieval.significance import randomization_test
from retrieval.trec import read_identified_texts, read_qrels, read_run, write_trec


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description="Prints Recall@K, MRR and nDCG of a recall result, and reports where it fails.")
    positives = parser.add_mutually_exclusive_group(required=True)
    add_pair_file_arg(positives)
    positives.add_argument("--qrels", help="the right answers in TREC's or BEIR's form, instead of pairs")
    results = parser.add_mutually_exclusive_group(required=True)
    results.add_argument("--recall_result_file", help="the recall result that recall.py wrote")
    results.add_argument("--trec_run", help="a run in TREC's form, instead of a recall result")
    add = parser.add_argument
    add("--recall_num", type=positive_int, default=10, help="documents per query that count")
    add_reading_args(parser, labels=True)
    add("--report", metavar="FILE", help="write a report in HTML")
    compare_help = "another recall result of the same queries (with --trec_run a run) to compare with"
    add("--compare", metavar="FILE", help=compare_help)
    corpus_help = "documents, one per line, or a .jsonl file in BEIR's form; adds BM25 to the report"
    add("--corpus_file", help=corpus_help)
    queries_help = "queries of --qrels and --trec_run: one per line, whose number is its id, or a .jsonl file of BEIR"
    add("--queries_file", help=queries_help)
    add("--write_trec", metavar="FOLDER", help="write run, qrels and texts in the forms of TREC and BEIR")
    return parser


def check_options(
    qrels: str | None,
    trec_run: str | None,
    queries_file: str | None,
    corpus_file: str | None,
    report: str | None,
    write_trec: str | None,
) -> None:
    """Raises InputError for options that need others."""
    has_ids = qrels or trec_run
    for name, value in (("queries_file", queries_file), ("corpus_file", corpus_file)):
        if has_ids and not value:
            raise InputError(f"--{'qrels' if qrels else 'trec_run'}: has ids alone; give their texts with --{name}")
    if queries_file and not has_ids:
        raise InputError("--queries_file: does nothing without --qrels or --trec_run; leave it out")
    if corpus_file and not (has_ids or report or write_trec):
        raise InputError("--corpus_file: does nothing without --report or --write_trec; add one, or leave it out")


class Evaluated(NamedTuple):
    """What is evaluated."""

    positives: dict[str, set[str]]  # query -> its titles
    read_result: Callable[[str], list[Hit]]  # reads a recall result or, with ids, a run
    corpus: Sequence[str] | None


def read_evaluated(
    similar_text_pair_file: str | None,
    qrels: str | None,
    trec_run: str | None,
    queries_file: str | None,
    corpus_file: str | None,
    *,
    skip_bad_lines: bool,
    check_columns: bool,
    label_column: bool,
) -> Evaluated:
    """Reads the right answers and the corpus. Raises InputError for files that can't be used."""
    reading = {"skip_bad_lines": skip_bad_lines, "check_columns": check_columns}
    read_result: Callable[[str], list[Hit]] = read_scored_hits
    corpus: Sequence[str] | None = None
    if queries_file and corpus_file:
        queries, documents = read_identified_texts(queries_file), read_identified_texts(corpus_file)
        corpus = list(documents.texts.values())
        if trec_run:
            read_result = partial(read_run, queries=queries, documents=documents)
        if qrels:
            return Evaluated(read_qrels(qrels, queries, documents), read_result, corpus)
    elif corpus_file:
        corpus = read_corpus(corpus_file, **reading)
    pairs = read_text_pairs(similar_text_pair_file or "", **reading, label_column=label_column)
    return Evaluated(positives_by_query(pairs), read_result, corpus)


def judge_result(evaluated: Evaluated, result_file: str, pair_file: str, recall_num: int) -> Judgement:
    """Judges a recall result or run; logs what it lacks, and what it has beyond the queries. Raises InputError."""
    hits = evaluated.read_result(result_file)
    judgement = judge_hits(evaluated.positives, hits, recall_num)
    longest = max(Counter(hit.query for hit in hits).values())
    if longest < recall_num:
        log(f"--recall_num {recall_num}: {result_file} has no more than {longest} documents per query")
    if missing := [each.query for each in judgement.queries if not each.has_result]:
        queries = f"{len(missing)} of {len(judgement.queries)} queries"
        log(f"{result_file}: {queries} have no result and count as 0, the first: {missing[0]}")
    if unknown := judgement.unknown_queries:
        queries = f"{len(unknown)} queries that {pair_file} lacks"
        log(f"{result_file}: left out {queries}, the first: {unknown[0]}")
    report_own_texts(summarize(judgement))
    return judgement


def short_names(files: Sequence[str]) -> list[Bilingual]:
    """What a report calls files: their names, or their paths if the names are equal."""
    names = [Path(file).name for file in files]
    return [Bilingual(name, name) for name in (names if len(set(names)) == len(names) else files)]


def comparison_lines(ours: Result, other: Result) -> list[str]:
    """A line for each metric: its values in percent in both results, their difference, and its p-value."""
    values, other_values = (metrics(summarize(each.judgement)) for each in (ours, other))
    p_values = randomization_test(ours.metrics, other.metrics)
    lines = []
    for (name, value), other_value, p in zip(values.items(), other_values.values(), p_values, strict=True):
        difference = 100 * (value - other_value)
        lines.append(f"{name}={round(100 * value, 3)} other={round(100 * other_value, 3)} {difference=:+.3f} p={p:.4f}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the metrics, one per line, writes what is asked for, and logs the queries that one of the files lacks."""
    args = build_parser().parse_args(argv)
    call(check_options, args)
    if args.report:
        prepare_file(args.report)
    evaluated = call(read_evaluated, args)
    pair_file = args.qrels or args.similar_text_pair_file
    files = [args.recall_result_file or args.trec_run, *([args.compare] if args.compare else [])]
    judgements = [judge_result(evaluated, file, pair_file, args.recall_num) for file in files]
    ours, *others = map(Result, short_names(files), judgements)
    lines = [line for other in others for line in comparison_lines(ours, other)]
    print("\n".join(lines or format_lines(summarize(ours.judgement))))
    if args.report:
        bm25 = bm25_result(evaluated.positives, evaluated.corpus, args.recall_num) if evaluated.corpus else None
        write_evaluation_report(args.report, ours, bm25, *others)
    if args.write_trec:
        write_trec(args.write_trec, ours.judgement, evaluated.corpus or ())
    return 0


if __name__ == "__main__":
    run(main)
