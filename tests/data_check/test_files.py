"""The rules about single lines: a file that breaks each, and a clean file that breaks none."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.texts import TextHashes
from data_check import files
from data_check.files import DataFile, read_corpus_file, read_pair_file
from data_check.sketches import Sketches
from helpers import all_pairs

CLEAN = [f"{query}\t{title}".encode() for query, title in all_pairs()[:20]]
BROKEN = {  # what is added to the clean lines, or takes their place -> the rule, and what its example holds
    "gbk": ([line.decode().encode("gb18030") for line in CLEAN], "encoding", "isn't UTF-8"),
    "cut": ([*CLEAN, "水\t稻".encode()[:-1]], "encoding", "a cut character"),
    "nul": ([*CLEAN, b"a\0\tb"], "encoding", "holds a NUL character"),
    "long": ([*CLEAN, b"a\t" + b"b" * 2_000_000], "encoding", "longer than"),
    "utf-16": (["\n".join(map(bytes.decode, CLEAN)).encode("utf-16")], "unreadable", "is UTF-16"),
    "gzip": ([b"\x1f\x8b\x08", *CLEAN], "unreadable", "is compressed with gzip"),
    "replacement": ([*CLEAN, "水\ufffd\t稻".encode()], "damaged", ":21: '水�"),
    "gbk twice": ([*CLEAN, "锟斤拷\t稻".encode()], "damaged", "锟斤拷"),
    "latin-1": ([*CLEAN, "cafÃ©\tbar".encode()], "damaged", "cafÃ©"),
    "one column": ([*CLEAN, "水稻".encode()], "columns", ":21: "),
    "no title": ([*CLEAN, "水稻\t".encode()], "columns", "the title is empty"),
    "empty line": ([*CLEAN, b""], "columns", "the line is empty"),
    "full-width space": ([*CLEAN, "水稻\u3000水稻的产量".encode()], "separator", "水稻"),
    "backslash": ([*CLEAN, rb"rice\tyield of rice"], "separator", "rice"),
    "picture of a tab": ([*CLEAN, "水稻␉水稻的产量".encode()], "separator", "␉"),
    "spaces": ([*CLEAN, b"rice    yield of rice"], "separator", "rice"),
    "control": ([*CLEAN, b"ri\x08ce\tyield"], "invisible", "ri\\x08ce"),
    "zero-width": ([*CLEAN, "水\u200b稻\t产量".encode()], "invisible", "水\\u200b稻"),
    "BOM": ([*CLEAN, "水\ufeff稻\t产量".encode()], "invisible", "\\ufeff"),
    "entity": ([*CLEAN, b"R&amp;D\tresearch"], "html", "R&amp;D"),
    "number of a character": ([*CLEAN, b"it&#39;s\tresearch"], "html", "&#39;"),
    "tag": ([*CLEAN, b"a<br/>b\tresearch"], "html", "<br/>"),
    "header": ([b"query\ttitle", *CLEAN], "form", "line 1 is a header (query, title)"),
    "label": ([line + b"\t1" for line in CLEAN], "form", "the third column, a hard negative, is a number"),
    "score": ([line + b"\t0.75" for line in CLEAN], "form", "the third column, a hard negative, is a number"),
    "index": ([b"%d\t" % number + line for number, line in enumerate(CLEAN)], "form", "the first column counts"),
    "quotes": ([b'"%s"' % line.replace(b"\t", b'"\t"') for line in CLEAN], "form", "its fields are in quotes"),
    "commas": ([line.replace(b",", b" ").replace(b"\t", b",") for line in CLEAN], "form", "have commas instead"),
    "JSON": ([b'{"query": "a"}'] * 20, "form", "its lines are JSON"),
}


def read(path: Path, lines: list[bytes], **options: bool) -> DataFile:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return read_pair_file(str(path), **options)


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_breaks_a_rule_is_counted(tmp_path: Path, name: str) -> None:
    lines, rule, example = BROKEN[name]
    found = {finding.rule.name: finding for finding in read(tmp_path / "train.csv", lines).findings}
    assert found[rule].is_broken
    assert any(example in each for each in found[rule].examples), found[rule].examples
    assert len(found[rule].examples) <= 10


def test_a_clean_file_breaks_no_rule(tmp_path: Path) -> None:
    clean = [*CLEAN, "naïve 👩‍👩‍👧 R&D a<b\t《水稻》 “产量”　AT&T; x".encode(), b"\xef\xbb\xbfx y\tz"]
    file = read(tmp_path / "train.csv", clean)
    assert [finding.rule.name for finding in file.findings if finding.count] == ["invisible"]  # a BOM inside
    assert [finding for finding in read(tmp_path / "train.csv", clean[:-1]).findings if finding.count] == []
    assert {finding.total for finding in file.findings} == {22, 0}


def test_the_other_lines_are_read(tmp_path: Path) -> None:
    """The texts, and the lines that they are in, also behind a BOM and lines that can't be used."""
    lines = [b"\xef\xbb\xbfq 1\tt 1\th 1", b"bad", b"q 2\tt 2", b"\xff\tbad", b"q 3\tt 3\th 3"]
    path = tmp_path / "train.csv"
    file = read(path, lines)
    assert {name: list(column) for name, column in file.columns.items()} == {
        "queries": ["q 1", "q 2", "q 3"],
        "titles": ["t 1", "t 2", "t 3"],
        "hard negatives": ["h 1", "h 3"],
    }
    assert file.columns["hard negatives"].example(1) == f"{path}:5: 'h 3'"
    assert file.columns["titles"][1:] == ["t 2", "t 3"]
    assert str(file.columns["titles"]) == f"{path}, titles"


