"""Recalls the documents nearest to each query: encodes the corpus, indexes it, searches it, writes the hits."""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from ann_util import (
    HnswIndex,
    IndexOptions,
    VectorIndex,
    add_index_args,
    build_index,
    check_index_args,
    overlap,
)
from data import (
    Corpus,
    Hit,
    add_encoding_args,
    add_evaluation_file_args,
    add_skip_bad_lines_arg,
    encode_texts,
    parse_text,
    read_corpus,
    read_text_pairs,
    text_argument,
    titles_by_query,
    write_hits,
)
from embeddings import SHARD_ROWS, Description, Embeddings, temporary_folder, temporary_place
from files import is_within, make_folder, prepare_file
from index_folder import SavedIndex, check_index_fits, has_index, load_index, locked_index, save_index
from runtime import ArgumentParser, InputError, at_least, is_main_process, log, progress_bar, run, set_up_paddle

if __name__ == "__main__":
    set_up_paddle()

from base_model import add_checkpoint_args, add_device_arg, set_device
from distributed import barrier, broadcast_array, encode_share, init_ranks
from encoder import Encoder, add_engine_args, compare_with_fp32, load_encoder

SAMPLE = 200  # queries on which the index is compared with exact search: half a point is one hit in 200


class Recall(NamedTuple):
    """What a search gave; row q of both arrays belongs to the q-th query, best first."""

    ids: np.ndarray  # int64 [Q, k], rows of the corpus
    similarities: np.ndarray  # float32 [Q, k], cosines
    index_overlap: float  # share of exact search's hits that the index found, on a sample of the queries


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def encode_corpus(encoder: Encoder, corpus: Corpus, folder: str | Path) -> Embeddings:
    """The vectors of all documents, on disk: the ranks take turns with the shards that aren't there yet.

    Raises InputError, as when a vector isn't finite, or the folder holds those of another corpus or model.
    """
    description = Description(
        encoder.fingerprint, encoder.precision, corpus.sha256, len(corpus), encoder.embedding_size
    )
    embeddings = Embeddings(folder, description)
    rank, world_size = init_ranks()
    own = [number for number in embeddings.missing() if number % world_size == rank]
    shards = embeddings.shards
    with progress_bar(sum(shards[number].stop - shards[number].start for number in own), "corpus", "text") as progress:
        for number in own:
            texts = corpus[shards[number]]
            vectors = encode_texts(encoder.embed, texts, encoder.collator, encoder.batch_size, progress)
            embeddings.write(number, vectors)
    barrier()
    if embeddings.missing():
        raise InputError(f"{folder}: lacks what other processes encoded; all must see the same folder, on all machines")
    return embeddings


def encode_queries(encoder: Encoder, queries: Sequence[str]) -> np.ndarray:
    """Vectors of the queries, float32 [Q, D]; each rank encodes a share, all get them all."""
    return encode_share(len(queries), encoder.embedding_size, lambda share: encoder(queries[share], "queries"))


@contextlib.contextmanager
def embedding_folder(embedding_dir: str | None, parent: str | Path) -> Iterator[Path]:
    """`embedding_dir`, or else a folder in `parent` that is gone afterwards; all ranks get the same."""
    if embedding_dir:
        yield Path(embedding_dir)
        return
    parent, number = Path(parent), np.random.default_rng().integers(1 << 32, size=1)
    with temporary_folder(parent, number[0]) if is_main_process() else contextlib.nullcontext():
        yield temporary_place(parent, broadcast_array(number)[0])


