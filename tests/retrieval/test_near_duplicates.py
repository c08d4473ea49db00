"""Near-duplicates by the terms that texts have in common."""

import pytest

from retrieval.near_duplicates import are_near_duplicates, jaccard, terms_of


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("压力性损伤的护理研究进展", "压力性损伤的护理研究进展。", True),
        ("ＡＢＣ公司的Hello World", "abc公司的 hello, world!", True),
        ("压力性损伤的护理研究进展综述", "压力性损伤的护理研究进展", True),
        ("压力性损伤的护理研究进展", "压力性损伤的预防研究进展", False),
        ("how to treat a cold at home quickly and well", "how to treat a cold at home quickly", True),
        ("how to treat a cold", "how to treat a burn", False),
        ("", "。", True),
        ("水稻", "", False),
    ],
)
def test_near_duplicates(text: str, other: str, expected: bool) -> None:
    assert are_near_duplicates(terms_of(text), terms_of(other)) is expected
    assert are_near_duplicates(terms_of(other), terms_of(text)) is expected


def test_jaccard_is_the_share_of_common_terms() -> None:
    assert jaccard({"a", "b", "c"}, {"b", "c", "d"}) == 0.5
    assert jaccard(set(), {"a"}) == 0
