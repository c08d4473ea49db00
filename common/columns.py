"""Signs that a column of a file isn't the text that it is read as: labels, numbers, column names, quoted fields."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

NUMBER = re.compile(r"[-+]?(\d+([.,]\d+)?|\.\d+)([eE][-+]?\d+)?\s?%?")
IDENTIFIER = re.compile(r"[A-Za-z]{0,12}[-_:#]?\d+|[0-9a-f]{16,}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# A damaged line, a missing value or a total at the end doesn't make a column text. In real pair files and corpora
# less than 1 % of the texts are numbers.
ALMOST_ALL = 0.95
FEWEST_LINES = 10  # in fewer lines, each text may be a number or a product code by chance
FEWEST_QUOTED = 3  # fields in quotes that hold a comma, if all that hold one are in quotes
LONGEST_WORD = 40  # characters of a label, number or id
NO_PART_OF_NAME = re.compile(r"[\W_]+|\d+$")
LONGEST_CELL = 100  # lines of a quoted field with line breaks; further away, two quotes don't belong together
# fmt: off
NAMES = {  # of columns, in the files of users and of public data sets, without spaces, marks and numbers
    "query", "queries", "question", "q", "title", "text", "texts", "texta", "textb", "sentence", "sentences",
    "sentencea", "sentenceb", "s", "sent", "premise", "hypothesis", "anchor", "positive", "negative", "pos", "neg",
    "hardnegative", "hardnegatives", "answer", "answers", "document", "documents", "doc", "docs", "passage",
    "passages", "corpus", "content", "contents", "abstract", "summary", "description", "keyword", "keywords", "label",
    "labels", "score", "similarity", "isduplicate", "source", "target", "src", "tgt", "id", "ids", "qid", "pid",
    "docid", "index", "idx", "unnamed", "查询", "查询词", "搜索词", "问题", "问句", "答案", "标题", "题目", "题名",
    "文本", "句子", "内容", "正文", "摘要", "文档", "语料", "描述", "关键词", "关键字", "标签", "相似度", "正例",
    "负例", "编号", "序号",
}
LABELS = {
    "true", "false", "yes", "no", "pos", "neg", "positive", "negative", "similar", "dissimilar", "relevant",
    "irrelevant", "duplicate", "entailment", "neutral", "contradiction", "是", "否", "相似", "不相似", "相关",
    "不相关", "正例", "负例",
}
# fmt: on
UNQUOTE = "write the texts without quotes and line breaks (docs/data.md has the lines of Python for it)"


@dataclass
class _Column:
    """Counts of the fields of a column that aren't empty."""

    filled: int = 0
    numbers: int = 0
    identifiers: int = 0
    labels: int = 0
    successors: int = 0  # whole numbers that are one more than the one before
    last: int | None = None
    quoted: int = 0  # fields as CSV files quote them: "a ""b"" c"
    doubled: int = 0  # of these, fields with a quote in them
    quoted_commas: int = 0  # of these, fields with a comma in them
    bare_commas: int = 0  # other fields with a comma in them

    def add(self, field: str) -> None:
        """Counts a field without white space around it."""
        if not field:
            return
        self.filled += 1
        self._count_quotes(field)
        last, self.last = self.last, None
        if len(field) <= LONGEST_WORD:
            self.labels += field.lower() in LABELS
            self._count_number(field, last)

    def _count_number(self, field: str, last: int | None) -> None:
        if not (IDENTIFIER.fullmatch(field) or NUMBER.fullmatch(field)):
            return
        self.identifiers += 1
        self.numbers += bool(NUMBER.fullmatch(field))
        if field.isdecimal():
            self.last = int(field)
            self.successors += last is not None and self.last == last + 1

    def _count_quotes(self, field: str) -> None:
        if not is_quoted(field):
            self.bare_commas += "," in field
            return
        self.quoted += 1
        self.doubled += '"' in field[1:-1]
        self.quoted_commas += "," in field

    @property
    def counts(self) -> bool:
        """Whether the numbers go up by one from line to line."""
        return self.successors > 0 and self.successors >= ALMOST_ALL * (self.filled - 1)

    def is_almost_all(self, count: int) -> bool:
        """Whether this is the count of almost all fields."""
        return self.filled > 0 and count >= ALMOST_ALL * self.filled

    @property
    def is_quoted(self) -> bool:
        """Whether the fields are quoted as in a CSV file: all of them, or those that need it there."""
        needed = self.doubled or (self.quoted_commas >= FEWEST_QUOTED and not self.bare_commas)
        return bool(needed) or (self.filled > 1 and self.is_almost_all(self.quoted))