def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 7)
    column = read(tmp_path / "train.csv", CLEAN).columns["titles"]
    titles = [title for _, title in all_pairs()[:20]]
    assert list(column) == titles
    sketches = Sketches.of(titles)
    expected = (*TextHashes.of(titles), sketches.bands, *sketches.filters)
    found = (*column.hashes, column.sketches.bands, *column.sketches.filters)
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_labels_choose_the_pairs(tmp_path: Path) -> None:
    lines = [b"q 1\tt 1\t1", b"q 2\tt 2\t0", b"q 3\tt 3\t2"]
    file = read(tmp_path / "train.csv", lines, label_column=True)
    assert list(file.columns["titles"]) == ["t 1"]
    (finding,) = [finding for finding in file.findings if finding.count]
    assert finding.examples == [f"{tmp_path / 'train.csv'}:3: the label is neither 0 nor 1: 'q 3\\tt 3\\t2'"]


def test_scores_are_no_texts(tmp_path: Path) -> None:
    lines = [line + b"\th 1\th 2\t0.9\t0.1\t0.2" for line in CLEAN]
    file = read(tmp_path / "train.csv", lines, teacher_scores=True)
    assert list(file.columns["hard negatives"]) == ["h 1", "h 2"] * 20
    assert [finding for finding in file.findings if finding.count] == []
    (finding,) = [finding for finding in read(tmp_path / "train.csv", lines).findings if finding.count]
    assert "--teacher_scores" in finding.examples[0]


def test_a_corpus_has_one_text_per_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.csv"
    path.write_text("文档一号\n水稻\t产量\n文档二号\n", encoding="utf-8")
    file = read_corpus_file(str(path))
    assert list(file.columns["documents"]) == ["文档一号", "文档二号"]
    (finding,) = [finding for finding in file.findings if finding.count]
    assert (finding.rule.name, finding.count, finding.total) == ("columns", 1, 3)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.csv"):
        read_pair_file(str(tmp_path / "nothing.csv"))


def test_an_empty_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"")
    assert read_pair_file(str(tmp_path / "train.csv")).columns == {}
