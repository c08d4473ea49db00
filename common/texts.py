"""What counts as text, and when two texts are the same."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
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
        self._keys: dict[str, str] = {}  # of the texts that another one was compared with
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
        return next((found for found in candidates if self._key(found) == key), None)

    def _key(self, kept: str) -> str:
        """The key of a text of the set."""
        if kept not in self._keys:
            self._keys[kept] = text_key(kept, self._lowercase)
        return self._keys[kept]

    def add(self, text: str) -> bool:
        """Adds a text, unless there is one with the same key; returns whether it did."""
        if self.find(text) is not None:
            return False
        self._append(text)
        return True

    def setdefault(self, text: str) -> str:
        """The text of the set with the same key; if there is none, adds this one."""
        found = self.find(text)
        if found is None:
            self._append(text)
            return text
        return found

    def _append(self, text: str) -> None:
        self._texts.setdefault(rough_key(text), []).append(text)

    def discard(self, text: str) -> None:
        """Removes the text with the same key, if there is one."""
        found = self.find(text)
        if found is not None:
            self._texts[rough_key(found)].remove(found)
            self._keys.pop(found, None)


class TextHashes(NamedTuple):
    """Hashes of N texts, which no other process has: Python hashes texts differently in each."""

    exact: np.ndarray  # int64 [N], equal for texts that are equal character by character
    rough: np.ndarray  # int64 [N], equal for texts with equal `rough_key`

    @classmethod
    def of(cls, texts: Sequence[str]) -> "TextHashes":
        """The hashes of texts."""
        exact = np.fromiter(map(hash, texts), np.int64, len(texts))
        return cls(exact, np.fromiter((hash(rough_key(text)) for text in texts), np.int64, len(texts)))

    @classmethod
    def join(cls, parts: "Iterable[TextHashes]") -> "TextHashes":
        """The hashes of all texts after each other."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def ids(self, text: Callable[[int], str], lowercase: bool = True) -> np.ndarray:
        """The first row with the same `text_key`, for each text, int64 [N].

        text: the text of a row, which is asked for only if another one has the same rough hash and isn't equal.
        """
        order = np.argsort(self.rough, kind="stable")
        in_order = self.rough[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = in_order[1:] != in_order[:-1]
        starts = np.flatnonzero(is_first)
        ids = np.empty(len(order), np.int64)
        ids[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
        kept = TextSet(lowercase=lowercase)
        row_of_kept: dict[str, int] = {}
        id_of_exact: dict[int, int] = {}
        different = np.flatnonzero(self.exact != self.exact[ids])
        firsts, exacts = ids[different].tolist(), self.exact[different].tolist()
        for row, first, exact in zip(different.tolist(), firsts, exacts, strict=True):
            if exact not in id_of_exact:
                row_of_kept.setdefault(kept.setdefault(text(first)), first)
                id_of_exact[exact] = row_of_kept.setdefault(kept.setdefault(text(row)), row)
            ids[row] = id_of_exact[exact]
        return ids


def text_ids(texts: Sequence[str], lowercase: bool = True) -> np.ndarray:
    """The first row with the same `text_key`, for each text, int64 [N]. lowercase: see `text_key`."""
    return TextHashes.of(texts).ids(texts.__getitem__, lowercase)
