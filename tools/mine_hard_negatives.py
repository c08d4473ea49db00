"""Mines hard negatives: searches the corpus with a trained model, or by words, for hits that look right, but aren't."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from ann_util import IndexOptions, add_index_args, check_index_args
from batch_negative.batches import FalseNegativeMask
from common.cli import ArgumentParser, add_switch, non_negative_float, number_in_range, positive_int, run
from common.errors import InputError
from common.files import is_within, make_folder, prepare_file, remove_folder, sha256
from common.logs import is_main_process, log
from common.options import add_encoder_args, call, pick
from common.paddle_setup import set_up_paddle
from common.texts import DOCUMENT, QUERY, text_ids
from data import TextPair, read_text_pairs, read_texts
from mining.hard_negatives import KnownPositives, MiningRules
from mining.searchers import LexicalSearcher, Searcher, VectorSearcher
from mining.teachers import TeacherScores
from modeling.checkpoint_files import check_checkpoint, lowercases
from retrieval.corpus import Corpus, read_corpus
from retrieval.lexical_index import LEXICAL_CHOICES, LexicalIndex
from retrieval.saved_index import has_index

if TYPE_CHECKING:
    from encoding.text_encoder import Encoder

WORK_SUFFIX = ".mining"  # of the folder beside the output that keeps what is done, until the output is complete


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__)
    add_encoder_args(parser, "gpu", required=False, labels=True)
    add = parser.add_argument
    lexical_help = "search by words instead of with --params_path: before there is a model, or to learn from it"
    add("--lexical", choices=LEXICAL_CHOICES, help=lexical_help)
    add("--train_set_file", required=True, help="training pairs; other columns than query and title are left out")
    add("--corpus_file", help="documents, one per line, of which the hard negatives are taken")
    add("--output", required=True, help="the training file to write, query<TAB>title[<TAB>hard negative]...")
    scores_help = "write the scores of title and hard negatives, too, for train_batch_neg.py --teacher_scores"
    add("--write_scores", action="store_true", help=scores_help)
    add_rule_args(parser)
    group = parser.add_argument_group("teacher, whose scores count instead of those of the search")
    path_help = "checkpoint of another, better model, which encodes the documents, too"
    group.add_argument("--teacher_params_path", help=path_help)
    file_help = "lines query<TAB>document<TAB>score, such as a cross-encoder's; hits without a score are left out"
    group.add_argument("--teacher_score_file", help=file_help)
    add_index_args(parser)
    add("--index_dir", help="search the index in this folder, or save it there (default: it isn't kept)")
    add("--embedding_dir", help="keep the corpus's vectors in this folder (default: they aren't kept)")
    return parser


def add_rule_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which hits are taken."""
    default = MiningRules()
    group = parser.add_argument_group("which hits are hard negatives")
    add = group.add_argument
    add("--negatives", type=positive_int, default=default.negatives, help="hard negatives of each pair")
    add("--from_rank", type=positive_int, default=default.from_rank, help="first rank of the search that is taken")
    add("--to_rank", type=positive_int, default=default.to_rank, help="last rank of the search that is taken")
    score_help = "leave out hits with a higher score than this share of the score of the pair's title"
    add("--max_relative_score", type=non_negative_float, default=default.max_relative_score, help=score_help)
    share_help = "share of the hard negatives that are drawn at random from all ranks, the others are the first hits"
    add("--random_share", type=non_negative_float, default=default.random_share, help=share_help)
    add("--seed", type=number_in_range(0, below=2**32), default=default.seed, help="seed of --random_share")
    symmetric_help = (
        "pairs hold in both directions: a query is no negative of its title either "
        "(default: if the file gives pairs in both directions)"
    )
    add_switch(group, "--symmetric_pairs", None, symmetric_help)


