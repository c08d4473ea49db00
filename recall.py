"""Recalls the documents most similar to each query: encodes a corpus, indexes it, searches it, writes the hits."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH=1 leaves it out

import numpy as np

from ann_util import ANN_CHOICES, RESCORED, IndexOptions, add_index_args, check_index_args
from common.cli import (
    ArgumentParser,
    given_options,
    non_negative_float,
    number_in_range,
    positive_int,
    run,
    text_argument,
)
from common.errors import InputError
from common.files import is_within, make_folder, prepare_file, read_json, resolve_interrupted_replace
from common.logs import is_main_process, log
from common.options import add_encoder_args, add_evaluation_file_args, add_vector_dtype_arg, pick
from common.paddle_setup import set_up_paddle
from common.texts import DOCUMENT, QUERY
from common.vector_dtypes import FLOAT32
from data import parse_text, positives_by_query, read_text_pairs, read_texts, write_hits
from encoding.text_encoder import TextSample
from modeling.checkpoint_files import check_checkpoint, lowercases
from retrieval.corpus import Corpus, read_corpus
from retrieval.hybrid_search import (
    HYBRID,
    LEXICAL,
    MODES,
    VECTOR,
    hits_of,
    search,
    search_depth,
    tune_fusion,
    tuned_cutoff,
)
from retrieval.lexical_index import LEXICAL_CHOICES, Fusion
from retrieval.metrics import report_missing_positives
from retrieval.milvus_place import MILVUS, MilvusOptions, MilvusPlace, add_milvus_args, find_place
from retrieval.saved_index import INDEX_FILE, DocumentIndex, has_index, has_lexical_index, save_fusion

if TYPE_CHECKING:
    from encoding.text_encoder import Encoder, Fidelity

TUNING_LINES = 10
OF_NEW_COLLECTION = "milvus_index_type", "milvus_shards", "milvus_bulk_dir", "milvus_bulk_path"
OPTIONS_OF_NEW_INDEX = (*IndexOptions._fields, *OF_NEW_COLLECTION, "embedding_dir")
WAYS = {VECTOR: "vector", LEXICAL: "lexical", HYBRID: "both"}  # what a printed hit says


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
    dtype_help = f"type of the vectors in --embedding_dir and the index of --ann exact; with {RESCORED}, of candidates"
    add_vector_dtype_arg(parser, dtype_help)
    add_index_args(parser, (*ANN_CHOICES, RESCORED, MILVUS))
    add("--index_dir", help="save the index in this folder, or search the one there, which needs no --corpus_file")
    add("--add_corpus", metavar="FILE", help="add the documents of this file, one per line, to the saved index")
    add_lexical_args(parser)
    add_milvus_args(parser)
    return parser


def add_lexical_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the search by words."""
    add = parser.add_argument_group("words beside vectors").add_argument
    lexical_help = "index the words of the documents, too; an index that was saved without them gets them"
    add("--lexical", choices=LEXICAL_CHOICES, help=lexical_help)
    mode_help = "search by vectors, by words (lexical), or by both (default: both if the index has the words)"
    add("--mode", choices=MODES, help=mode_help)
    default, of_saved = Fusion(), "for a new index, its own for a saved one"
    weight_help = (
        f"how much the rank by words counts, where that by vectors counts 1 (default: {default[0]} {of_saved})"
    )
    add("--lexical_weight", type=non_negative_float, help=weight_help)
    k_help = (
        f"k of reciprocal rank fusion: the smaller, the more the first ranks count (default: {default[1]} {of_saved})"
    )
    add("--rrf_k", type=number_in_range(0), help=k_help)
    tune_help = "choose both by Recall@K on the pairs, print the table, and keep the choice in the saved index"
    add("--tune_lexical_weight", action="store_true", help=tune_help)


def check_inputs(
    corpus_file: str | None,
    index_dir: str | None,
    add_corpus: str | None,
    similar_text_pair_file: str | None,
    query: list[str] | None,
    interactive: bool,
    lexical: str | None,
    *,
    place: MilvusPlace | None,
    is_saved: bool,
) -> None:
    """Raises InputError if an option is missing: the documents to search, the index to add to, or the queries."""
    if place and lexical:
        raise InputError(f"--lexical {lexical}: keeps words beside an index on this machine; use it with another --ann")
    if not corpus_file and not is_saved:
        where = place or (f"--index_dir {index_dir}" if index_dir else None)
        why = f"{where} isn't there yet" if where else "there is no --index_dir to search"
        raise InputError(f"--corpus_file is needed: {why}")
    if add_corpus and not (index_dir or place):
        raise InputError("--add_corpus: give the --index_dir that the documents are added to")
    if not (similar_text_pair_file or query or interactive or index_dir or place):
        raise InputError("nothing to search for: give --similar_text_pair_file, --query or --interactive")


