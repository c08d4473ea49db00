"""Recalls the documents most similar to each query: encodes a corpus, indexes it, searches it, writes the hits."""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

from ann_util import IndexOptions, add_index_args, check_index_args
from common.cli import ArgumentParser, given_options, positive_int, run, text_argument
from common.errors import InputError
from common.files import is_within, make_folder, prepare_file, read_json, resolve_interrupted_replace
from common.logs import is_main_process, log
from common.options import add_encoder_args, add_evaluation_file_args, pick
from common.paddle_setup import set_up_paddle
from common.texts import DOCUMENT, QUERY
from data import parse_text, positives_by_query, read_text_pairs, write_hits
from modeling.checkpoint_files import check_checkpoint, lowercases
from retrieval.corpus import Corpus, read_corpus
from retrieval.metrics import report_missing_positives
from retrieval.saved_index import INDEX_FILE, DocumentIndex, has_index

if TYPE_CHECKING:
    from encoding.encoder import Encoder


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser, "gpu", labels=True)
    add_evaluation_file_args(parser)
    add = parser.add_argument
    query_help = "search for this text and print the hits; may be given several times"
    add("--query", action="append", type=text_argument, help=query_help)
    add("--interactive", action="store_true", help="search for each line of standard input and print the hits")
    add("--recall_num", type=positive_int, default=10, help="documents recalled per query")
    vectors_help = "keep the corpus's vectors in this folder, so that an interrupted run can be resumed"
    add("--embedding_dir", help=vectors_help)
    add_index_args(parser)
    add("--index_dir", help="save the index in this folder, or search the one there, which needs no --corpus_file")
    add("--add_corpus", metavar="FILE", help="add the documents of this file, one per line, to the saved index")
    return parser


def check_inputs(
    corpus_file: str | None,
    index_dir: str | None,
    add_corpus: str | None,
    similar_text_pair_file: str | None,
    query: list[str] | None,
    interactive: bool,
) -> None:
    """Raises InputError if an option is missing: the documents to search, the index to add to, or the queries."""
    if not corpus_file and not (index_dir and has_index(index_dir)):
        why = f"--index_dir {index_dir} isn't there yet" if index_dir else "there is no --index_dir to search"
        raise InputError(f"--corpus_file is needed: {why}")
    if add_corpus and not index_dir:
        raise InputError("--add_corpus: give the --index_dir that the documents are added to")
    if not (similar_text_pair_file or query or interactive or index_dir):
        raise InputError("nothing to search for: give --similar_text_pair_file, --query or --interactive")


def check_folders(index_dir: str, folders: dict[str, str | None]) -> None:
    """Raises InputError if a folder lies in the index's folder, which is replaced. folders: option -> folder."""
    for option, folder in folders.items():
        if folder and is_within(folder, index_dir):
            problem = f"lies in --index_dir {index_dir}, which is replaced as a whole with all that is in it"
            raise InputError(f"{option} {folder}: {problem}; give a folder outside it")


def read_inputs(
    similar_text_pair_file: str | None,
    corpus_file: str | None,
    add_corpus: str | None,
    *,
    lowercase: bool,
    skip_bad_lines: bool,
    check_columns: bool,
    label_column: bool,
) -> tuple[dict[str, set[str]], Corpus | None, Corpus | None]:
    """The queries with their titles, the corpus, and the documents to add. Raises InputError as the readers do."""
    reading = {"skip_bad_lines": skip_bad_lines, "check_columns": check_columns}
    pair_file = similar_text_pair_file
    pairs = read_text_pairs(pair_file, **reading, label_column=label_column) if pair_file else ()
    positives = positives_by_query(pairs)
    corpus = read_corpus(corpus_file, **reading, lowercase=lowercase) if corpus_file else None
    added = read_corpus(add_corpus, **reading, lowercase=lowercase) if add_corpus else None
    if corpus:
        report_missing_positives(corpus, positives)
    return positives, corpus, added


def report_texts(encoder: "Encoder", queries: Sequence[str], corpora: Sequence[Corpus | None]) -> None:
    """Logs how many of the texts are cut or unknown, if they are many. Raises InputError if almost all are unknown."""
    from encoding.token_statistics import report_tokens

    documents = {f"documents of {corpus.path}": corpus for corpus in corpora if corpus}
    report_tokens(encoder.tokenizer, {"queries": queries}, QUERY)
    report_tokens(encoder.tokenizer, documents, DOCUMENT)


def prepare_outputs(result_dir: str | None, result_file: Path | None, index_dir: str | None) -> None:
    """Creates the folders of the output. Raises InputError if something couldn't be written there."""
    if result_dir:
        make_folder(result_dir)
    if result_file:
        prepare_file(result_file)
    if index_dir:
        make_folder(Path(index_dir).absolute().parent)


