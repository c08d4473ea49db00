"""All that is looked at in the files of a training and its evaluation. Imports no Paddle."""

from typing import NamedTuple

import numpy as np

from data import TextTokenizer
from data_check.duplicates import TextGroups
from data_check.false_negatives import BatchEstimate, estimate_batches
from data_check.files import QUERIES, TITLES, DataFile
from data_check.pairs import duplicate_findings, leak_findings, missing_titles, pair_findings
from data_check.rules import Finding
from data_check.tokens import LengthAdvice, token_findings


class DataCheck(NamedTuple):
    """What a check found."""

    files: list[DataFile]
    distinct: dict[str, int]  # number of distinct texts of each column
    findings: list[Finding]  # also of rules that aren't broken
    batches: list[BatchEstimate]  # of the training
    lengths: list[LengthAdvice]  # of each column, with a tokenizer

    @property
    def broken(self) -> list[Finding]:
        """The findings of rules that are broken."""
        return [finding for finding in self.findings if finding.is_broken]


def check_data(
    train: DataFile | None, evaluated: list[DataFile], corpus: DataFile | None, tokenizer: TextTokenizer | None = None
) -> DataCheck:
    """Checks the files that are there. evaluated: files of evaluation pairs; tokenizer: None leaves out its rules."""
    files = [file for file in (train, *evaluated, corpus) if file]
    columns = [column for file in files for column in file.columns.values()]
    findings = [finding for file in files for finding in file.findings]
    if not columns:
        return DataCheck(files, {}, findings, [], [])
    texts = TextGroups(columns)
    for file in files:
        findings += pair_findings(file, texts)
    for column in columns:
        findings += duplicate_findings(column, texts)
    for file in evaluated:
        findings += leak_findings(file, train, texts) if train else []
    findings += missing_titles(evaluated, corpus, texts) if corpus else []
    batches = []
    if train and QUERIES in train.columns:
        query_ids, title_ids = (texts.ids_of(train.columns[name]) for name in (QUERIES, TITLES))
        batches = estimate_batches(query_ids, title_ids, texts.groups)
    lengths = []
    if tokenizer:
        for column in columns:
            found, advice = token_findings(column, tokenizer)
            findings += found
            lengths.append(advice)
    distinct = {str(column): len(np.unique(texts.ids_of(column))) for column in columns}
    return DataCheck(files, distinct, findings, batches, lengths)
