"""What is marked in a document, which the tests of the search page check in the same way."""

import pytest
from markupsafe import Markup

from reporting.marking import LONGEST_TEXT, mark_shared


@pytest.mark.parametrize(
    ("query", "text", "marked"),
    [
        ("learning IN IoT", "Deep Learning in 2019", "Deep <mark>Learning</mark> <mark>in</mark> 2019"),
        ("水稻的产量", "论水稻产量研究水稻,产量", "论<mark>水稻产量</mark>研究<mark>水稻</mark>,<mark>产量</mark>"),
        ("水稻产量", "论水稻产量", "论<mark>水稻产量</mark>"),
        ("水稻", "水的稻", "水的稻"),  # single characters of several say little
        ("稻", "水稻", "水<mark>稻</mark>"),
        ("b", "<b>&B", "&lt;<mark>b</mark>&gt;&amp;<mark>B</mark>"),
        ("snake case", "snake_case", "<mark>snake</mark>_<mark>case</mark>"),
        ("ab", "abc", "abc"),
        ("", "a", "a"),
        ("a", "", ""),
    ],
)
def test_words_and_runs_of_characters_are_marked(query: str, text: str, marked: str) -> None:
    found = mark_shared(query, text)
    assert isinstance(found, Markup)
    assert found == marked


def test_a_long_text_is_cut() -> None:
    assert mark_shared("x", "a" * LONGEST_TEXT) == "a" * LONGEST_TEXT
    assert mark_shared("x", "a" * (LONGEST_TEXT + 1)) == "a" * LONGEST_TEXT + "…"
