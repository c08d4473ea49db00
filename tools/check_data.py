"""Checks the files of a training and its evaluation for what spoils the model or the metrics."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import INPUT_ERROR_EXIT_CODE, ArgumentParser, number_in_range, run
from common.errors import InputError
from common.files import prepare_file
from common.options import add_label_arg, call
from common.paddle_setup import set_up_paddle
from data_check.check import DataCheck, check_data
from data_check.files import read_corpus_file, read_pair_file
from data_check.page import write_page
from data_check.rules import Finding
from encoding.token_statistics import COVERED

EVALUATED = ("dev", "test")  # options


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=f"{__doc__} Give any of the files.")
    add = parser.add_argument
    add("--train_set_file", help="training pairs: query<TAB>title[<TAB>hard negative]...")
    for name in EVALUATED:
        add(f"--{name}", help=f"evaluation pairs of the {name} set, query<TAB>title, of which the training has none")
    add("--corpus_file", help="documents, one per line; the titles of the evaluation pairs are among them")
    form = parser.add_mutually_exclusive_group()
    add_label_arg(form)
    scores_help = "the texts of the training file are followed by a score for the title and each hard negative"
    form.add_argument("--teacher_scores", action="store_true", help=scores_help)
    model_help = "a checkpoint, or the folder or name of a model to start from: its vocabulary shows what it can't see"
    add("--params_path", help=model_help)
    add("--max_seq_length", type=number_in_range(3), help="tokens of a text (default: the model's)")
    add("--report", help="also write this HTML file")
    strict_help = f"exit with code {INPUT_ERROR_EXIT_CODE} if a rule is broken"
    add("--strict", action="store_true", help=strict_help)
    return parser


def format_numbers(check: DataCheck) -> Iterator[str]:
    """The lines of the numbers: of the files, what was found, the lengths and the batches."""
    for file in check.files:
        columns = file.columns.values()
        counts = (f"{len(column):,} {column.name} ({check.distinct[str(column)]:,} distinct)" for column in columns)
        yield f"{file.path}: {', '.join(counts) or 'no text'}"
    yield ""
    for finding in check.findings:
        if finding.count:
            yield f"{'!' if finding.is_broken else ' '} {format_finding(finding)}"
    found = {finding.rule for finding in check.findings if finding.count}
    if absent := dict.fromkeys(finding.rule.title for finding in check.findings if finding.rule not in found):
        yield f"\nnot found: {'; '.join(absent)}"
    if check.lengths:
        yield ""
    for advice in check.lengths:
        fit = f"{100 * COVERED:.0f} % fit into --max_seq_length {advice.suggested}"
        yield f"{advice.path}, {advice.column}: {fit}; {advice.given} was checked"
    if check.batches:
        yield f"\nsuspected false negatives in a batch of {check.files[0].path}:"
    for batch in check.batches:
        counts_of_batch = f"{batch.with_mask:,.1f} with the mask, {batch.without_mask:,.1f} without it"
        yield f"  {batch.batch_size} pairs: {counts_of_batch}, of {batch.negatives:,} negatives"


def format_finding(finding: Finding) -> str:
    """One line: where it is, the rule, and the numbers."""
    numbers = f"{finding.count:,}"
    if finding.total:
        numbers += f" of {finding.total:,} ({100 * finding.share:.2f} %)"
    return f"{finding.where}: {finding.rule.title}: {numbers}"


def format_examples(findings: Sequence[Finding]) -> Iterator[str]:
    """The lines of the examples, with the remedy."""
    for finding in findings:
        yield f"\n{finding.where}: {finding.rule.title}"
        yield f"  ({finding.rule.remedy})"
        yield from (f"  {example}" for example in finding.examples)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the numbers, then examples of what breaks a rule; returns the exit code."""
    args = build_parser().parse_args(argv)
    evaluated = [path for path in (getattr(args, name) for name in EVALUATED) if path]
    if not (args.train_set_file or evaluated or args.corpus_file):
        raise InputError("there is nothing to check; give --train_set_file, --dev, --test or --corpus_file")
    if args.report:
        prepare_file(args.report)
    tokenizer = None
    if args.params_path:
        set_up_paddle()
        from data_check.model_tokenizer import load_model_tokenizer

        tokenizer = load_model_tokenizer(args.params_path, args.max_seq_length)
    elif args.max_seq_length:
        raise InputError("--max_seq_length: needs the vocabulary of --params_path")
    train = call(read_pair_file, args, path=args.train_set_file) if args.train_set_file else None
    evaluation_files = [read_pair_file(path, label_column=args.label_column) for path in evaluated]
    corpus = read_corpus_file(args.corpus_file) if args.corpus_file else None
    check = check_data(train, evaluation_files, corpus, tokenizer)
    print("\n".join(format_numbers(check)))
    print("\n".join(format_examples([finding for finding in check.findings if finding.count])))
    if args.report:
        write_page(args.report, check)
    return INPUT_ERROR_EXIT_CODE if args.strict and check.broken else 0


if __name__ == "__main__":
    run(main)