def check_new_index(
    options: IndexOptions, place: MilvusPlace | None, embedding_dir: str | None, corpus_size: int
) -> None:
    """Raises InputError if an index can't be built, or if nothing of it would be kept in the type of the vectors."""
    if options.ann == RESCORED and options.vector_dtype == FLOAT32:
        raise InputError(f"--ann {RESCORED}: give the --vector_dtype that candidates are found with, float16 or int8")
    if options.vector_dtype != FLOAT32 and (place or options.ann == "hnswlib") and not embedding_dir:
        problem = f"--vector_dtype {options.vector_dtype}: --ann {options.ann} keeps its vectors in float32"
        instead = ", an --milvus_index_type that takes less room" if place else ""
        raise InputError(f"{problem}; use --ann exact{instead}, or give an --embedding_dir, which then is smaller")
    if place is None:
        check_index_args(options, corpus_size)


def has_corpus(place: MilvusPlace | None, index_dir: str | None, rebuild: bool) -> bool:
    """Whether there is a complete index to search, in Milvus or in a folder. Raises InputError."""
    if place:
        return not rebuild and place.has_collection()
    return index_dir is not None and has_index(index_dir)


def choose_mode(
    mode: str | None, has_words: bool, tune_lexical_weight: bool, similar_text_pair_file: str | None
) -> str:
    """The way of searching, one of MODES. Raises InputError if options need words or pairs that there aren't.

    has_words: whether the index has words, or will have.
    """
    chosen = mode or (HYBRID if has_words else VECTOR)
    if chosen != VECTOR and not has_words:
        raise InputError(f"--mode {chosen}: the index has no words; add --lexical bm25")
    if tune_lexical_weight and chosen != HYBRID:
        remedy = f"leave out --mode {mode}" if has_words else "add --lexical bm25"
        raise InputError(f"--tune_lexical_weight: only --mode {HYBRID} has a weight; {remedy}")
    if tune_lexical_weight and not similar_text_pair_file:
        raise InputError("--tune_lexical_weight: give the --similar_text_pair_file with the pairs to tune on")
    return chosen


def check_folders(index_dir: str | None, folders: dict[str, str | None]) -> None:
    """Raises InputError if a folder lies in the index's folder, which is replaced. folders: option -> folder."""
    for option, folder in folders.items():
        if index_dir and folder and is_within(folder, index_dir):
            problem = f"lies in --index_dir {index_dir}, which is replaced as a whole with all that is in it"
            raise InputError(f"{option} {folder}: {problem}; give a folder outside it")


def read_inputs(
    similar_text_pair_file: str | None,
    corpus_file: str | None,
    add_corpus: str | None,
    calibration_file: str | None,
    *,
    lowercase: bool,
    skip_bad_lines: bool,
    check_columns: bool,
    label_column: bool,
) -> tuple[dict[str, set[str]], Corpus | None, Corpus | None, list[str] | None]:
    """The queries with their titles, the corpus, the documents to add, and the texts to calibrate on, if any.

    Raises InputError as the readers do.
    """
    reading = {"skip_bad_lines": skip_bad_lines, "check_columns": check_columns}
    pair_file = similar_text_pair_file
    pairs = read_text_pairs(pair_file, **reading, label_column=label_column) if pair_file else ()
    positives = positives_by_query(pairs)
    corpus = read_corpus(corpus_file, **reading, lowercase=lowercase) if corpus_file else None
    added = read_corpus(add_corpus, **reading, lowercase=lowercase) if add_corpus else None
    if corpus:
        report_missing_positives(corpus, positives)
    return positives, corpus, added, read_texts(calibration_file, **reading) if calibration_file else None


def texts_in_hand(
    queries: Sequence[str], corpus: Corpus | None, added: Corpus | None, is_saved: bool
) -> dict[str, Any]:
    """What `load_encoder` wants to know of the texts: how many it will encode, and a sample for calibrating."""
    text_count = len(queries) + len(added or ()) + (0 if is_saved else len(corpus or ()))
    return {"text_count": text_count, "sample": TextSample(corpus or (), queries)}


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


