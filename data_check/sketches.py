"""MinHash sketches of many texts at once, to find those that may be near-duplicates. Imports no Paddle.

Each term of a text becomes a number. Each of many hash functions keeps the smallest number of the text's terms, and
texts that agree in a band of these are candidates (Leskovec et al., Mining of Massive Datasets, sections 3.3 and 3.4).
It is arithmetic on the characters of thousands of texts at once, which costs less than splitting them into terms.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from common.texts import REPLACEMENT_CHARACTER, text_key
from retrieval.lexical_index import UNSPACED
from retrieval.near_duplicates import NEAR_DUPLICATE

BANDS, BAND_ROWS = 12, 6  # of texts with a Jaccard similarity of 0.8, 97 % agree in a band; of those with 0.5, 17 %
BLOOM_WORDS = 2  # of 64 bits; where texts have 50 terms, 86 % of the candidates needn't be read for a comparison
IGNORED, SPACE, MARK, UNSPACED_LETTER, LETTER = range(5)  # classes of characters
CLASS_OF_CATEGORY = {"L": LETTER, "N": LETTER, "M": LETTER, "P": MARK, "S": MARK, "Z": SPACE, "C": IGNORED}
CHARACTERS = 0x110000  # of Unicode
LONGEST_WORD = 64  # characters; of a longer word, the rest is hashed with the same factor
WINDOW_CHARACTERS = 1 << 16  # of texts that are taken together; more don't fit into the processor's cache
ROUNDING = 1e-6  # of a bound in floating point, whose smallest steps are ninths
NO_TERM = np.uint32(2**32 - 1)  # the smallest number where a text has no term
JAMO = re.compile("[\u1100-\u11ff]+")  # the parts of Hangul's syllables
_factors = np.random.default_rng(0).integers(2**63, size=LONGEST_WORD + BANDS * BAND_ROWS, dtype=np.uint64) * 2 + 1
POSITION_FACTORS, HASH_FACTORS = np.split(_factors, [LONGEST_WORD])  # odd


class BloomFilters(NamedTuple):
    """Bloom filters of the terms of N texts, with one hash function."""

    bits: np.ndarray  # uint64 [BLOOM_WORDS, N]
    counts: np.ndarray  # uint32 [N]: the number of terms; repeated ones count again

    @classmethod
    def join(cls, parts: "Sequence[BloomFilters]") -> "BloomFilters":
        """The filters of all texts after each other."""
        return cls(*(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)))

    def may_be_near(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether texts can be near-duplicates, bool [P]; False is certain. rows, others: int64 [P].

        A term that one of two texts has alone changes at most one bit, so that the bits that differ are at most as many
        as these terms. Near-duplicates have few: of sets A and B with a Jaccard similarity s, exactly
        (1 - s) / (1 + s) * (|A| + |B|) elements are in one alone.
        """
        different = sum(_count_bits(words[rows] ^ words[others]) for words in self.bits)
        share = (1 - NEAR_DUPLICATE) / (1 + NEAR_DUPLICATE)
        return different <= share * (self.counts[rows].astype(np.int64) + self.counts[others]) + ROUNDING


class Sketches(NamedTuple):
    """What is kept of the terms of N texts to find near-duplicates."""

    bands: np.ndarray  # uint32 [BANDS, N], see `Terms.bands`
    filters: BloomFilters

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Sketches":
        """The sketches of any number of texts."""
        terms = (Terms(texts[part]) for part in windows(map(len, texts)))  # one after the other, since they are large
        return cls.join([cls(each.bands(), each.filters()) for each in terms])

    @classmethod
    def join(cls, parts: "Sequence[Sketches]") -> "Sketches":
        """The sketches of all texts after each other."""
        bands, filters = zip(*parts, strict=True)
        return cls(np.concatenate(bands, axis=1), BloomFilters.join(filters))