def is_quoted(field: str) -> bool:
    """Whether a field is quoted as in a CSV file: quotes around it, and each quote in it twice."""
    return len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")


def opens_quote(field: str) -> bool:
    """Whether a field begins with a quote that isn't closed in it."""
    return field.startswith('"') and field.count('"') % 2 == 1


def closes_quote(field: str) -> bool:
    """Whether a field ends with a quote that isn't opened in it."""
    return field.endswith('"') and field.count('"') % 2 == 1 and len(field) > 1 and not field.startswith('"')


class ColumnCheck:
    """Looks at all lines of a file, and says what in it isn't what its columns stand for.

    columns: their names; the last `optional` ones may be missing; last_repeats: whether any number of further columns
    are as the last one. third_column: whether the third and further ones are used as texts.
    """

    def __init__(
        self, columns: Sequence[str], *, optional: int = 0, last_repeats: bool = False, third_column: bool = True
    ) -> None:
        self._names, self._last_repeats, self._third_column = columns, last_repeats, third_column
        self._fewest_columns = len(columns) - optional
        self._columns = [_Column() for _ in columns]
        self._counts: Counter[int] = Counter()  # of columns
        self._json = self._commas = self._carriage_returns = 0
        self._header: list[str] | None = None  # the fields of the first line, if they are names of columns
        self._open_lines: list[int] = []  # whose last field begins with a quote that isn't closed there
        self._broken_cell: tuple[int, int] | None = None  # first and last line of a quoted field with line breaks
        self._bare_quotes = 0  # fields with a quote that no CSV file has; people and books write such texts

    def add(self, number: int, text: str) -> None:
        """Looks at a line; number: its number, from 1."""
        text = text.rstrip("\r\n")
        fields = [field.strip() for field in text.split("\t")]
        if not any(fields):
            return
        if '"' in text:
            self._look_at_quotes(number, fields)
        if number == 1 and is_header(fields):
            self._header = fields
            return
        if self._header and number == 2 and is_header(fields):
            self._header = None  # such as 标题1<TAB>内容1, 标题2<TAB>内容2: names of columns fill one line
        self._counts[len(fields)] += 1
        self._carriage_returns += "\r" in text
        self._commas += "," in text
        self._json += fields[0][:1] in ("{", "[") and _is_json(text)
        if self._last_repeats and len(fields) > len(self._columns):
            self._columns += [_Column() for _ in fields[len(self._columns) :]]
        for column, field in zip(self._columns, fields, strict=False):
            column.add(field)

    def _look_at_quotes(self, number: int, fields: list[str]) -> None:
        """Counts bare quotes, and finds quoted fields that begin at the end of a line and end in a later one."""
        for field in fields:
            if '"' not in field or is_quoted(field):
                continue
            if opens_quote(field):
                self._open_lines.append(number)
            elif closes_quote(field) and self._open_lines and number - self._open_lines[-1] < LONGEST_CELL:
                self._broken_cell = self._broken_cell or (self._open_lines[-1], number)
            else:
                self._bare_quotes += 1

    def findings(self) -> list[str]:
        """What isn't as it should be, each with its remedy; [] if nothing is. Call it after the last line."""
        return [*self._findings_of_form(), *self._findings_of_numbers(), *self._findings_of_quotes()]

    def remedy_for_bad_lines(self) -> str | None:
        """What to do if most lines have another number of columns; None if they don't."""
        if not self._counts:
            return None
        (count, lines), total = self._counts.most_common(1)[0], self._counts.total()
        most_columns = count if self._last_repeats else len(self._names)
        if self._fewest_columns <= count <= most_columns or lines <= total / 2:
            return None
        if count == 1:
            separator = "commas" if self._commas > total / 2 else "something else"
            return f"separate the columns by a tab; most lines have {separator} instead"
        wanted = " and ".join(self._names[: self._fewest_columns])
        has_ids = self._columns[0].is_almost_all(self._columns[0].identifiers)
        example = ",".join(str(number + has_ids) for number in range(1, self._fewest_columns + 1))
        return f"most have {count} columns: keep {wanted} alone, for example with cut -f{example}"

    def _findings_of_form(self) -> list[str]:
        lines = self._counts.total()
        found = []
        if self._header and lines:
            found.append(f"line 1 is a header ({', '.join(self._header)}), not an entry; remove it: sed -i 1d")
        if lines > 1 and self._json >= ALMOST_ALL * lines:
            found.append(f"its lines are JSON; write {'<TAB>'.join(self._names[: self._fewest_columns])} instead")
        if self._carriage_returns > lines / 2:
            found.append("its lines end with a carriage return alone; convert it: tr '\\r' '\\n'")
        return found

    def _findings_of_numbers(self) -> list[str]:
        if self.remedy_for_bad_lines():
            return []
        found = []
        first, *others = self._columns
        is_pair_file = bool(others)
        fewest_lines = 2 if any(count > 2 for count in self._counts) else FEWEST_LINES
        if first.counts and is_pair_file:
            found.append("the first column counts the lines, as pandas' index does; cut it off: cut -f2-")
        elif first.is_almost_all(first.identifiers) and (first.filled >= fewest_lines):
            remedy = "cut it off: cut -f2-" if is_pair_file else "give the file of the texts"
            found.append(f"the {self._names[0]} of almost every line is a number or an id, not a text; {remedy}")
        if others and others[0].is_almost_all(others[0].identifiers) and others[0].filled >= FEWEST_LINES:
            found.append(f"the {self._names[1]} of almost every line is a number or an id; give the file of the texts")
        return found or self._findings_of_hard_negatives()

    def _findings_of_hard_negatives(self) -> list[str]:
        fewest_lines = min(FEWEST_LINES, self._counts.total())  # fewer may be rare numeric texts
        for number, column in enumerate(self._columns[2:] if self._third_column else (), start=3):
            if column.filled < fewest_lines or not column.is_almost_all(max(column.numbers, column.labels)):
                continue
            kind = "a number" if column.numbers >= column.labels else "a label"
            if number == 3:
                name, remedy = "the third column", "take the lines with 1 alone with --label_column, or cut it off"
            else:
                name, remedy = f"column {number}", "train on a teacher's scores with --teacher_scores, or cut it off"
            return [f"{name}, a hard negative, is {kind} in almost every line; {remedy}: cut -f1-{number - 1}"]
        return []

    def _findings_of_quotes(self) -> list[str]:
        quoted = sum(column.quoted for column in self._columns)
        if self._bare_quotes > (1 - ALMOST_ALL) * (quoted + len(self._open_lines)):
            return []
        found = []
        if any(column.is_quoted for column in self._columns):
            found.append(f"its fields are in quotes, as in a CSV file, which would become part of the texts; {UNQUOTE}")
        if self._broken_cell:
            first, last = self._broken_cell
            found.append(f"a field in quotes goes over lines {first} to {last}, where a line is an entry; {UNQUOTE}")
        elif self._open_lines:
            found.append(f"line {self._open_lines[0]} has a quote that isn't closed; close or remove it")
        return found


def is_header(fields: Sequence[str]) -> bool:
    """Whether the fields of a first line are names of columns, as in `text1<TAB>text2`, `text` and `id,text`."""
    fields = fields[0].split(",") if len(fields) == 1 else fields
    if len(fields) == 1 and fields[0][-1:].isdigit():  # such as 文档1, the first of a list
        return False
    names = [NO_PART_OF_NAME.sub("", field).lower() for field in fields if field]  # pandas' index has no name
    return bool(names) and NAMES.issuperset(names)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
