"""Lexical baseline: BM25 over the words of the texts, written as a recall result that evaluate.py reads."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, number_in_range, run
from common.options import add_evaluation_file_args, add_reading_args, call
from data import positives_by_query, read_text_pairs, write_hits
from retrieval.corpus import read_corpus
from retrieval.hybrid_search import bm25_search


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(__doc__)
    add_evaluation_file_args(parser, required=True)
    add_reading_args(parser, labels=True)
    parser.add_argument("--recall_num", type=number_in_range(1), default=50, help="documents recalled for a query")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the recall result and prints how large the search was."""
    args = build_parser().parse_args(argv)
    queries = list(positives_by_query(call(read_text_pairs, args, path=args.similar_text_pair_file)))
    corpus = call(read_corpus, args, path=args.corpus_file)
    result = Path(args.recall_result_dir) / args.recall_result_file
    write_hits(result, bm25_search(queries, corpus, args.recall_num))
    print(f"{result}: BM25 hits of {len(queries)} queries in {len(corpus)} documents")
    return 0


if __name__ == "__main__":
    run(main)
