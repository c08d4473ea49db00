"""BM25 over the words of a corpus, to search beside the vectors. Imports no Paddle."""

import math
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from common.errors import InputError
from common.files import atomic_write, read_json, write_json
from common.logs import progress_bar
from common.texts import text_key
from data import write_vectors

LEXICAL_CHOICES = ("bm25",)
# The usual values of BM25 (Robertson and Zaragoza 2009, section 3.2; Lucene's defaults).
K1 = 1.2
B = 0.75
TERMS_FILE = "bm25_terms.txt"  # a term per line
SCORES_FILE = "bm25_scores.npy"  # float32 [P]: for each term in turn, its scores in the documents that have it
DOCUMENTS_FILE = "bm25_documents.npy"  # int32 [P]: the rows of these documents
OFFSETS_FILE = "bm25_offsets.npy"  # int64 [terms + 1]: where the scores of a term begin and end
FUSION_FILE = "fusion.json"  # not in the manifest, since tuning replaces it alone
# Scripts without spaces between words, and Korean, whose words have many endings: Thai and Lao, Burmese, Hangul, Khmer,
# Chinese and kana. Lucene's CJKAnalyzer indexes characters and pairs of adjacent ones, too.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
UNSPACED_RUN = re.compile(rf"([{UNSPACED}](?: ?[{UNSPACED}])*)")


def split_terms(text: str) -> list[str]:
    """The units that BM25 counts: words, and in scripts without spaces characters and pairs of adjacent characters.

    They are in lower case, without accents, in the compatibility form NFKC, and without punctuation. Texts with the
    same `text_key` have the same terms.
    """
    key = unicodedata.normalize("NFKC", text_key(text)).lower()
    terms: list[str] = []
    for number, part in enumerate(UNSPACED_RUN.split(key)):
        if number % 2:  # `split` puts the runs between the other parts
            characters = part.replace(" ", "")
            terms += characters
            terms += map("".join, pairwise(characters))
        else:
            terms += (word for word in part.split() if any(map(str.isalnum, word)))
    return terms


class Fusion(NamedTuple):
    """How much the words count beside the vectors, see `retrieval.hybrid_search.fuse`."""

    lexical_weight: float = 1.0
    rrf_k: int = 10

    def save(self, folder: Path) -> None:
        """Writes it into the folder of an index. Raises InputError if it can't."""
        write_json(folder / FUSION_FILE, self._asdict())

    @classmethod
    def load(cls, folder: Path) -> "Fusion":
        """Reads what `save` wrote; the defaults if there is no file. Raises InputError for anything else."""
        file = folder / FUSION_FILE
        if not file.exists():
            return cls()
        content = read_json(file)
        weight, rrf_k = content.get("lexical_weight"), content.get("rrf_k")
        if not (isinstance(weight, int | float) and isinstance(rrf_k, int) and 0 <= weight < math.inf and rrf_k >= 0):
            raise InputError(f"{file}: isn't a weight and a k; remove it, which restores the defaults")
        return cls(weight, rrf_k)


DEFAULT_FUSION = Fusion()


