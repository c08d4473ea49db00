"""What is wrong with texts of pairs and documents beside each other, in one file and in several. Imports no Paddle."""

from collections.abc import Sequence

import numpy as np

from data_check.duplicates import TextGroups
from data_check.files import DOCUMENTS, HARD_NEGATIVES, QUERIES, TITLES, Column, DataFile
from data_check.nearest import nearest_documents
from data_check.rules import (
    EXAMPLES,
    FALSE_HARD_NEGATIVES,
    LEAKED,
    MANY,
    MANY_QUERIES,
    MANY_TITLES,
    NEAR_DUPLICATES,
    NEARLY_LEAKED,
    NOT_IN_CORPUS,
    OWN_TITLES,
    REPEATED_DOCUMENTS,
    REPEATED_PAIRS,
    SHARED_TITLES,
    Finding,
    Rule,
    shortened,
)

SHIFT = 32  # bits: two ids as one number


def pair_findings(file: DataFile, texts: TextGroups) -> list[Finding]:
    """Repeated pairs, queries that are their own titles, queries with many titles and titles with many queries."""
    if QUERIES not in file.columns:
        return []
    queries, titles = file.columns[QUERIES], file.columns[TITLES]
    query_ids, title_ids = texts.ids_of(queries), texts.ids_of(titles)
    _, first = np.unique(_joined(query_ids, title_ids), return_index=True)
    is_repeated = np.ones(len(queries), bool)
    is_repeated[first] = False
    findings = [
        _pair_finding(REPEATED_PAIRS, file, is_repeated),
        _pair_finding(OWN_TITLES, file, query_ids == title_ids),
        _many(MANY_TITLES, file, query_ids, title_ids, queries),
        _many(MANY_QUERIES, file, title_ids, query_ids, titles),
    ]
    if HARD_NEGATIVES in file.columns:
        findings.append(_false_hard_negatives(file, texts))
    return findings


def _pair_finding(rule: Rule, file: DataFile, is_broken: np.ndarray) -> Finding:
    """is_broken: bool [pairs]."""
    queries, titles = file.columns[QUERIES], file.columns[TITLES]
    rows = np.flatnonzero(is_broken)
    examples = [f"{queries.example(row)} → {shortened(titles[row])}" for row in rows[:EXAMPLES].tolist()]
    return Finding(rule, file.path, "", len(rows), len(is_broken), examples)


def _many(rule: Rule, file: DataFile, ids: np.ndarray, other_ids: np.ndarray, column: Column) -> Finding:
    """The pairs whose text in a column has more than MANY distinct ones in the other; those with most are examples."""
    distinct = np.unique(_joined(ids, other_ids)) >> SHIFT
    of_pair, first, text_of_pair = np.unique(ids, return_index=True, return_inverse=True)
    counts = np.bincount(np.searchsorted(of_pair, distinct), minlength=len(of_pair))
    most = np.argsort(-counts, kind="stable")[:EXAMPLES]
    examples = [f"{counts[text]}: {column.example(int(first[text]))}" for text in most if counts[text] > MANY]
    return Finding(rule, file.path, "", int((counts[text_of_pair] > MANY).sum()), len(ids), examples)


def _false_hard_negatives(file: DataFile, texts: TextGroups) -> Finding:
    hard_negatives = file.columns[HARD_NEGATIVES]
    query_ids = texts.ids_of(file.columns[QUERIES])
    positives = _joined(query_ids, texts.groups_of(file.columns[TITLES]))
    given = _joined(query_ids[hard_negatives.rows], texts.groups_of(hard_negatives))
    return _finding(FALSE_HARD_NEGATIVES, hard_negatives, np.isin(given, positives))


def _joined(ids: np.ndarray, other_ids: np.ndarray) -> np.ndarray:
    """Two ids as one number."""
    return ids << SHIFT | other_ids


