"""Sketches against the slow way that splits each text into terms."""

import random

import numpy as np
import pytest

from data_check import sketches
from data_check.sketches import NO_TERM, Sketches, Terms, similarities, windows
from helpers import VARIED_TEXTS, all_pairs
from retrieval.near_duplicates import NEAR_DUPLICATE, jaccard, terms_of

# Characters whose terms `Terms` counts differently: ½ becomes two words, and ﾟ no term.
TEXTS = [text.replace("½", "").replace("ﾟ", "") for text in VARIED_TEXTS] + [
    "한국어 검색 엔진",
    *map("\t".join, all_pairs()),
]


def changed(rng: random.Random, text: str) -> str:
    """A text without some of its characters."""
    start = rng.randrange(len(text) + 1)
    return text[:start] + text[start + rng.randrange(3) :]


def test_similarities_are_those_of_the_terms() -> None:
    rng = random.Random(0)
    texts = [rng.choice(TEXTS) for _ in range(500)]
    others = [rng.choice(TEXTS) if rng.random() < 0.3 else changed(rng, text) for text in texts]
    expected = [jaccard(terms_of(text), terms_of(other)) for text, other in zip(texts, others, strict=True)]
    np.testing.assert_allclose(similarities(texts, others), expected, atol=1e-12)
    assert 0.2 < np.mean(np.array(expected) >= 0.8) < 0.8


def test_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    others = TEXTS[1:] + TEXTS[:1]
    expected = Sketches.of(TEXTS), similarities(TEXTS, others)
    monkeypatch.setattr(sketches, "WINDOW_CHARACTERS", 50)
    assert [*windows([20, 20, 20, 100, 0, 5])] == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, None)]
    found = Sketches.of(TEXTS)
    np.testing.assert_array_equal(found.bands, expected[0].bands)
    np.testing.assert_array_equal(found.filters.bits, expected[0].filters.bits)
    np.testing.assert_array_equal(found.filters.counts, expected[0].filters.counts)
    np.testing.assert_array_equal(similarities(TEXTS, others), expected[1])


def test_texts_have_as_many_distinct_numbers_as_terms() -> None:
    _, owners = Terms(TEXTS).distinct()
    expected = [len(terms_of(text)) for text in TEXTS]
    assert np.bincount(owners, minlength=len(TEXTS)).tolist() == expected


def test_the_smallest_number_of_a_text_is_that_of_one_of_its_terms() -> None:
    texts = ["水稻 产量 yield", "yield of 水稻", "", "，。"]
    signatures = Terms(texts).signatures()
    alone = [Terms([text]).signatures()[:, 0] for text in texts]
    np.testing.assert_array_equal(signatures.T, alone)
    terms = np.array([Terms([term]).signatures()[:, 0] for term in ("水", "稻", "水稻", "yield", "of")])
    smallest_of_characters = np.minimum(terms[0], terms[1])
    np.testing.assert_array_equal(terms[2] <= smallest_of_characters, True)
    np.testing.assert_array_equal(signatures[:, 1], np.minimum(terms[2:].min(0), smallest_of_characters))
    assert (signatures[:, 2:] == NO_TERM).all()


def test_near_texts_share_a_band_and_others_do_not() -> None:
    words = [f"w{number}" for number in range(20)]
    near = " ".join([*words[:-1], "other"])  # a Jaccard similarity of 19 / 21
    bands = Terms([" ".join(words), near, " ".join(words[:4]), " ".join(reversed(words)).upper() + "！"]).bands()
    assert (bands[:, 0] == bands[:, 1]).any()
    assert not (bands[:, 0] == bands[:, 2]).any()
    assert (bands[:, 0] == bands[:, 3]).all()


def test_filters_leave_out_no_near_duplicates() -> None:
    """But most of the others, also where a share of their terms would be enough to be candidates."""
    rng = random.Random(1)
    texts = [text for text in TEXTS if len(text) < 60]
    texts = [*texts, *(changed(rng, text) for text in texts), "a b c d", "a b c d e", "", "…"]
    filters = Sketches.of(texts).filters
    rows, others = np.array([(row, other) for row in range(len(texts)) for other in range(row)]).T
    terms = list(map(terms_of, texts))
    expected = np.array([jaccard(terms[row], terms[other]) for row, other in zip(rows, others, strict=True)])
    found = filters.may_be_near(rows, others)
    assert found[expected >= NEAR_DUPLICATE].all()
    assert (expected == NEAR_DUPLICATE).any()
    assert found[expected < 0.5].mean() < 0.05
    assert (expected >= NEAR_DUPLICATE).sum() > 100


def test_a_filter_holds_the_terms_of_its_text() -> None:
    filters = Sketches.of(["水稻 产量 yield", "", "水", "水稻", "yield"]).filters
    assert filters.counts.tolist() == [4 + 3 + 1, 0, 1, 3, 1]  # 稻产 is a pair, too: spaces don't part them
    np.testing.assert_array_equal(filters.bits[:, 2:] & filters.bits[:, :1], filters.bits[:, 2:])
    bits = [sum(int(word).bit_count() for word in words) for words in filters.bits.T]
    assert bits[1:] == [0, 1, 3, 1]
    assert bits[0] <= 8


def test_texts_without_terms_are_in_no_band() -> None:
    assert (Terms(["", "…", "a"]).bands()[:, :2] == NO_TERM).all()
    assert (Terms(["", "…", "a"]).bands()[:, 2] != NO_TERM).all()
