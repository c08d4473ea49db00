"""The document that has most terms in common with a text. Imports no Paddle."""

from collections.abc import Sequence

import numpy as np

from common.logs import progress_bar
from data_check.sketches import Terms, windows

BLOCK = 8192  # documents that are looked at together


def nearest_documents(texts: Sequence[str], documents: Sequence[str]) -> list[tuple[int, float]]:
    """For each text the row of the nearest document, the first of equal ones, and their `jaccard`; 0 if none is near.

    texts: a few, each of which is compared with all documents.
    """
    nearest = [(0, 0.0)] * len(texts)
    if not texts:
        return nearest
    numbers, owners = Terms(texts).distinct()
    wanted = [numbers[owners == number] for number in range(len(texts))]
    with progress_bar(len(documents), "nearest documents", "document") as progress:
        for start in range(0, len(documents), BLOCK):
            block = documents[start : start + BLOCK]
            for part in windows(map(len, block)):
                for number, (row, similarity) in enumerate(_nearest(wanted, block[part])):
                    if similarity > nearest[number][1]:
                        nearest[number] = start + part.start + row, similarity
            progress.update(len(block))
    return nearest


def _nearest(wanted: Sequence[np.ndarray], documents: Sequence[str]) -> list[tuple[int, float]]:
    """wanted: for each text the numbers of its terms, uint64."""
    numbers, owners = Terms(documents).distinct()
    sizes = np.bincount(owners, minlength=len(documents))
    is_wanted = np.isin(numbers, np.concatenate(wanted))
    numbers, owners = numbers[is_wanted], owners[is_wanted]
    found = []
    for terms in wanted:
        common = np.bincount(owners[np.isin(numbers, terms)], minlength=len(documents))
        similarities = common / np.maximum(1, len(terms) + sizes - common)
        row = int(similarities.argmax())
        found.append((row, float(similarities[row])))
    return found