def report_unused_options(index_dir: str, given: Mapping[str, Any]) -> None:
    """Logs the given options that have no effect on a saved index. given: option -> value."""
    file = resolve_interrupted_replace(index_dir) / INDEX_FILE
    used = {"target_recall"}
    if given.get("target_recall") == 0:  # then a saved index is searched with --hnsw_ef, too
        used.add("hnsw_ef")
    if file.is_file() and read_json(file).get("ann") == given.get("ann"):
        used.add("ann")
    unused = [f"--{name}" for name in (*IndexOptions._fields, "embedding_dir") if name in given and name not in used]
    if unused:
        log(f"{index_dir}: is searched as it was built; options of a new index have no effect: {', '.join(unused)}")


def typed_queries(stream: TextIO | None) -> Iterator[str]:
    """The queries typed on stdin, one per line; other lines are reported and skipped. stream: None if it is closed."""
    if stream is None:
        return
    if stream.isatty():
        log("type a query and press Enter; Ctrl-D ends")
    encoding = "utf-8" if stream.encoding == "ascii" else stream.encoding  # ascii: a locale that says nothing
    for line in stream.buffer:  # decoded here: the stream itself may fail on bytes of another encoding, or accept them
        try:
            yield parse_text(line.decode(encoding))
        except ValueError as error:
            log(f"not a query: {error}")


def answer(encoder: "Encoder", document_index: DocumentIndex, query: str, recall_num: int) -> list[str]:
    """Searches for a query; a line with the query and the time, then one per hit with rank, cosine and document."""
    start = time.perf_counter()
    ids, similarities = document_index.index.search(encoder.encode([query], role=QUERY), recall_num)
    milliseconds = 1000 * (time.perf_counter() - start)
    hits = enumerate(zip(ids[0], similarities[0], strict=True), 1)
    lines = [f"{rank:3}  {similarity:.4f}  {document_index.documents[row]}" for rank, (row, similarity) in hits]
    return [f"{query} ({milliseconds:.0f} ms)", *lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, loads or changes the index, writes the recall result, and prints the hits of the other queries."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_inputs(**pick(args, check_inputs))
    lowercase = lowercases(check_checkpoint(args.params_path).parent, args.model_name_or_path)
    is_saved = args.index_dir is not None and has_index(args.index_dir)
    uses_result_dir = args.similar_text_pair_file or not (is_saved or args.embedding_dir)
    result_dir = args.recall_result_dir if uses_result_dir else None
    if args.index_dir:
        check_folders(args.index_dir, {"--embedding_dir": args.embedding_dir, "--recall_result_dir": result_dir})
    positives, corpus, added = read_inputs(**pick(args, read_inputs, lowercase=lowercase))
    options = IndexOptions(**pick(args, IndexOptions))
    if is_saved:
        report_unused_options(args.index_dir, given_options(parser, argv))
    else:
        check_index_args(options, len(corpus or ()))

    set_up_paddle()
    from common.device import set_device
    from common.distributed import init_ranks
    from encoding.encoder import SAMPLE_DOCUMENTS, compare_with_fp32, load_encoder
    from retrieval import pipeline

    set_device(args.device)
    init_ranks()
    queries = list(positives)
    text_count = len(queries) + len(added or ()) + (0 if is_saved else len(corpus or ()))
    encoder = load_encoder(**pick(args, load_encoder, text_count=text_count))
    report_texts(encoder, [*queries, *(args.query or ())], [None if is_saved else corpus, added])
    is_changed = not is_saved or added is not None or args.target_recall is not None
    result_file = Path(args.recall_result_dir, args.recall_result_file)
    if is_main_process():  # before hours of encoding
        prepare_outputs(result_dir, result_file if queries else None, args.index_dir if is_changed else None)
    query_vectors = pipeline.encode_queries(encoder, queries)
    folders = {"parent": args.recall_result_dir, "index_dir": args.index_dir, "embedding_dir": args.embedding_dir}
    with pipeline.open_or_build_index(
        encoder, query_vectors, args.recall_num, corpus=corpus, added=added, options=options, **folders
    ) as document_index:
        if document_index is None:  # another rank searches
            return 0
        index, documents = document_index.index, document_index.documents
        if args.index_dir and is_changed:
            print(f"wrote {args.index_dir}: {index} of {index.live_count} documents")
        if queries:
            result = pipeline.search(index, query_vectors, args.recall_num)
            write_hits(result_file, pipeline.hits_of(result, documents, queries))
            found = f"{100 * result.recall_vs_exact:.2f} % of exact search's top {result.ids.shape[1]}"
            print(f"searched {index.live_count} documents for {len(queries)} queries; {index} found {found}")
            print(f"wrote {result_file}")
        if encoder.embed_fp32:
            sample = [documents[row] for row in index.live_ids()[:SAMPLE_DOCUMENTS]]
            fidelity = compare_with_fp32(encoder, sample, queries or sample[: pipeline.SAMPLE])
            print(f"{encoder.precision}: {fidelity}")
        for query in chain(args.query or (), typed_queries(sys.stdin) if args.interactive else ()):
            print("\n".join(answer(encoder, document_index, query, args.recall_num)), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
