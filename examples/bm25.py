"""Lexical baseline: BM25 over character uni- and bigrams, written as a recall result that evaluate.py reads."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
from bm25s.tokenization import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, number_in_range, run
from common.options import add_evaluation_file_args, add_reading_args, call
from data import Hit, positives_by_query, read_text_pairs, write_hits
from retrieval.corpus import read_corpus

# The usual values of BM25 (Robertson and Zaragoza 2009, section 3.2; Lucene's defaults).
K1 = 1.2
B = 0.75


def unigrams_and_bigrams(text: str) -> list[str]:
    """The characters of `text` without white space, and all pairs of adjacent ones."""
    characters = "".join(text.split())
    return list(characters) + [characters[i : i + 2] for i in range(len(characters) - 1)]


def bm25_search(queries: list[str], corpus: Sequence[str], k: int) -> Iterator[Hit]:
    """Yields up to `k` hits a query, best first; documents that share nothing with the query are left out."""
    tokenizer = Tokenizer(lower=True, splitter=unigrams_and_bigrams, stopwords=None)
    corpus_tokens = tokenizer.tokenize(corpus, return_as="tuple", show_progress=False)
    retriever = bm25s.BM25(k1=K1, b=B)
    retriever.index(corpus_tokens, show_progress=False)
    query_tokens = tokenizer.tokenize(queries, update_vocab=False, show_progress=False)
    rows, scores = retriever.retrieve(query_tokens, k=min(k, len(corpus)), show_progress=False)
    for query, query_rows, query_scores in zip(queries, rows, scores, strict=True):
        for row, score in zip(query_rows, query_scores, strict=True):
            if score > 0:
                yield Hit(query, corpus[int(row)], float(score))


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
