"""The nearest document against comparing all of them."""

import pytest

from data_check import nearest, sketches
from data_check.nearest import nearest_documents
from helpers import all_pairs
from retrieval.near_duplicates import jaccard, terms_of


def test_nearest_is_the_first_of_the_most_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [title for _, title in all_pairs()] * 2
    texts = [query for query, _ in all_pairs()[::17]] + ["xyz", ""]
    monkeypatch.setattr(nearest, "BLOCK", 100)
    monkeypatch.setattr(sketches, "WINDOW_CHARACTERS", 500)
    for text, (row, similarity) in zip(texts, nearest_documents(texts, documents), strict=True):
        similarities = [jaccard(terms_of(text), terms_of(document)) for document in documents]
        assert similarity == pytest.approx(max(similarities))
        assert row == similarities.index(max(similarities))


def test_no_text_is_near_to_no_document() -> None:
    assert nearest_documents([], ["a"]) == []
    assert nearest_documents(["a"], []) == [(0, 0.0)]
