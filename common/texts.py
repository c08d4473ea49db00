"""What counts as text."""

import unicodedata

REPLACEMENT_CHARACTER = "\ufffd"


def has_visible_text(text: str) -> bool:
    """Whether a tokenizer sees anything in the text: any character but white space, controls and formats (category C).

    The cleaning of BERT's tokenizer removes them, and U+FFFD too.
    """
    return any(not (c.isspace() or c == REPLACEMENT_CHARACTER or unicodedata.category(c).startswith("C")) for c in text)