def report_unused_options(saved: MilvusPlace | str | None, mode: str, given: Mapping[str, Any]) -> None:
    """Logs the given options that have no effect. saved: where a saved index is, if any; given: option -> value."""
    if saved:
        used = {"target_recall"}
        if given.get("target_recall") == 0:  # then a saved index is searched with --hnsw_ef, too
            used.add("hnsw_ef")
        if isinstance(saved, MilvusPlace):
            used.add("ann")
        elif (file := resolve_interrupted_replace(saved) / INDEX_FILE).is_file():
            built = {"vector_dtype": FLOAT32, **read_json(file)}
            used |= {name for name in ("ann", "vector_dtype") if built.get(name) == given.get(name)}
        of_new_index = [name for name in OPTIONS_OF_NEW_INDEX if name not in used]
        if unused := _named(of_new_index, given):
            log(f"{saved}: is searched as it was built; options of a new index have no effect: {unused}")
    if (mode != HYBRID or "tune_lexical_weight" in given) and (unused := _named(Fusion._fields, given)):
        why = "--tune_lexical_weight chooses them" if mode == HYBRID else f"the mode is {mode}"
        log(f"{unused}: no effect, since {why}")


def _named(names: Iterable[str], given: Mapping[str, Any]) -> str:
    """Those of the options that are given, separated by commas."""
    return ", ".join(f"--{name}" for name in names if name in given)


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


def answer(encoder: "Encoder", document_index: DocumentIndex, query: str, recall_num: int, mode: str) -> list[str]:
    """Searches for a query; a line with the query and the time, then one per hit.

    That has rank, score and document and, with the mode hybrid, the way that found it.
    """
    start = time.perf_counter()
    found = search(document_index, [query], encoder.encode([query], role=QUERY), recall_num, mode)
    milliseconds = 1000 * (time.perf_counter() - start)
    lines = [
        f"{rank:3}  {score:.4f}  {f'{WAYS[way]:7}  ' if mode == HYBRID else ''}{document}"
        for rank, (score, way, document) in enumerate(found.of(0, document_index.documents), 1)
    ]
    return [f"{query} ({milliseconds:.0f} ms)", *lines]


def tune_weight(
    document_index: DocumentIndex,
    positives: Mapping[str, set[str]],
    query_vectors: np.ndarray,
    recall_num: int,
    index_dir: str | None,
) -> tuple[DocumentIndex, list[str]]:
    """The index with the best weight and k, and a table of the best and of both ways alone, with metrics in percent.

    index_dir: a saved index in which the choice is kept. Raises InputError if it can't be.
    """
    judged = tune_fusion(document_index, positives, query_vectors, recall_num)
    fused = [each for each in judged if each.mode == HYBRID]
    names = f"recall@{tuned_cutoff(recall_num)}", f"mrr@{recall_num}"
    lines = [f"mode     lexical_weight  rrf_k  {names[0]:>9}  {names[1]:>7}"]
    for each in judged:
        if each in fused[:TUNING_LINES] or each.mode != HYBRID:
            weight, rrf_k = each.fusion or ("", "")
            lines.append(f"{each.mode:7}  {weight:14}  {rrf_k:5}  {100 * each.recall:9.2f}  {100 * each.mrr:7.2f}")
    best = fused[0].fusion or document_index.fusion
    if index_dir:
        save_fusion(index_dir, best)
    return replace(document_index, fusion=best), lines


def recall_pairs(
    document_index: DocumentIndex,
    queries: Sequence[str],
    query_vectors: np.ndarray,
    recall_num: int,
    mode: str,
    result_file: Path,
) -> str:
    """Writes the recall result; says how the index was searched, and how many of exact search's hits it finds."""
    from retrieval.pipeline import measure_recall

    index, documents = document_index.index, document_index.documents
    found = search(document_index, queries, query_vectors, recall_num, mode)
    write_hits(result_file, hits_of(found, documents, queries))
    how = "by BM25"
    if mode != LEXICAL:
        k = min(search_depth(mode, recall_num), index.live_count)
        share = measure_recall(index, query_vectors, k)
        found_share = "" if share is None else f" found {100 * share:.2f} % of exact search's top {k}"
        how = f"{index}{found_share}"
    if mode == HYBRID:
        how += "; fused with BM25, weight {:g}, k {}".format(*document_index.fusion)
    return f"searched {index.live_count} documents for {len(queries)} queries; {how}\nwrote {result_file}"


def fidelity_of(encoder: "Encoder", document_index: DocumentIndex, queries: Sequence[str]) -> "Fidelity":
    """How close the encoder's precision is to fp32, on the first documents that aren't deleted, and on the queries.

    Without queries the documents are searched for themselves.
    """
    from encoding.text_encoder import SAMPLE_DOCUMENTS, compare_with_fp32

    sample = [document_index.documents[row] for row in document_index.index.sample_ids(SAMPLE_DOCUMENTS)]
    return compare_with_fp32(encoder, TextSample(sample, queries))


