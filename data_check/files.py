"""The files that are checked: what is wrong with their lines, and their columns of texts. Imports no Paddle.

A line that can't be used is counted, and the rest of the file is read. Of the texts only hashes are kept.
"""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from common.columns import ColumnCheck
from common.errors import InputError
from common.files import open_for_reading
from common.lines import LineDecoder, split_lines
from common.logs import progress_bar
from common.texts import DOCUMENT, QUERY, TextHashes
from data import PAIR_COLUMNS, parse_labelled_pair, parse_pair, parse_scored_pair, parse_text
from data_check.characters import has_other_separator, problems_of
from data_check.rules import (
    COLUMNS,
    DAMAGED,
    ENCODING,
    FORM,
    HTML,
    INVISIBLE,
    SEPARATOR,
    UNREADABLE,
    Finding,
    Rule,
    shortened,
)
from data_check.sketches import BANDS, BLOOM_WORDS, BloomFilters, Sketches
from retrieval.corpus import MappedLines

BLOCK = 8192  # texts that are hashed at a time
QUERIES, TITLES, HARD_NEGATIVES, DOCUMENTS = "queries", "titles", "hard negatives", "documents"  # columns
ROLES = {QUERIES: QUERY, TITLES: DOCUMENT, HARD_NEGATIVES: DOCUMENT, DOCUMENTS: DOCUMENT}
Texts = tuple[str, ...]  # of a line: the query, the title and the hard negatives, or the document


class _MappedGoodLines(MappedLines):
    """The lines of a file that can be used; offsets: int64 [N], of the first byte of each."""

    def __init__(self, path: str | Path, offsets: np.ndarray) -> None:
        super().__init__(path)
        self._offsets = offsets


class GoodLines(NamedTuple):
    """The lines of a file that can be used, N of them."""

    path: str
    numbers: np.ndarray  # int64 [N], from 1
    lines: MappedLines
    parse: Callable[[str], Texts | None]


class Column(Sequence[str]):
    """The texts of a column, which are read from the disk when they are asked for.

    places: int32 [N, 2], the good line that each text is in, and which of the line's texts it is.
    """

    def __init__(
        self, name: str, source: GoodLines, places: np.ndarray, hashes: TextHashes, sketches: Sketches
    ) -> None:
        self.name, self.hashes, self.sketches = name, hashes, sketches
        self._source, self._places = source, places

    @property
    def rows(self) -> np.ndarray:
        """The good line that each text is in, int32 [N]."""
        return self._places[:, 0]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        line, field = self._places[row].tolist()
        texts = self._source.parse(self._source.lines[line])
        assert texts  # a good line has some
        return texts[field]

    def example(self, row: int) -> str:
        """A text with its file and line, shortened."""
        return f"{self._source.path}:{self._source.numbers[self.rows[row]]}: {shortened(self[row])}"

    @property
    def path(self) -> str:
        """The file."""
        return self._source.path

    def __str__(self) -> str:
        return f"{self.path}, {self.name}"


class _ColumnHashes:
    """Collects the hashes and sketches of a column's texts, a block at a time.

    In arrays that grow where they are: blocks that are joined at the end take twice the memory.
    """

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._places, self._exact, self._rough = array("i"), array("q"), array("q")
        self._bands, self._bits, self._counts = array("I"), array("Q"), array("I")

    def add(self, text: str, row: int, field: int) -> None:
        """Adds a text; row, field: see Column."""
        self._texts.append(text)
        self._places.append(row)
        self._places.append(field)
        if len(self._texts) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        hashes, sketches = TextHashes.of(self._texts), Sketches.of(self._texts)
        self._exact.frombytes(hashes.exact.tobytes())
        self._rough.frombytes(hashes.rough.tobytes())
        self._bands.frombytes(sketches.bands.T.tobytes())
        self._bits.frombytes(sketches.filters.bits.T.tobytes())
        self._counts.frombytes(sketches.filters.counts.tobytes())
        self._texts = []

    def column(self, name: str, source: GoodLines) -> Column:
        """The column of all texts."""
        self._flush()
        exact, rough, counts = map(np.asarray, (self._exact, self._rough, self._counts))
        bands = np.asarray(self._bands).reshape(-1, BANDS).T
        filters = BloomFilters(np.asarray(self._bits).reshape(-1, BLOOM_WORDS).T, counts)
        places = np.asarray(self._places).reshape(-1, 2)
        return Column(name, source, places, TextHashes(exact, rough), Sketches(bands, filters))


class DataFile(NamedTuple):
    """A file of pairs or documents."""

    path: str
    lines: int  # that can be used, without those with label 0
    columns: dict[str, Column]  # by name, with a text or more; the rows of queries and titles are the pairs
    findings: list[Finding]  # about single lines, or the whole file


