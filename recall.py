"""Recalls the documents nearest to each query: encodes the corpus, indexes it, searches it, writes the hits."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ann_util import IndexOptions, add_index_args, check_index_args
from common.cli import ArgumentParser, positive_int, run, text_argument
from common.errors import InputError
from common.files import is_within, make_folder, prepare_file
from common.logs import is_main_process, log
from common.options import add_encoder_args, add_evaluation_file_args, pick
from common.paddle_setup import set_up_paddle
from data import Corpus, parse_text, positives_by_query, read_corpus, read_text_pairs, write_hits
from modeling.checkpoint_files import check_checkpoint
from retrieval.metrics import report_missing_positives
from retrieval.saved_index import DocumentIndex, has_index

if TYPE_CHECKING:
    from encoding.encoder import Encoder


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser, "gpu")
    add_evaluation_file_args(parser)
    add = parser.add_argument
    query = "search for this text and print the hits; may be given several times"
    add("--query", action="append", type=text_argument, help=query)
    add("--interactive", action="store_true", help="search for each line that is typed")
    add("--recall_num", type=positive_int, default=10, help="documents recalled for a query")
    vectors = "keep the corpus's vectors in this folder, so that an interrupted run can be resumed"
    add("--embedding_dir", help=vectors)
    add_index_args(parser)
    add("--index_dir", help="keep the index in this folder; if it exists, it is searched as it is")
    add("--add_corpus", metavar="FILE", help="add these documents, one a line, to the saved index")
    return parser


def check_inputs(corpus_file: str | None, index_dir: str | None, is_searched: bool, is_added_to: bool) -> None:
    """Raises InputError for options that leave nothing to search, or nothing to do."""
    if not corpus_file and not (index_dir and has_index(index_dir)):
        why = f"--index_dir {index_dir} isn't there yet" if index_dir else "there is no --index_dir to search"
        raise InputError(f"--corpus_file is needed: {why}")
    if is_added_to and not index_dir:
        raise InputError("--add_corpus: give the --index_dir that the documents are added to")
    if not is_searched and not index_dir:
        raise InputError("nothing to search for: give --similar_text_pair_file, --query or --interactive")


def check_folders(index_dir: str, folders: dict[str, str | None]) -> None:
    """Raises InputError if one of the `folders`, option -> folder, lies in the index's, which is replaced."""
    for option, folder in folders.items():
        if folder and is_within(folder, index_dir):
            problem = f"lies in --index_dir {index_dir}, which is replaced as a whole with all that is in it"
            raise InputError(f"{option} {folder}: {problem}; give a folder outside it")


def read_inputs(
    similar_text_pair_file: str | None, corpus_file: str | None, add_corpus: str | None, skip_bad_lines: bool
) -> tuple[dict[str, set[str]], Corpus | None, Corpus | None]:
    """The queries with their titles, the corpus, and the documents to add. Raises InputError."""
    file = similar_text_pair_file
    pairs = read_text_pairs(file, skip_bad_lines=skip_bad_lines) if file else []
    corpus = read_corpus(corpus_file, skip_bad_lines=skip_bad_lines) if corpus_file else None
    added = read_corpus(add_corpus, skip_bad_lines=skip_bad_lines) if add_corpus else None
    positives = positives_by_query(pairs)
    if corpus:
        report_missing_positives(corpus, positives)
    return positives, corpus, added


def prepare_outputs(result_dir: str | None, result_file: Path | None, index_dir: str | None) -> None:
    """Creates the folders of what will be written. Raises InputError if something couldn't be written."""
    if result_dir:
        make_folder(result_dir)
    if result_file:
        prepare_file(result_file)
    if index_dir:
        make_folder(Path(index_dir).absolute().parent)


def report_unused_options(index_dir: str, options: IndexOptions, embedding_dir: str | None) -> None:
    """Logs the given options that only apply to a new index, if there is a saved one."""
    defaults = IndexOptions(target_recall=options.target_recall)
    if options.target_recall == 0:
        defaults = defaults._replace(hnsw_ef=options.hnsw_ef)
    given = [f"--{name}" for name, value in options._asdict().items() if value != getattr(defaults, name)]
    if embedding_dir:
        given.append("--embedding_dir")
    if given:
        log(f"{index_dir}: is searched as it was built; what is for a new index has no effect: {', '.join(given)}")