def check_searcher(
    params_path: str | None,
    lexical: str | None,
    corpus_file: str | None,
    index_dir: str | None,
    embedding_dir: str | None,
) -> None:
    """Raises InputError unless the options say what searches what."""
    if bool(params_path) == bool(lexical):
        raise InputError("--params_path, --lexical: give one of them, the model that searches or bm25")
    if lexical and not corpus_file:
        raise InputError(f"--corpus_file is needed with --lexical {lexical}: its words are indexed")
    for option, folder in (("--index_dir", index_dir), ("--embedding_dir", embedding_dir)):
        if lexical and folder:
            raise InputError(f"{option} {folder}: --lexical {lexical} makes no vectors to keep; leave it out")
    if not corpus_file and not (index_dir and has_index(index_dir)):
        raise InputError("--corpus_file is needed: there is no saved index in --index_dir to search")


def check_inputs(
    rules: MiningRules,
    train_set_file: str,
    corpus_file: str | None,
    output: str,
    index_dir: str | None,
    embedding_dir: str | None,
    teacher_params_path: str | None,
    teacher_score_file: str | None,
) -> None:
    """Raises InputError if options are missing or don't fit together, or if the output can't be written."""
    rules.check()
    if teacher_params_path and teacher_score_file:
        raise InputError("--teacher_params_path and --teacher_score_file: only one of them can decide; give one")
    for read in (train_set_file, corpus_file, teacher_score_file):
        if read and os.path.realpath(read) == os.path.realpath(output):
            raise InputError(f"--output {output}: would replace a file that is read; give another one")
    for option, path in (("--output", output), ("--embedding_dir", embedding_dir)):
        if index_dir and path and is_within(path, index_dir):
            raise InputError(f"{option} {path}: lies in --index_dir {index_dir}, which is replaced as a whole")
    if is_main_process():  # before hours of encoding
        prepare_file(output)
        if index_dir:
            make_folder(Path(index_dir).absolute().parent)


def read_scores(teacher_score_file: str | None, skip_bad_lines: bool, lowercase: bool) -> TeacherScores | None:
    """The scores of the file, if there is one. Raises InputError as `read_lines` does."""
    if not teacher_score_file:
        return None
    return TeacherScores(teacher_score_file, lowercase=lowercase, skip_bad_lines=skip_bad_lines)


def report_texts(encoder: "Encoder", queries: Sequence[str], corpus: Corpus | None) -> None:
    """Logs how many of the texts are cut or unknown, if they are many. Raises InputError if almost all are unknown."""
    from encoding.token_statistics import report_tokens

    report_tokens(encoder.tokenizer, {"queries": queries}, QUERY)
    if corpus:
        report_tokens(encoder.tokenizer, {f"documents of {corpus.path}": corpus}, DOCUMENT)


def find_positives(
    pairs: Sequence[TextPair], train_set_file: str, symmetric_pairs: bool | None, lowercase: bool
) -> KnownPositives:
    """What is no negative of a query, by the rule of training; logs if the file and not an option says so."""
    texts = [text for pair in pairs for text in (pair.query, pair.title)]
    ids = text_ids(texts, lowercase)
    query_ids, title_ids = ids[::2], ids[1::2]
    mask = FalseNegativeMask(query_ids, title_ids, np.empty(0, np.int64), symmetric_pairs)
    if mask.symmetric and symmetric_pairs is None:
        share = f"{100 * mask.reversed_share:.0f} % of the pairs are given in both directions"
        log(f"{train_set_file}: {share}, so all are taken as similar in both")
    return KnownPositives(pairs, query_ids, title_ids, mask.symmetric, lowercase)


@contextlib.contextmanager
def open_searcher(
    encoder: "Encoder | None",
    queries: Sequence[str],
    to_rank: int,
    corpus: Corpus | None,
    options: IndexOptions,
    work: Path,
    index_dir: str | None,
    embedding_dir: str | None,
) -> Iterator[Searcher]:
    """Yields what searches, on every rank: the encoder, or without one, BM25. Arguments: see `index_on_all_ranks`."""
    if encoder is None:
        assert corpus is not None  # see `check_searcher`
        yield LexicalSearcher(LexicalIndex.build(corpus, len(corpus)), corpus)
        return
    from mining.miner import index_on_all_ranks

    with index_on_all_ranks(
        encoder,
        queries,
        to_rank,
        corpus=corpus,
        options=options,
        folder=work,
        index_dir=index_dir,
        embedding_dir=embedding_dir,
    ) as document_index:
        yield VectorSearcher(encoder, document_index)