class Terms:
    """The numbers of the terms of many texts, one for each of the `split_terms` of a text.

    numbers: uint64 [T]; owners: int64 [T], the texts that they are of, in order. Characters, pairs of characters and
    words each have their own numbers.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.count = len(texts)
        # Decomposed, so that accents are characters of their own; only Hangul's syllables are put together again.
        joined = unicodedata.normalize("NFKD", "\n".join(_without_odd_characters(texts))).lower()
        joined = JAMO.sub(lambda match: unicodedata.normalize("NFC", match[0]), joined)
        characters = _codes(joined)
        classes = _classes()[characters]
        seen = classes != IGNORED
        owners = np.cumsum(characters == ord("\n"))[seen]
        characters, classes = characters[seen].astype(np.uint64), classes[seen]
        parts = [*_unspaced_terms(characters, classes, owners), _words(characters, classes, owners)]
        numbers, owners = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(owners, kind="stable")
        self.numbers, self.owners = numbers[order], owners[order]
        self._starts = np.flatnonzero(np.diff(self.owners, prepend=-1))  # where the terms of the next text begin
        self._rows = self.owners[self._starts]  # the texts that have terms

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct numbers of each text, uint64 [D], and the texts that they are of, int64 [D], in order."""
        order = np.lexsort((self.numbers, self.owners))
        numbers, owners = self.numbers[order], self.owners[order]
        is_new = np.ones(len(numbers), bool)
        is_new[1:] = (numbers[1:] != numbers[:-1]) | (owners[1:] != owners[:-1])
        return numbers[is_new], owners[is_new]

    def filters(self) -> BloomFilters:
        """The Bloom filters of the texts."""
        filters = np.zeros((BLOOM_WORDS, self.count), np.uint64)
        if len(self.numbers):
            bits = np.uint64(1) << (self.numbers & np.uint64(63))
            words = self.numbers >> np.uint64(6) & np.uint64(BLOOM_WORDS - 1)
            for word, row in enumerate(filters):
                row[self._rows] = np.bitwise_or.reduceat(np.where(words == word, bits, np.uint64(0)), self._starts)
        return BloomFilters(filters, np.bincount(self.owners, minlength=self.count).astype(np.uint32))

    def signatures(self) -> np.ndarray:
        """The smallest number of each text for each hash function, uint32 [BANDS * BAND_ROWS, N]."""
        smallest = np.full((len(HASH_FACTORS), self.count), NO_TERM)
        if len(self.numbers):
            hashes = np.empty_like(self.numbers)
            for row, factor in zip(smallest, HASH_FACTORS, strict=True):
                np.multiply(self.numbers, factor, out=hashes)
                row[self._rows] = np.minimum.reduceat(hashes, self._starts) >> np.uint64(32)
        return smallest

    def bands(self) -> np.ndarray:
        """The hash of each band of each text's signature, uint32 [BANDS, N]; NO_TERM for a text without terms."""
        signatures = self.signatures().astype(np.uint64).reshape(BANDS, BAND_ROWS, self.count)
        mixed = _mixed((signatures * HASH_FACTORS[:BAND_ROWS, None]).sum(1))
        hashes = np.minimum(mixed >> np.uint64(32), NO_TERM - np.uint32(1)).astype(np.uint32)
        return np.where((signatures == NO_TERM).all(1), NO_TERM, hashes)


def windows(lengths: Iterable[int]) -> Iterator[slice]:
    """Cuts texts of these lengths into slices of at most WINDOW_CHARACTERS, or of one text that is longer."""
    start = characters = 0
    for position, length in enumerate(lengths):
        if characters and characters + length > WINDOW_CHARACTERS:
            yield slice(start, position)
            start, characters = position, 0
        characters += length
    yield slice(start, None)