def typed_queries(stream: TextIO | None) -> Iterator[str]:
    """The typed queries, one a line; a line that can't be one is reported and skipped. None: stdin is closed."""
    if stream is None:
        return
    if stream.isatty():
        log("type a query and press Enter; Ctrl-D ends")
    for line in stream.buffer:  # decoded here, since the stream would fail on, or accept, bytes of another encoding
        try:
            yield parse_text(line.decode(stream.encoding))
        except ValueError as error:
            log(f"not a query: {error}")


def answer(encoder: "Encoder", saved: DocumentIndex, query: str, recall_num: int) -> list[str]:
    """The query with the time that its answer took, then a line with rank, cosine and document for each hit."""
    start = time.perf_counter()
    ids, similarities = saved.index.search(encoder.encode([query]), recall_num)
    milliseconds = 1000 * (time.perf_counter() - start)
    hits = enumerate(zip(ids[0], similarities[0], strict=True), 1)
    lines = [f"{rank:3}  {similarity:.4f}  {saved.documents[row]}" for rank, (row, similarity) in hits]
    return [f"{query} ({milliseconds:.0f} ms)", *lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the recall result, answers queries, and reports how exact the index is."""
    args = build_parser().parse_args(argv)
    is_searched = bool(args.similar_text_pair_file or args.query or args.interactive)
    check_inputs(args.corpus_file, args.index_dir, is_searched, args.add_corpus is not None)
    check_checkpoint(args.params_path)
    is_saved = args.index_dir is not None and has_index(args.index_dir)
    uses_result_dir = args.similar_text_pair_file or not (is_saved or args.embedding_dir)
    result_dir = args.recall_result_dir if uses_result_dir else None
    if args.index_dir:
        check_folders(args.index_dir, {"--embedding_dir": args.embedding_dir, "--recall_result_dir": result_dir})
    positives, corpus, added = read_inputs(**pick(args, read_inputs))
    options = IndexOptions(**pick(args, IndexOptions))
    if is_saved:
        report_unused_options(args.index_dir, options, args.embedding_dir)
    else:
        check_index_args(options, len(corpus or ()))

    set_up_paddle()
    from common.device import set_device
    from common.distributed import init_ranks
    from encoding.encoder import compare_with_fp32, load_encoder
    from retrieval import pipeline

    set_device(args.device)
    init_ranks()
    queries = list(positives)
    new_texts = (() if is_saved else corpus or (), added or (), queries)
    encoder = load_encoder(**pick(args, load_encoder, text_count=sum(map(len, new_texts))))
    is_changed = not is_saved or added is not None or args.target_recall is not None
    result_file = Path(args.recall_result_dir, args.recall_result_file)
    if is_main_process():  # before hours of encoding
        prepare_outputs(result_dir, result_file if queries else None, args.index_dir if is_changed else None)
    query_vectors = pipeline.encode_queries(encoder, queries)
    places = pick(args, pipeline.open_or_build_index, parent=args.recall_result_dir)
    searches = (encoder, query_vectors, args.recall_num)
    with pipeline.open_or_build_index(*searches, corpus=corpus, added=added, options=options, **places) as saved:
        if saved is None:  # another rank searches
            return 0
        if args.index_dir and is_changed:
            print(f"wrote {args.index_dir}: {saved.index} of {len(saved.documents)} documents")
        if queries:
            result = pipeline.search(saved.index, query_vectors, args.recall_num)
            write_hits(result_file, pipeline.hits_of(result, saved.documents, queries))
            print(f"searched {len(saved.documents)} documents for {len(queries)} queries; {saved.index} found", end=" ")
            print(f"{100 * result.recall_vs_exact:.2f} % of exact search's top {result.ids.shape[1]}")
            print(f"wrote {result_file}")
        if encoder.embed_fp32:
            sample = queries or saved.documents[: pipeline.SAMPLE]
            print(f"{encoder.precision}: {compare_with_fp32(encoder, saved.documents, sample)}")
        for query in chain(args.query or (), typed_queries(sys.stdin) if args.interactive else ()):
            print("\n".join(answer(encoder, saved, query, args.recall_num)), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
