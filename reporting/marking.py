"""Marks what a query and a document have in common, as the search page does. Imports no Paddle."""

import re
from collections.abc import Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from retrieval.lexical_index import UNSPACED

CHARACTER = re.compile(rf"[{UNSPACED}]")  # of scripts without spaces between words
PIECE = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+")  # such a character, or a word
LONGEST_TEXT = 300  # characters that are shown


def mark_shared(query: str, text: str) -> Markup:
    """The text, cut if it is long, in which the pieces that the query has are marked, see `are_shared`."""
    text = shorten(text)
    pieces = list(PIECE.finditer(text))
    shared = are_shared(query, [piece[0] for piece in pieces])
    spans: list[tuple[int, int]] = []  # that are marked
    for piece, is_shared in zip(pieces, shared, strict=True):
        if is_shared and spans and spans[-1][1] == piece.start():
            spans[-1] = spans[-1][0], piece.end()
        elif is_shared:
            spans.append(piece.span())
    starts = [0, *(end for _, end in spans)]
    parts = [
        escape(text[start:span_start]) + Markup("<mark>{}</mark>").format(text[span_start:span_end])
        for start, (span_start, span_end) in zip(starts, spans, strict=False)
    ]
    return Markup("").join(parts) + escape(text[starts[-1] :])


def are_shared(query: str, pieces: Sequence[str]) -> list[bool]:
    """For each piece of a document whether the query has it: a word, or a character with one of its neighbours."""
    names = [name.lower() for name in PIECE.findall(query)]
    known, pairs = set(names), {first + second for first, second in pairwise(names)}
    found = ["", *(piece.lower() for piece in pieces), ""]
    is_pair = [first + second in pairs for first, second in pairwise(found)]
    return [
        name in known and (not CHARACTER.match(name) or len(names) == 1 or before or after)
        for name, before, after in zip(found[1:-1], is_pair, is_pair[1:], strict=False)
    ]


def shorten(text: str) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
