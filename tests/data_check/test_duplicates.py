"""Which texts are the same and which nearly, against comparing all of them."""

import random
from pathlib import Path

import numpy as np
import pytest

from common.texts import TextSet
from data_check.duplicates import COMPARED, TextGroups, _candidates
from data_check.files import Column, read_corpus_file
from data_check.sketches import NO_TERM, BloomFilters
from helpers import all_pairs
from retrieval.near_duplicates import are_near_duplicates, terms_of


def column_of(path: Path, texts: list[str]) -> Column:
    """The texts as a column of documents."""
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return read_corpus_file(str(path)).columns["documents"]


def test_same_texts_are_those_of_a_text_set(tmp_path: Path) -> None:
    texts = ["水稻产量", "水稻 产量", "Café", "CAFE", "cafe!", "Ａ", "A", "C++", "C", "C ++", "水稻产量", "…", "..."]
    other = ["A!", "cafe", "水稻产量。"]
    groups = TextGroups([column_of(tmp_path / "a", texts), column_of(tmp_path / "b", other)])
    seen = TextSet()
    first: dict[str | None, int] = {}
    expected = []
    for row, text in enumerate([*texts, *other]):
        seen.add(text)
        expected.append(first.setdefault(seen.find(text), row))
    assert groups.ids.tolist() == expected
    assert len(set(expected)) == 11
    assert [groups.text(row) for row in (0, 12, 13)] == [texts[0], texts[12], other[0]]
    assert groups.example(14) == f"{tmp_path / 'b'}:2: 'cafe'"


def test_near_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Every text has the first text that it is near to as its leader, or one that this was found beside."""
    rng = random.Random(0)
    titles = [f"{title}，以{rng.choice('江河湖海')}为例{number}" for number, (_, title) in enumerate(all_pairs()[:60])]
    near = [title[:-1] + "！" if number % 2 else title + " X" for number, title in enumerate(titles)]
    groups = TextGroups([column_of(tmp_path / "a", titles), column_of(tmp_path / "b", near)])
    texts = [*titles, *near]
    terms = list(map(terms_of, texts))
    for row, leader in enumerate(groups.groups.tolist()):
        assert leader <= row
        assert groups.groups[leader] == leader
        assert are_near_duplicates(terms[row], terms[leader])
    leaders = np.unique(groups.groups).tolist()
    apart = sum(are_near_duplicates(terms[a], terms[b]) for a in leaders for b in leaders if a < b)
    assert apart <= 1  # 3 % of the pairs at the bound are missed
    assert len(leaders) < len(texts) - 30


def test_filters_change_no_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    parts = [text for pair in all_pairs()[:40] for text in (pair[1][:8], pair[1][8:])]
    texts = ["".join(rng.choices(parts, k=3)) for _ in range(300)]
    column = column_of(tmp_path / "a", [*texts, *(text[1:] for text in texts[:100])])
    groups = TextGroups([column]).groups
    compared: list[bool] = []

    def keep_all(filters: BloomFilters, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        compared.extend(may_be_near(filters, rows, others))
        return np.ones(len(rows), bool)

    may_be_near = BloomFilters.may_be_near
    monkeypatch.setattr(BloomFilters, "may_be_near", keep_all)
    np.testing.assert_array_equal(TextGroups([column]).groups, groups)
    assert not all(compared)
    assert (groups != np.arange(400)).sum() > 10


def test_candidates_are_the_first_texts_of_each_bucket() -> None:
    bands = np.random.default_rng(0).integers(12, size=(3, 200), dtype=np.uint32)
    bands[1, ::3] = NO_TERM
    expected = set()
    for band in bands.tolist():
        for row, value in enumerate(band):
            others = [other for other in range(len(band)) if band[other] == value][:COMPARED]
            expected |= {(row, other) for other in others if other < row and value != NO_TERM}
    assert [*map(tuple, _candidates(bands).tolist())] == sorted(expected)
    assert _candidates(bands[:, :0]).shape == (0, 2)


def test_thousands_of_alike_texts_take_few_comparisons(tmp_path: Path) -> None:
    texts = [f"同一份公司年度报告的全文摘要以及说明 {number}" for number in range(3000)]
    groups = TextGroups([column_of(tmp_path / "a", texts)])
    assert set(groups.groups.tolist()) == {0}
