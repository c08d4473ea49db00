"""What counts as text, and when two texts are the same."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

QUERY, DOCUMENT = ROLES = ("query", "document")  # what a text is in a search; a model may have a prefix for each
REPLACEMENT_CHARACTER = "\ufffd"
NO_LETTERS = re.compile(r"[\W_]+")


def has_visible_text(text: str) -> bool:
    """Whether a tokenizer sees anything in the text; BERT's removes or ignores all characters that don't count here."""
    if text[:1].isalnum():  # nearly always, and much faster
        return True
    return any(not (c.isspace() or c == REPLACEMENT_CHARACTER or _is_invisible(c)) for c in text)


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)  # C: controls, formats such as U+200B; Mn: marks on another character
    return category.startswith("C") or category == "Mn"


def wordpiece_tokenizer(model: WordPiece, do_lower_case: bool, split_symbols: bool = True) -> Tokenizer:
    """Tokenizes like PaddleNLP's ErnieTokenizer and BertTokenizer; without split_symbols like Hugging Face's.

    Both of these make a special token of "[SEP]" in a text; here it is ordinary text.
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(do_lower_case)
    tokenizer.pre_tokenizer = _word_splitter() if split_symbols else BertPreTokenizer()
    return tokenizer


@cache
def _normalizer(lowercase: bool) -> BertNormalizer:
    return BertNormalizer(strip_accents=lowercase, lowercase=lowercase)


@cache
def _word_splitter() -> PreTokenizer:
    # BERT splits at punctuation; PaddleNLP also splits at symbols and at the characters of its `_is_symbol`.
    symbols = Split(Regex(r"[\p{S}\x{AD}\x{B2}\x{B5}\x{BA}\x{D8}\x{14B}\x{1B1}\x{3007}]"), "isolated")
    return PreTokenizers([BertPreTokenizer(), symbols])


def text_key(text: str, lowercase: bool = True) -> str:
    """The words that a tokenizer sees, separated by spaces: texts with equal keys have equal tokens.

    Without split_symbols, texts that differ in spaces beside a symbol have equal keys, too, though other tokens.
    lowercase: whether the tokenizer lowercases, as most do.
    """
    words = _word_splitter().pre_tokenize_str(_normalizer(lowercase).normalize_str(text))
    return " ".join(word for word, _ in words)


def rough_key(text: str) -> str:
    """Equal for texts with equal keys, and rarely for others; takes a tenth of the time of `text_key`."""
    letters = NO_LETTERS.sub("", unicodedata.normalize("NFD", text).lower())
    return letters.replace("ς", "σ") or text_key(text)  # Python writes a sigma at the end of a word differently


class TextSet:
    """Texts, of which only the first of those with equal keys is kept. lowercase: see `text_key`."""

    def __init__(self, texts: Iterable[str] = (), lowercase: bool = True) -> None:
        self._lowercase = lowercase
        self._texts: dict[str, list[str]] = {}  # by rough key: keys are compared only where these are equal
        for text in texts:
            self.add(text)

    def __len__(self) -> int:
        return sum(map(len, self._texts.values()))

    def __iter__(self) -> Iterator[str]:
        for texts in self._texts.values():
            yield from texts

    def find(self, text: str) -> str | None:
        """The text of the set with the same key, or None."""
        candidates = self._texts.get(rough_key(text), ()) if self._texts else ()
        if text in candidates:
            return text
        key = text_key(text, self._lowercase) if candidates else ""
        return next((found for found in candidates if text_key(found, self._lowercase) == key), None)

    def add(self, text: str) -> bool:
        """Adds a text, unless there is one with the same key; returns whether it did."""
        if self.find(text) is not None:
            return False
        self._texts.setdefault(rough_key(text), []).append(text)
        return True

    def discard(self, text: str) -> None:
        """Removes the text with the same key, if there is one."""
        found = self.find(text)
        if found is not None:
            self._texts[rough_key(found)].remove(found)