def opener(
    place: MilvusPlace | None, new: MilvusOptions | None, words: Fusion | None
) -> Callable[..., AbstractContextManager[DocumentIndex | None]]:
    """The function that opens or builds the index in Milvus or, without a place there, on this machine.

    new: see `open_or_build_collection`; words: see `open_or_build_index`.
    """
    from retrieval.milvus_pipeline import open_or_build_collection
    from retrieval.pipeline import open_or_build_index

    if place:
        return partial(open_or_build_collection, place=place, new=new)
    return partial(open_or_build_index, words=words)


def main(argv: Sequence[str] | None = None) -> int:
    """Builds, loads or changes the index, writes the recall result, and prints the hits of the other queries."""
    parser = build_parser()
    args = parser.parse_args(argv)
    place = find_place(milvus := MilvusOptions(**pick(args, MilvusOptions)), args.ann, args.index_dir)
    is_saved, where = has_corpus(place, args.index_dir, args.milvus_rebuild), place or args.index_dir
    check_inputs(**pick(args, check_inputs, place=place, is_saved=is_saved))
    lowercase = lowercases(check_checkpoint(args.params_path).parent, args.model_name_or_path)
    has_words = is_saved and place is None and has_lexical_index(args.index_dir)
    mode = choose_mode(**pick(args, choose_mode, has_words=has_words or args.lexical is not None))
    uses_result_dir = args.similar_text_pair_file or not (is_saved or args.embedding_dir)
    result_dir = args.recall_result_dir if uses_result_dir else None
    if not place:
        check_folders(args.index_dir, {"--embedding_dir": args.embedding_dir, "--recall_result_dir": result_dir})
    positives, corpus, added, calibration_texts = read_inputs(**pick(args, read_inputs, lowercase=lowercase))
    options, given = IndexOptions(**pick(args, IndexOptions)), given_options(parser, argv)
    report_unused_options(where if is_saved else None, mode, given)
    if not is_saved:
        check_new_index(options, place, args.embedding_dir, len(corpus or ()))

    set_up_paddle()
    from common.device import set_device
    from common.distributed import init_ranks
    from encoding.encoder import load_encoder
    from retrieval.pipeline import encode_queries

    set_device(args.device)
    init_ranks()
    queries = list(positives)
    in_hand = texts_in_hand(queries, corpus, added, is_saved)
    encoder = load_encoder(**pick(args, load_encoder, **in_hand, calibration_texts=calibration_texts))
    report_texts(encoder, [*queries, *(args.query or ())], [None if is_saved else corpus, added])
    gets_words = args.lexical is not None and not has_words
    is_changed = not is_saved or added is not None or args.target_recall is not None or gets_words
    result_file = Path(args.recall_result_dir, args.recall_result_file)
    if is_main_process():  # before hours of encoding
        prepare_outputs(result_dir, result_file if queries else None, args.index_dir if is_changed else None)
    query_vectors = encode_queries(encoder, queries)
    fusion = {name: given[name] for name in Fusion._fields if name in given}
    words, depth = Fusion(**fusion) if args.lexical else None, search_depth(mode, args.recall_num)
    open_or_build = opener(place, None if is_saved else milvus, words)
    sources = pick(args, open_or_build, corpus=corpus, added=added, options=options, parent=args.recall_result_dir)
    with open_or_build(encoder, query_vectors, depth, **sources) as document_index:
        if document_index is None:  # another rank searches
            return 0
        if where and is_changed:
            print(f"wrote {where}: {document_index.index} of {document_index.index.live_count} documents")
        document_index = replace(document_index, fusion=document_index.fusion._replace(**fusion))
        if args.tune_lexical_weight:
            kept_in, recall_num = args.index_dir, args.recall_num
            document_index, lines = tune_weight(document_index, positives, query_vectors, recall_num, kept_in)
            print("\n".join(lines))
        if queries:
            print(recall_pairs(document_index, queries, query_vectors, args.recall_num, mode, result_file))
        if encoder.embed_fp32:
            print(f"{encoder.precision}: {encoder.fidelity or fidelity_of(encoder, document_index, queries)}")
        for query in chain(args.query or (), typed_queries(sys.stdin) if args.interactive else ()):
            print("\n".join(answer(encoder, document_index, query, args.recall_num, mode)), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