def _finding(rule: Rule, column: Column, is_broken: np.ndarray) -> Finding:
    """is_broken: bool [texts of the column]."""
    rows = np.flatnonzero(is_broken)
    return Finding(
        rule,
        column.path,
        column.name,
        len(rows),
        len(column),
        [column.example(row) for row in rows[:EXAMPLES].tolist()],
    )


def duplicate_findings(column: Column, texts: TextGroups) -> list[Finding]:
    """Texts of a column that repeat another, of documents alone, and near-duplicates among the distinct ones."""
    ids, groups = texts.ids_of(column), texts.groups_of(column)
    _, first = np.unique(ids, return_index=True)
    first = np.sort(first)
    is_repeated = np.ones(len(ids), bool)
    is_repeated[first] = False
    findings = [_finding(REPEATED_DOCUMENTS, column, is_repeated)] if column.name == DOCUMENTS else []
    _, first_of_group, group = np.unique(groups[first], return_index=True, return_inverse=True)
    others = first[first_of_group][group]  # for each distinct text, the first one of its group in the column
    rows = np.flatnonzero(others != first)
    examples = [f"{column.example(int(first[row]))} ≈ {column.example(int(others[row]))}" for row in rows[:EXAMPLES]]
    return [*findings, Finding(NEAR_DUPLICATES, column.path, column.name, len(rows), len(first), examples)]


def leak_findings(tested: DataFile, train: DataFile, texts: TextGroups) -> list[Finding]:
    """Queries and titles of a file of evaluation pairs that the training has, too; of equal texts, one counts."""
    if QUERIES not in tested.columns or QUERIES not in train.columns:
        return []
    queries, titles = tested.columns[QUERIES], tested.columns[TITLES]
    known = np.concatenate([texts.ids_of(train.columns[name]) for name in (QUERIES, TITLES)])
    return [
        _shared(LEAKED, queries, known, texts),
        _shared(NEARLY_LEAKED, queries, known, texts, nearly=True),
        _shared(SHARED_TITLES, titles, known, texts),
    ]


def _shared(rule: Rule, column: Column, known: np.ndarray, texts: TextGroups, *, nearly: bool = False) -> Finding:
    """The distinct texts of a column that are among others, or nearly are but not quite. known: int64, ids of these."""
    ids, rows = np.unique(texts.ids_of(column), return_index=True)
    keys = texts.groups if nearly else texts.ids
    is_shared = np.isin(keys[ids], keys[known])
    if nearly:
        is_shared &= ~np.isin(ids, known)
    shared = np.flatnonzero(is_shared)
    examples = [
        f"{column.example(int(rows[number]))} {'≈' if nearly else '='} {texts.example(int(keys[ids[number]]))}"
        for number in shared[np.argsort(rows[shared])][:EXAMPLES].tolist()
    ]
    return Finding(rule, column.path, column.name, len(shared), len(ids), examples)


def missing_titles(evaluated: Sequence[DataFile], corpus: DataFile, texts: TextGroups) -> list[Finding]:
    """Distinct titles of each file of evaluation pairs that the corpus lacks, with the nearest documents."""
    if DOCUMENTS not in corpus.columns:
        return []
    documents = corpus.columns[DOCUMENTS]
    findings, shown = [], []
    for titles in (file.columns[TITLES] for file in evaluated if TITLES in file.columns):
        ids, rows = np.unique(texts.ids_of(titles), return_index=True)
        missing = np.sort(rows[~np.isin(ids, texts.ids_of(documents))]).tolist()
        finding = Finding(NOT_IN_CORPUS, titles.path, titles.name, len(missing), len(ids))
        findings.append(finding)
        shown += [(finding, titles, row) for row in missing[:EXAMPLES]]
    # For all files at once, since all documents are read.
    nearest = nearest_documents([titles[row] for _, titles, row in shown], documents)
    for (finding, titles, row), (document, similarity) in zip(shown, nearest, strict=True):
        found = f" ≈ {similarity:.2f} {documents.example(document)}" if similarity else ""
        finding.examples.append(titles.example(row) + found)
    return findings