def run_metadata(
    encoder: "Encoder | None",
    teacher: str | None,
    pairs: Sequence[TextPair],
    positives: KnownPositives,
    rules: MiningRules,
    corpus: Corpus | None,
    options: IndexOptions,
    index_dir: str | None,
) -> dict[str, Any]:
    """All that decides on the result, as JSON values. teacher: a fingerprint."""
    from mining.miner import sha256_of_pairs

    return {
        "train_set_file": sha256_of_pairs(pairs),
        "symmetric_pairs": positives.symmetric,
        "params_path": encoder and encoder.fingerprint,
        "precision": encoder and encoder.precision,
        "corpus_file": corpus and corpus.sha256,
        "index_dir": index_dir and os.path.realpath(index_dir),
        "teacher": teacher,
        **rules._asdict(),
        **options._asdict(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Mines, writes the training file, and prints how many hits were taken and why others weren't."""
    args = build_parser().parse_args(argv)
    rules, options = call(MiningRules, args), call(IndexOptions, args)
    call(check_searcher, args)
    call(check_inputs, args, rules=rules)
    lowercase = not args.params_path or lowercases(check_checkpoint(args.params_path).parent, args.model_name_or_path)
    if args.teacher_params_path:
        check_checkpoint(args.teacher_params_path)
    pairs = call(read_text_pairs, args, path=args.train_set_file)
    corpus = call(read_corpus, args, path=args.corpus_file, lowercase=lowercase) if args.corpus_file else None
    scores = call(read_scores, args, lowercase=lowercase)
    positives = call(find_positives, args, pairs=pairs, lowercase=lowercase)
    if args.params_path and not (args.index_dir and has_index(args.index_dir)):
        check_index_args(options, len(corpus or ()))
    calibration_texts = call(read_texts, args, path=args.calibration_file) if args.calibration_file else None

    set_up_paddle()
    from common.device import set_device
    from common.distributed import init_ranks
    from encoding.encoder import load_encoder
    from encoding.text_encoder import TextSample
    from mining.blocks import PairBlocks
    from mining.miner import Miner, encode_for_teacher, write_training_file

    set_device(args.device)
    init_ranks()
    queries = [pair.query for pair in pairs]
    sample = TextSample(corpus or [pair.title for pair in pairs], queries)
    given_texts: dict[str, Any] = {"sample": sample, "calibration_texts": calibration_texts}
    given_texts["text_count"] = 2 * len(pairs) + len(corpus or ())
    encoder = call(load_encoder, args, **given_texts) if args.params_path else None
    other = args.teacher_params_path and load_encoder(
        args.teacher_params_path,
        batch_size=args.batch_size,
        engine=args.engine,
        precision=args.precision,
        min_overlap=args.min_overlap,
        **given_texts,
    )
    if encoder:
        report_texts(encoder, queries, corpus)
    fingerprint = other.fingerprint if other else args.teacher_score_file and sha256(args.teacher_score_file)
    run_of = {"encoder": encoder, "teacher": fingerprint, "pairs": pairs, "positives": positives, "rules": rules}
    work = Path(f"{args.output}{WORK_SUFFIX}")
    metadata = call(run_metadata, args, **run_of, corpus=corpus, options=options)
    blocks = PairBlocks(work, len(pairs), metadata, "mining")
    opened = pick(args, open_searcher, encoder=encoder, queries=queries, corpus=corpus, options=options, work=work)
    with open_searcher(**opened) as searcher:
        teacher = encode_for_teacher(other, searcher.documents, work) if other else scores
        miner = Miner(pairs, positives, rules, searcher, teacher)
        blocks.compute_missing(blocks.rows, lambda rows: miner(rows)._asdict())
    if is_main_process():
        print(write_training_file(args.output, pairs, blocks, rules.negatives, args.write_scores))
        print(f"wrote {args.output}")
        remove_folder(work)
    return 0


if __name__ == "__main__":
    run(main)