def sample_of(rows: Sequence[str] | np.ndarray, *, other: bool = False) -> Sequence[str] | np.ndarray:
    """Up to twice SAMPLE of the rows, from all over them; `other` takes others than without, if there are enough."""
    step = max(1, len(rows) // SAMPLE)
    return rows[step // 2 if other else 0 :: step]


def tune(index: VectorIndex, queries: np.ndarray, k: int, lowest_ef: int = 0) -> None:
    """Tunes `ef` of an index that has a share, on a sample of the queries, unit vectors [Q, D]."""
    if index.share and len(queries):
        index.tune_ef(sample_of(queries, other=True), k, index.share)  # not on those that `search` judges it by
        index.ef = max(index.ef, lowest_ef)


def search(index: VectorIndex, queries: np.ndarray, k: int) -> Recall:
    """Searches for all queries, unit vectors [Q, D], and compares a sample with exact search."""
    ids, similarities = index.search(queries, k)
    _, expected = index.search_exactly(sample_of(queries), k)
    return Recall(ids, similarities, overlap(sample_of(similarities), expected))


def recall(
    encoder: Encoder, corpus: Corpus, queries: Sequence[str], *, recall_num: int, options: IndexOptions, folder: Path
) -> Recall:
    """Searches the corpus for the `recall_num` documents nearest to each query; all ranks get the result.

    All ranks encode, rank 0 indexes and searches. folder: for the vectors meanwhile. A corpus that is smaller gives all
    it has. Raises InputError, as when a vector isn't finite.
    """
    query_vectors = encode_queries(encoder, queries)
    k = min(recall_num, len(corpus))
    found = Recall(np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32), 0.0)
    with embedding_folder(None, folder) as shards:
        vectors = encode_corpus(encoder, corpus, shards)
        if is_main_process():
            index = build_index(options, vectors)
            tune(index, query_vectors, k)
            found = search(index, query_vectors, k)
        index_overlap = broadcast_array(np.array([found.index_overlap]))[0]
    return Recall(broadcast_array(found.ids), broadcast_array(found.similarities), float(index_overlap))


def add_documents(encoder: Encoder, saved: SavedIndex, added: Corpus, added_file: str) -> list[str]:
    """Adds to the index the documents that it doesn't have yet, and returns them. Raises InputError if it has all."""
    new = dict.fromkeys(added)
    for document in saved.documents:
        new.pop(document, None)
    if not new:
        raise InputError(f"--add_corpus {added_file}: the index has all of its documents already")
    if len(new) < len(added):
        log(f"{added_file}: left out {len(added) - len(new)} documents that the index has")
    documents = list(new)
    for start in range(0, len(documents), SHARD_ROWS):
        saved.index.add(encoder(documents[start : start + SHARD_ROWS], "added"))
    return documents


# ---------------------------------------------------------------------------------------------------------------------
# Results


def as_hits(found: Recall, corpus: Corpus, queries: Sequence[str]) -> Iterator[Hit]:
    """The hits of all queries in their order, best first."""
    for query, ids, similarities in zip(queries, found.ids, found.similarities, strict=True):
        for row, similarity in zip(ids, similarities, strict=True):
            yield Hit(query, corpus[row], float(similarity))


def answer(encoder: Encoder, saved: SavedIndex, query: str, recall_num: int) -> list[str]:
    """A line with the time that the answer took, then rank, cosine and document of each hit."""
    start = time.perf_counter()
    ids, similarities = saved.index.search(encoder([query]), recall_num)
    milliseconds = 1000 * (time.perf_counter() - start)
    hits = zip(ids[0], similarities[0], strict=True)
    lines = [f"{rank:3}  {similarity:.4f}  {saved.documents[row]}" for rank, (row, similarity) in enumerate(hits, 1)]
    return [f"{query} ({milliseconds:.0f} ms)", *lines]


def typed_queries(stream: TextIO | None) -> Iterator[str]:
    """The queries that are typed, a line each; what can't be one is reported and passed over. None: stdin is closed."""
    if stream is None:
        return
    if stream.isatty():
        log("type a query and press Enter; Ctrl-D ends")
    for line in stream.buffer:  # the stream itself might fail at bytes of another encoding, or let them pass
        try:
            yield parse_text(line.decode(stream.encoding))
        except ValueError as error:
            log(f"not a query: {error}")


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


def report_options_of_new_indexes(index_dir: str, options: IndexOptions, embedding_dir: str | None) -> None:
    """Logs those that were given, if any, where there is an index already."""
    defaults = IndexOptions(tune_ef=options.tune_ef)
    if options.tune_ef == 0:
        defaults = defaults._replace(hnsw_ef=options.hnsw_ef)
    given = [f"--{name}" for name, value in options._asdict().items() if value != getattr(defaults, name)]
    if embedding_dir:
        given.append("--embedding_dir")
    if given:
        log(f"{index_dir}: is searched as it was built; what is for a new index has no effect: {', '.join(given)}")


# ---------------------------------------------------------------------------------------------------------------------
# The script


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_checkpoint_args(parser)
    add_evaluation_file_args(parser)
    add_skip_bad_lines_arg(parser)
    parser.add_argument(
        "--query",
        action="append",
        type=text_argument,
        help="search for this text and print the hits; may be given again",
    )
    parser.add_argument("--interactive", action="store_true", help="search for each line that is typed")
    parser.add_argument("--recall_num", type=at_least(1), default=10, help="documents recalled for a query")
    add_encoding_args(parser)
    add_engine_args(parser)
    parser.add_argument(
        "--embedding_dir", help="keep the corpus's vectors in this folder; a run that was stopped goes on with them"
    )
    add_index_args(parser)
    parser.add_argument("--index_dir", help="keep the index in this folder; if it is there, it is searched as it is")
    parser.add_argument("--add_corpus", metavar="FILE", help="add these documents, one a line, to the index there")
    add_device_arg(parser, default="gpu")
    return parser


def check_folders(index_dir: str, folders: dict[str, str | None]) -> None:
    """Raises InputError if one of the `folders`, option -> folder, is or lies in the index's, which is replaced."""
    for option, folder in folders.items():
        if folder and is_within(folder, index_dir):
            raise InputError(
                f"{option} {folder}: lies in --index_dir {index_dir}, which is replaced as a whole with all that is in "
                "it; give a folder outside it"
            )


def check_inputs(corpus_file: str | None, index_dir: str | None, is_searched: bool, is_added_to: bool) -> None:
    """Raises InputError for options that leave nothing to search, or nothing to do."""
    if not corpus_file and not (index_dir and has_index(index_dir)):
        why = f"--index_dir {index_dir} isn't there yet" if index_dir else "there is no --index_dir to search"
        raise InputError(f"--corpus_file is needed: {why}")
    if is_added_to and not index_dir:
        raise InputError("--add_corpus: give the --index_dir that the documents are added to")
    if not is_searched and not index_dir:
        raise InputError("nothing to search for: give --similar_text_pair_file, --query or --interactive")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the recall result, answers queries, and says how exact the index was."""
    args = build_parser().parse_args(argv)
    by_hand = args.query or args.interactive
    check_inputs(
        args.corpus_file, args.index_dir, bool(args.similar_text_pair_file or by_hand), args.add_corpus is not None
    )
    is_saved = args.index_dir is not None and has_index(args.index_dir)
    is_result_dir_used = args.similar_text_pair_file or not (is_saved or args.embedding_dir)
    result_dir = args.recall_result_dir if is_result_dir_used else None
    if args.index_dir:
        check_folders(args.index_dir, {"--embedding_dir": args.embedding_dir, "--recall_result_dir": result_dir})
    positives = {}
    if args.similar_text_pair_file:
        positives = titles_by_query(read_text_pairs(args.similar_text_pair_file, skip_bad_lines=args.skip_bad_lines))
    corpus = read_corpus(args.corpus_file, skip_bad_lines=args.skip_bad_lines) if args.corpus_file else None
    added = read_corpus(args.add_corpus, skip_bad_lines=args.skip_bad_lines) if args.add_corpus else None
    options = IndexOptions(**{name: getattr(args, name) for name in IndexOptions._fields})
    if corpus:
        report_missing_positives(corpus, positives, args.corpus_file)
    if is_saved:
        report_options_of_new_indexes(args.index_dir, options, args.embedding_dir)
    else:
        check_index_args(options, len(corpus))

    set_device(args.device)
    init_ranks()
    queries = list(positives)
    encoder = load_encoder(
        args.params_path,
        batch_size=args.batch_size,
        text_count=len(queries) + (0 if is_saved else len(corpus)) + len(added or ()),
        engine=args.engine,
        precision=args.precision,
        model_name_or_path=args.model_name_or_path,
        output_emb_size=args.output_emb_size,
        max_seq_length=args.max_seq_length,
    )
    is_changed = not is_saved or added or args.tune_ef is not None
    result_file = Path(args.recall_result_dir) / args.recall_result_file
    if is_main_process():  # before hours of encoding
        if result_dir:
            make_folder(result_dir)
        if queries:
            prepare_file(result_file)
        if args.index_dir and is_changed:
            make_folder(Path(args.index_dir).absolute().parent)
    query_vectors = encode_queries(encoder, queries)
    with contextlib.ExitStack() as held:
        vectors = None
        if not is_saved:
            folder = held.enter_context(embedding_folder(args.embedding_dir, args.recall_result_dir))
            vectors = encode_corpus(encoder, corpus, folder)
        if not is_main_process():
            return 0
        if is_saved:
            if is_changed:
                held.enter_context(locked_index(args.index_dir))
            saved = load_index(args.index_dir)
            check_index_fits(args.index_dir, saved, encoder.fingerprint, corpus)
            if args.tune_ef is not None and isinstance(saved.index, HnswIndex):
                saved.index.share, saved.index.ef = args.tune_ef, args.hnsw_ef
        else:
            saved = SavedIndex(build_index(options, vectors), corpus, encoder.fingerprint, corpus.sha256)
        new = add_documents(encoder, saved, added, args.add_corpus) if added else []
        if is_changed and saved.index.share:
            sample = query_vectors if queries else encoder(sample_of(saved.documents))
            # More documents don't make do with less, but this run's --recall_num may be smaller than the one before.
            is_kept = is_saved and args.tune_ef is None
            tune(saved.index, sample, args.recall_num, lowest_ef=saved.index.ef if is_kept else 0)
        if args.index_dir and is_changed:
            if not is_saved and has_index(args.index_dir):
                raise InputError(f"{args.index_dir}: another run has written it meanwhile; start again to search that")
            saved = save_index(args.index_dir, saved, new)
            print(f"wrote {args.index_dir}: {saved.index} of {len(saved.documents)} documents")
        if queries:
            found = search(saved.index, query_vectors, args.recall_num)
            write_hits(result_file, as_hits(found, saved.documents, queries))
            print(f"searched {len(saved.documents)} documents for {len(queries)} queries; {saved.index} found", end=" ")
            print(f"{100 * found.index_overlap:.2f} % of exact search's top {found.ids.shape[1]}")
            print(f"wrote {result_file}")
        if encoder.embed_fp32:
            texts = queries or saved.documents[:SAMPLE]
            print(f"{encoder.precision}: {compare_with_fp32(encoder, saved.documents, texts)}")
        for query in chain(args.query or (), typed_queries(sys.stdin) if args.interactive else ()):
            print("\n".join(answer(encoder, saved, query, args.recall_num)), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
