"""Recall@K, MRR and nDCG of a recall result. Imports no Paddle."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from common.cli import ArgumentParser, positive_int, run
from common.logs import log
from common.options import add_pair_file_arg, add_reading_args, call
from data import positives_by_query, read_hits, read_text_pairs
from retrieval.metrics import evaluate, format_lines, report_own_texts


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description="Prints Recall@K, MRR and nDCG of a recall result.")
    add_pair_file_arg(parser, required=True)
    parser.add_argument("--recall_result_file", required=True, help="the recall result that recall.py wrote")
    parser.add_argument("--recall_num", type=positive_int, default=10, help="documents per query that count")
    add_reading_args(parser, labels=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the metrics, one per line, and logs the queries that only one of the files has."""
    args = build_parser().parse_args(argv)
    pairs = call(read_text_pairs, args, path=args.similar_text_pair_file)
    ranking = read_hits(args.recall_result_file)
    evaluation = evaluate(positives_by_query(pairs), ranking, args.recall_num)
    longest = max(map(len, ranking.values()))
    if longest < args.recall_num:
        log(f"--recall_num {args.recall_num}: {args.recall_result_file} has no more than {longest} documents per query")
    if missing := evaluation.queries_without_results:
        queries = f"{len(missing)} of {evaluation.queries} queries"
        log(f"{args.recall_result_file}: {queries} have no result and count as 0, the first: {missing[0]}")
    if unknown := evaluation.unknown_queries:
        queries = f"{len(unknown)} queries that {args.similar_text_pair_file} lacks"
        log(f"{args.recall_result_file}: left out {queries}, the first: {unknown[0]}")
    report_own_texts(evaluation)
    print("\n".join(format_lines(evaluation)))
    return 0


if __name__ == "__main__":
    run(main)
