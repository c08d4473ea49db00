"""Recalls the documents nearest to each query: encodes the corpus, indexes it, searches it, writes the hits."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ann_util import VectorIndex, add_index_args, build_index, check_index_args, overlap
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
    split_evenly,
    titles_by_query,
    write_hits,
)
from runtime import ArgumentParser, at_least, is_main_process, log, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import SemanticIndexBase, add_checkpoint_args, add_device_arg, set_device
from checkpoint import load_checkpoint
from distributed import encode_share, gather_arrays, init_ranks

OVERLAP_SAMPLE = 200  # queries on which the index is compared with exact search: half a point is one hit in 200


class Recall(NamedTuple):
    """What a search gave; row q of both arrays belongs to the q-th query, best first."""

    ids: np.ndarray  # int64 [Q, k], rows of the corpus
    similarities: np.ndarray  # float32 [Q, k], cosines
    index_overlap: float  # share of exact search's hits that the index found, on a sample of the queries


class ShardedIndex:
    """The index of a corpus that is cut over the ranks: each holds and searches its share, all get the answer.

    build: makes the index of vectors [N, D]; vectors: those of our share; rows: where it lies in the corpus; size: of
    the whole corpus.
    """

    def __init__(self, build: Callable[[np.ndarray], VectorIndex], vectors: np.ndarray, rows: slice, size: int) -> None:
        # A corpus with fewer documents than ranks leaves some without any.
        self._share = build(vectors) if len(vectors) else None
        self._first_row, self._size = rows.start, size

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """What `VectorIndex.search` gives for an index of the whole corpus."""
        k = min(k, self._size)
        ids = np.full((len(queries), k), -1, np.int64)
        similarities = np.full((len(queries), k), -np.inf, np.float32)
        if self._share:
            own_ids, own_similarities = self._share.search(queries, k)
            ids[:, : own_ids.shape[1]] = own_ids + self._first_row
            similarities[:, : own_ids.shape[1]] = own_similarities
        ids = np.concatenate(gather_arrays(ids), axis=1)
        similarities = np.concatenate(gather_arrays(similarities), axis=1)
        best = np.lexsort((ids, -similarities), axis=1)[:, :k]
        return np.take_along_axis(ids, best, axis=1), np.take_along_axis(similarities, best, axis=1)


def recall(
    model: SemanticIndexBase,
    collator: TextCollator,
    corpus: Corpus,
    queries: Sequence[str],
    *,
    batch_size: int,
    recall_num: int,
    build: Callable[[np.ndarray], VectorIndex],
) -> Recall:
    """Searches the corpus for the `recall_num` documents nearest to each query; all ranks get the result.

    Each rank encodes, indexes and searches its share of the corpus. A corpus that is smaller gives all it has. build:
    makes the index of a share's vectors. Raises InputError, as when a vector isn't finite.
    """

    def encode(texts: Sequence[str], desc: str) -> np.ndarray:
        out = np.empty((len(texts), model.embedding_size), dtype=np.float32)
        return encode_texts(model.embed, texts, collator, batch_size, out, desc)

    rank, world_size = init_ranks()
    rows = split_evenly(len(corpus), world_size, rank)
    documents = encode(corpus[rows], "corpus")
    query_vectors = encode_share(len(queries), model.embedding_size, lambda share: encode(queries[share], "queries"))
    ids, similarities = ShardedIndex(build, documents, rows, len(corpus)).search(query_vectors, recall_num)
    exact = ShardedIndex(partial(build_index, "exact"), documents, rows, len(corpus))
    sample = slice(None, None, max(1, len(queries) // OVERLAP_SAMPLE))
    _, expected = exact.search(query_vectors[sample], recall_num)
    return Recall(ids, similarities, overlap(similarities[sample], expected))


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
    if not is_main_process():
        return 0
    result = Path(args.recall_result_dir) / args.recall_result_file
    write_hits(result, as_hits(found, corpus, queries))
    print(f"searched {len(corpus)} documents for {len(queries)} queries; the {args.ann} index found", end=" ")
    print(f"{100 * found.index_overlap:.2f} % of exact search's top {found.ids.shape[1]}")
    print(f"wrote {result}")
    return 0


if __name__ == "__main__":
    run(main)