def similarities(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """What `retrieval.near_duplicates.jaccard` gives for each text and the other in its place, float64 [N]."""
    pairs = zip(texts, others, strict=True)
    parts = windows(len(text) + len(other) for text, other in pairs)
    return np.concatenate([_similarities(texts[part], others[part]) for part in parts])


def _similarities(texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    count = len(texts)
    numbers, owners = Terms([*texts, *others]).distinct()
    pairs = owners % count
    keys = _mixed(numbers ^ _mixed(pairs.astype(np.uint64)))  # equal where both of a pair have the term
    order = np.argsort(keys)
    keys, pairs = keys[order], pairs[order]
    common = np.bincount(pairs[1:][keys[1:] == keys[:-1]], minlength=count)
    either = np.bincount(pairs, minlength=count) - common
    return np.where(either, common / np.maximum(either, 1), 1.0)


def _unspaced_terms(
    characters: np.ndarray, classes: np.ndarray, owners: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The numbers of characters of scripts without spaces, and of pairs of adjacent ones; spaces don't part them."""
    seen = classes != SPACE
    characters, is_unspaced, owners = characters[seen], classes[seen] == UNSPACED_LETTER, owners[seen]
    pairs = np.flatnonzero(is_unspaced[:-1] & is_unspaced[1:])
    return [
        (_mixed(characters[is_unspaced]), owners[is_unspaced]),
        (_mixed(characters[pairs] << np.uint64(32) | characters[pairs + 1]), owners[pairs]),
    ]


def _words(characters: np.ndarray, classes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the other words."""
    is_letter = classes == LETTER
    starts = np.flatnonzero(is_letter & ~np.concatenate([[False], is_letter[:-1]]))
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    lengths = np.add.reduceat(is_letter, starts, dtype=np.int64)  # what follows a word isn't a letter
    letters = np.flatnonzero(is_letter)
    positions = np.arange(len(letters)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    factors = POSITION_FACTORS[np.minimum(positions, LONGEST_WORD - 1)]
    sums = np.add.reduceat(_mixed(characters[letters]) * factors, np.cumsum(lengths) - lengths)
    return _mixed(sums), owners[starts]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Hashes of numbers, uint64 (the finalizer of SplitMix64, Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _codes(text: str) -> np.ndarray:
    """The code of each character, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _count_bits(numbers: np.ndarray) -> np.ndarray:
    """How many bits of each number are 1, int64 [N]. numbers: uint64 [N]."""
    return _bits_of_bytes()[numbers.view(np.uint8).reshape(-1, 8)].sum(1, dtype=np.int64)


@cache
def _bits_of_bytes() -> np.ndarray:
    """How many bits of each byte are 1, uint8 [256]."""
    return np.array([byte.bit_count() for byte in range(256)], np.uint8)


def _without_odd_characters(texts: Sequence[str]) -> Sequence[str]:
    """The texts; of those with `_odd_characters` their `text_key`, which has the same words where it is decomposed."""
    codes = _codes("\n".join(texts))
    places = np.flatnonzero(_odd_characters()[codes])
    if not len(places):
        return texts
    changed = list(texts)
    for number in np.unique(np.cumsum(codes == ord("\n"))[places]).tolist():
        changed[number] = text_key(texts[number])
    return changed


@cache
def _classes() -> np.ndarray:
    """The class of each character, uint8 [CHARACTERS], as `split_terms` treats it."""
    characters = "".join(map(chr, range(CHARACTERS)))
    categories = map(unicodedata.category, characters)
    classes = np.array([CLASS_OF_CATEGORY[name[0]] if name != "Mn" else IGNORED for name in categories], np.uint8)
    classes[[match.start() for match in re.finditer(rf"(?=[^\W_])[{UNSPACED}]", characters)]] = UNSPACED_LETTER
    classes[[ord("\t"), ord("\r")]] = SPACE
    classes[ord("\n")] = MARK  # it parts the texts
    classes[ord(REPLACEMENT_CHARACTER)] = IGNORED
    return classes


@cache
def _odd_characters() -> np.ndarray:
    """Characters in which words end as they are, but not in their compatibility form, or the other way round.

    Bool [CHARACTERS].
    """
    classes = _classes()
    is_odd = np.zeros(CHARACTERS, bool)
    is_odd[list(map(ord, "\xb2\xb5\xba"))] = True  # `text_key` splits words at these letters
    for code in np.flatnonzero(classes != IGNORED).tolist():
        character = chr(code)
        compatible = unicodedata.normalize("NFKD", character)
        if compatible != character:
            kinds = {classes[ord(part)] for part in compatible} - {IGNORED}
            is_odd[code] = kinds != {classes[code]}
    return is_odd
