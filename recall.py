"""Recalls the documents nearest to each query: encodes the corpus, indexes it, searches it, writes the hits."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ann_util import VectorIndex, add_index_args, build_index, check_index_args, overlap_with_exact
from data import (
    Corpus,
    Hit,
    TextCollator,
    add_encoding_args,
    add_evaluation_file_args,
    add_skip_bad_lines_arg,
    encode_texts,
    read_corpus,
    read_text_pairs,
    titles_by_query,
    write_hits,
)
from runtime import ArgumentParser, at_least, log, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import SemanticIndexBase, add_checkpoint_args, add_device_arg, load_checkpoint, set_device
from distributed import encode_share, init_ranks

OVERLAP_SAMPLE = 200  # queries on which the index is compared with exact search: half a point is one hit in 200


class Recall(NamedTuple):
    """What a search gave; row q of both arrays belongs to the q-th query, best first."""

    ids: np.ndarray  # int64 [Q, k], rows of the corpus
    similarities: np.ndarray  # float32 [Q, k], cosines
    index_overlap: float  # share of exact search's hits that the index found, on a sample of the queries


def encode_for_search(
    model: SemanticIndexBase, collator: TextCollator, texts: Sequence[str], batch_size: int, desc: str
) -> np.ndarray | None:
    """Unit vectors float32 [N, D] on rank 0, each rank having encoded its share; None on the others."""

    def encode(rows: slice) -> np.ndarray:
        share = texts[rows]
        out = np.empty((len(share), model.embedding_size), dtype=np.float32)
        return encode_texts(model.embed, share, collator, batch_size, out, desc)

    return encode_share(len(texts), model.embedding_size, encode)


def recall(
    model: SemanticIndexBase,
    collator: TextCollator,
    corpus: Corpus,
    queries: Sequence[str],
    *,
    batch_size: int,
    recall_num: int,
    build: Callable[[np.ndarray], VectorIndex],
) -> Recall | None:
    """Searches the corpus for the `recall_num` documents nearest to each query; None on ranks other than 0.

    A corpus that is smaller gives all it has. build: makes the index of the corpus's vectors. Raises InputError, as
    when a vector isn't finite.
    """
    corpus_vectors = encode_for_search(model, collator, corpus, batch_size, "corpus")
    query_vectors = encode_for_search(model, collator, queries, batch_size, "queries")
    if corpus_vectors is None or query_vectors is None:
        return None
    index = build(corpus_vectors)
    ids, similarities = index.search(query_vectors, recall_num)
    sample = query_vectors[:: max(1, len(query_vectors) // OVERLAP_SAMPLE)]
    return Recall(ids, similarities, overlap_with_exact(index, corpus_vectors, sample, recall_num))


def as_hits(found: Recall, corpus: Corpus, queries: Sequence[str]) -> Iterator[Hit]:
    """The hits of all queries in their order, best first."""
    for query, ids, similarities in zip(queries, found.ids, found.similarities, strict=True):
        for row, similarity in zip(ids, similarities, strict=True):
            yield Hit(query, corpus[row], float(similarity))


def missing_positives(corpus: Corpus, positives: dict[str, set[str]]) -> list[str]:
    """Titles of the evaluation pairs that no search can find, since the corpus lacks them."""
    missing = {title: None for titles in positives.values() for title in sorted(titles)}
    for document in corpus:
        missing.pop(document, None)
    return list(missing)


def report_missing_positives(corpus: Corpus, positives: dict[str, set[str]], corpus_file: str) -> None:
    """Logs how many right answers the corpus lacks, if any."""
    missing = missing_positives(corpus, positives)
    if missing:
        log(f"{corpus_file}: lacks {len(missing)} titles of the pairs, which can't be recalled; first: {missing[0]}")


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_checkpoint_args(parser)
    add_evaluation_file_args(parser, required=True)
    add_skip_bad_lines_arg(parser)
    add_encoding_args(parser)
    parser.add_argument("--recall_num", type=at_least(1), default=10, help="documents recalled for a query")
    add_index_args(parser)
    add_device_arg(parser, default="gpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the recall result and says how exact the index was."""
    args = build_parser().parse_args(argv)
    positives = titles_by_query(read_text_pairs(args.similar_text_pair_file, skip_bad_lines=args.skip_bad_lines))
    corpus = read_corpus(args.corpus_file, skip_bad_lines=args.skip_bad_lines)
    report_missing_positives(corpus, positives, args.corpus_file)
    check_index_args(args.ann, len(corpus), args.hnsw_max_elements)

    set_device(args.device)
    init_ranks()
    model, collator = load_checkpoint(
        args.params_path,
        model_name_or_path=args.model_name_or_path,
        output_emb_size=args.output_emb_size,
        max_seq_length=args.max_seq_length,
    )
    queries = list(positives)
    found = recall(
        model,
        collator,
        corpus,
        queries,
        batch_size=args.batch_size,
        recall_num=args.recall_num,
        build=partial(
            build_index,
            args.ann,
            hnsw_m=args.hnsw_m,
            hnsw_ef=args.hnsw_ef,
            hnsw_max_elements=args.hnsw_max_elements,
        ),
    )
    if found is None:
        return 0
    result = Path(args.recall_result_dir) / args.recall_result_file
    write_hits(result, as_hits(found, corpus, queries))
    print(f"searched {len(corpus)} documents for {len(queries)} queries; the {args.ann} index found", end=" ")
    print(f"{100 * found.index_overlap:.2f} % of exact search's top {found.ids.shape[1]}")
    print(f"wrote {result}")
    return 0


if __name__ == "__main__":
    run(main)