class LexicalIndex:
    """BM25 in the form of Lucene, as bm25s computes it (Lù 2024, arXiv:2407.03618); the id of a document is its row.

    term_ids: term -> its number; scores [P], documents [P], offsets [terms + 1]: see the files; settings: as the
    property has them.
    """

    def __init__(
        self,
        term_ids: dict[str, int],
        scores: np.ndarray,
        documents: np.ndarray,
        offsets: np.ndarray,
        settings: Mapping[str, Any],
    ) -> None:
        self._term_ids, self._offsets = term_ids, offsets
        self._built, self._mean_length = settings["documents"], settings["mean_length"]
        self._bm25 = _import_bm25s().BM25(k1=K1, b=B)
        self._bm25.scores = {"data": scores, "indices": documents, "indptr": offsets, "num_docs": self._built}
        self._bm25.nonoccurrence_array = None  # which only other forms of BM25 have
        self._size = self._built
        self._added: dict[str, list[tuple[int, np.float32]]] = {}  # term -> (row, weight of the term there)
        self._deleted: set[int] = set()

    @classmethod
    def build(cls, documents: Iterable[str], size: int) -> "LexicalIndex":
        """Indexes documents in the order of their ids; size: their number."""
        term_ids: dict[str, int] = {}
        rows = []
        with progress_bar(size, "words", "document") as progress:
            for document in documents:
                rows.append(array("i", [term_ids.setdefault(term, len(term_ids)) for term in split_terms(document)]))
                progress.update()
        bm25 = _import_bm25s().BM25(k1=K1, b=B)
        with np.errstate(invalid="ignore"):  # the mean length is 0 if no document has a term
            bm25.index((rows, term_ids), create_empty_token=False, show_progress=sys.stderr.isatty())
        settings = {"documents": len(rows), "mean_length": sum(map(len, rows)) / len(rows)}
        scores = bm25.scores
        return cls(term_ids, scores["data"], scores["indices"], scores["indptr"], settings)

    def __len__(self) -> int:
        return self._size

    @property
    def has_changes(self) -> bool:
        """Whether documents were added or deleted since it was built."""
        return self._size > self._built or bool(self._deleted)

    def add(self, documents: Iterable[str]) -> None:
        """Adds documents at the end, in a time that doesn't depend on those that are there.

        Their scores come from the frequencies and the mean length of the documents that the index was built from, as
        the others' do, so they differ a little from those of an index that is built of all.
        """
        for document in documents:
            for term, weight in self._weights(document).items():
                self._added.setdefault(term, []).append((self._size, weight))
            self._size += 1

    def delete(self, ids: Iterable[int]) -> None:
        """Leaves these documents out of every search; the ids of the others stay."""
        self._deleted.update(ids)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents with the highest scores, best first; of equal ones the smaller id.

        Returns ids, int64 [Q, min(k, N)], and scores, float32 of the same shape; -1 and 0 where fewer documents share a
        term with the query.
        """
        k = min(k, len(self))
        ids, scores = np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32)
        with progress_bar(len(queries), "lexical search", "query") as progress:
            for row, query in enumerate(queries):
                all_scores = self._all_scores(split_terms(query))
                best = _best_rows(all_scores, k)
                ids[row, : len(best)], scores[row, : len(best)] = best, all_scores[best]
                progress.update()
        return ids, scores

    def score(self, query: str, document: str) -> float:
        """The score of any document, by the frequencies and the mean length of those that the index was built from."""
        weights = self._weights(document)
        return float(sum(self._idf(term) * weights[term] for term in split_terms(query) if term in weights))

    def _weights(self, document: str) -> dict[str, np.float32]:
        """What each term of a document adds to its score, before the term's inverse document frequency."""
        counts = Counter(split_terms(document))
        norm = np.float32(K1 * (1 - B + B * counts.total() / (self._mean_length or 1)))  # as bm25s rounds it
        return {term: np.float32(count) / (norm + np.float32(count)) for term, count in counts.items()}

    def _all_scores(self, terms: Sequence[str]) -> np.ndarray:
        """The score of every document, float32 [N]."""
        scores = np.zeros(self._size, np.float32)
        if known := [self._term_ids[term] for term in terms if term in self._term_ids]:
            scores[: self._built] = self._bm25.get_scores_from_ids(known)
        for term in terms if self._added else ():
            for row, weight in self._added.get(term, ()):
                scores[row] += self._idf(term) * weight
        scores[list(self._deleted)] = 0
        return scores

    def _idf(self, term: str) -> np.float32:
        """Inverse document frequency in Lucene's form; a term that it wasn't built with counts as in one document."""
        number = self._term_ids.get(term)
        frequency = 1 if number is None else int(self._offsets[number + 1] - self._offsets[number])
        return np.float32(math.log(1 + (self._built - frequency + 0.5) / (frequency + 0.5)))

    @property
    def settings(self) -> dict[str, Any]:
        """What `load` needs in addition to the files, as JSON values."""
        return {"documents": self._built, "mean_length": self._mean_length}

    def save(self, folder: Path) -> None:
        """Writes the index as it was built, without changes, into an existing folder. Raises InputError if it can't."""
        with atomic_write(folder / TERMS_FILE) as file:
            file.writelines(term + "\n" for term in self._term_ids)
        scores = self._bm25.scores
        for name, values in ((SCORES_FILE, "data"), (DOCUMENTS_FILE, "indices"), (OFFSETS_FILE, "indptr")):
            write_vectors(folder / name, scores[values])

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "LexicalIndex":
        """Reads what `save` wrote; the arrays stay on the disk and are mapped.

        Check the files' hashes first. Raises InputError if they can't be read or don't fit together.
        """
        try:
            terms = (folder / TERMS_FILE).read_bytes().decode().split("\n")[:-1]
            scores, documents, offsets = (
                np.load(folder / name, mmap_mode="r", allow_pickle=False)
                for name in (SCORES_FILE, DOCUMENTS_FILE, OFFSETS_FILE)
            )
            fits = len(offsets) == len(terms) + 1 and len(scores) == len(documents) == offsets[-1]
        except (OSError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"{folder}: its BM25 index can't be read ({error}); build the index again") from None
        if not fits:
            raise InputError(f"{folder}: the files of its BM25 index don't fit together; build the index again")
        return cls({term: number for number, term in enumerate(terms)}, scores, documents, offsets, settings)


def _import_bm25s() -> ModuleType:
    import bm25s  # takes up to 0.3 s, which --help shouldn't

    return bm25s


def _best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k highest scores above 0, best first, of equal ones the first. scores: float32 [N], k <= N."""
    lowest = np.partition(scores, -k)[-k]
    rows = np.flatnonzero((scores >= lowest) & (scores > 0))
    return rows[np.lexsort((rows, -scores[rows]))][:k]