class _LineRules:
    """Counts the lines of a file, and those that break a rule."""

    def __init__(self, path: str) -> None:
        self._path, self.lines = path, 0
        rules = (UNREADABLE, FORM, ENCODING, COLUMNS, SEPARATOR, DAMAGED, INVISIBLE, HTML)
        self._findings = {rule: Finding(rule, path, "") for rule in rules}

    def add(self, rule: Rule, number: int, text: str) -> None:
        """Counts a line that breaks a rule; text: what is wrong, or the line."""
        self._findings[rule].add(f"{self._path}:{number}: {text}")

    def add_message(self, rule: Rule, message: str) -> None:
        """Counts a message about the file, which names it or doesn't."""
        self._findings[rule].add(f"{self._path}: {message.removeprefix(f'{self._path}: ')}")

    def findings(self) -> list[Finding]:
        """What was found; call it after the last line."""
        for rule, finding in self._findings.items():
            finding.total = 0 if rule in (UNREADABLE, FORM) else self.lines
        return list(self._findings.values())


def read_pair_file(path: str, *, label_column: bool = False, teacher_scores: bool = False) -> DataFile:
    """Looks at a file of pairs.

    label_column: whether it has labels, of which 1 is a pair; teacher_scores: whether scores follow the texts. Raises
    InputError if the file is missing or can't be opened, but for nothing that is in it.
    """

    def parse(line: str) -> Texts | None:
        if label_column:
            pair, is_pair = parse_labelled_pair(line)
            return (pair.query, pair.title) if is_pair else None
        pair = parse_scored_pair(line) if teacher_scores else parse_pair(line)
        return (pair.query, pair.title, *pair.hard_negatives)

    has_texts = not (label_column or teacher_scores)
    check = ColumnCheck(PAIR_COLUMNS, optional=1, last_repeats=True, third_column=has_texts)
    return _read(path, parse, (QUERIES, TITLES, HARD_NEGATIVES), check)


def read_corpus_file(path: str) -> DataFile:
    """Looks at a file of documents, one per line. Raises InputError as `read_pair_file` does."""
    return _read(path, lambda line: (parse_text(line),), (DOCUMENTS,), ColumnCheck(["document"]))


def _read(path: str, parse: Callable[[str], Texts | None], names: Sequence[str], check: ColumnCheck) -> DataFile:
    """names: of the columns; the last one takes all further texts of a line."""
    rules = _LineRules(path)
    hashes = [_ColumnHashes() for _ in names]
    numbers, offsets = array("q"), array("q")
    for number, offset, texts in _good_lines(path, parse, check, rules):
        for field, text in enumerate(texts):
            hashes[min(field, len(names) - 1)].add(text, len(numbers), field)
        numbers.append(number)
        offsets.append(offset)
    source = GoodLines(path, np.array(numbers), _MappedGoodLines(path, np.array(offsets)), parse)
    columns = [column.column(name, source) for column, name in zip(hashes, names, strict=True)]
    return DataFile(path, len(numbers), {column.name: column for column in columns if len(column)}, rules.findings())


def _good_lines(
    path: str, parse: Callable[[str], Texts | None], check: ColumnCheck, rules: _LineRules
) -> Iterator[tuple[int, int, Texts]]:
    """(number, offset of the first byte, texts) of each line that can be used; counts what breaks the rules."""
    decoder = LineDecoder()
    with (
        open_for_reading(path) as file,
        progress_bar(os.fstat(file.fileno()).st_size, f"reading {path}", "B", unit_scale=True) as progress,
    ):
        try:
            for number, offset, raw in split_lines(file, path):
                progress.update(len(raw or b""))
                rules.lines += 1
                if texts := _look_at(raw, number, decoder, check, parse, rules):
                    yield number, offset, texts
        except InputError as error:  # it is no text file
            rules.add_message(UNREADABLE, str(error))
    for message in (*check.findings(), decoder.remedy(), check.remedy_for_bad_lines()):
        if message:
            rules.add_message(FORM, message)


def _look_at(
    raw: bytes | None,
    number: int,
    decoder: LineDecoder,
    check: ColumnCheck,
    parse: Callable[[str], Texts | None],
    rules: _LineRules,
) -> Texts | None:
    """The texts of a line, if it can be used; counts what it breaks."""
    try:
        line = decoder.decode(raw).rstrip("\r\n")
    except ValueError as error:
        rules.add(ENCODING, number, str(error))
        return None
    check.add(number, line)
    for rule in problems_of(line):
        rules.add(rule, number, shortened(line))
    try:
        return parse(line)
    except ValueError as error:
        if has_other_separator(line):
            rules.add(SEPARATOR, number, shortened(line))
        else:
            rules.add(COLUMNS, number, f"{error}: {shortened(line)}")
        return None
