"""When two texts say nearly the same in nearly the same words. Imports no Paddle."""

from collections.abc import Set

from retrieval.lexical_index import split_terms

# The usual bound for near-duplicates of documents (Leskovec et al., Mining of Massive Datasets, chapter 3).
NEAR_DUPLICATE = 0.8


def terms_of(text: str) -> frozenset[str]:
    """The distinct `split_terms` of a text: case, accents, width of characters and punctuation don't count."""
    return frozenset(split_terms(text))


def jaccard(terms: Set[str], other: Set[str]) -> float:
    """The share of the terms of both that they have in common, from 0 to 1; 1 if neither has any."""
    common = len(terms & other)
    return common / (len(terms) + len(other) - common) if terms or other else 1.0


def are_near_duplicates(terms: Set[str], other: Set[str]) -> bool:
    """Whether two texts are near-duplicates. terms, other: `terms_of` each."""
    return jaccard(terms, other) >= NEAR_DUPLICATE
