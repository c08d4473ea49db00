"""Mines the hard negatives of a training file."""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ann_util import IndexOptions
from common.distributed import barrier
from common.files import atomic_write
from data import TextPair
from encoding.text_encoder import Encoder
from mining.blocks import PairBlocks
from mining.hard_negatives import REASONS, KnownPositives, MiningRules, PairHits, choose_negatives, score_limits
from mining.searchers import Found, Searcher
from mining.teachers import Teacher, TeacherEncoder
from retrieval.corpus import Corpus
from retrieval.documents import Documents
from retrieval.pipeline import encode_corpus, encode_queries, open_or_build_index, sample_of
from retrieval.saved_index import LocalDocumentIndex, load_index

INDEX_FOLDER, VECTORS_FOLDER, TEACHER_FOLDER = "index", "vectors", "teacher_vectors"


class Mined(NamedTuple):
    """What was mined for some pairs."""

    negatives: list[list[str]]  # of each pair, best first, those at random last
    scores: list[list[float]]  # of each pair: its title's, then its negatives'
    left_out: Counter[str]  # why hits were none, see `hard_negatives.REASONS`


@dataclass(frozen=True)
class Miner:
    """Mines the hard negatives of pairs: `rules` say which hits of a pair's query are taken.

    teacher: its scores take the place of the searcher's, which then only finds the hits.
    """

    pairs: Sequence[TextPair]
    positives: KnownPositives
    rules: MiningRules
    searcher: Searcher
    teacher: Teacher | None = None

    def __call__(self, rows: range) -> Mined:
        """Mines for the pairs in these rows. Raises InputError as the searcher does."""
        queries = list(dict.fromkeys(self.pairs[row].query for row in rows))
        number_of_query = {query: number for number, query in enumerate(queries)}
        query_of_row = np.array([number_of_query[self.pairs[row].query] for row in rows])
        found = self._search(queries, [self.pairs[row].title for row in rows], query_of_row)
        limits = score_limits(found.title_scores, self.rules.max_relative_score)
        documents = self.searcher.documents
        positives = {}
        mined = Mined([], [], Counter())
        for place, (row, number) in enumerate(zip(rows, query_of_row.tolist(), strict=True)):
            if number not in positives:
                positives[number] = self.positives.of(row)
            count = np.count_nonzero(found.ids[number] >= 0)
            ids, scores = found.ids[number, :count].tolist(), found.scores[number, :count].tolist()
            hits = PairHits(ids, scores, float(limits[place]))
            chosen = choose_negatives(hits, documents, positives[number], self.rules, row, mined.left_out)
            mined.negatives.append([documents[ids[each]] for each in chosen])
            mined.scores.append([float(found.title_scores[place]), *(scores[each] for each in chosen)])
        return mined

    def _search(self, queries: Sequence[str], titles: Sequence[str], query_of_title: np.ndarray) -> Found:
        """The hits, with the scores that count."""
        if not self.teacher:
            return self.searcher(queries, titles, query_of_title, self.rules.to_rank)
        found = self.searcher(queries, [], query_of_title[:0], self.rules.to_rank)  # the teacher scores the titles
        ids = np.maximum(found.ids, 0)
        title_scores, scores = self.teacher(queries, titles, query_of_title, ids, self.searcher.documents)
        return Found(found.ids, scores, title_scores)


def sha256_of_pairs(pairs: Sequence[TextPair]) -> str:
    """Hash of queries and titles in hex; it doesn't depend on line ends, skipped lines and other columns."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(f"{pair.query}\t{pair.title}\n".encode())
    return digest.hexdigest()


def read_mined(blocks: PairBlocks, number: int) -> Mined:
    """What was mined for a block. Raises InputError if it isn't as it was written."""
    content = blocks.read(number)
    try:
        mined = Mined(content["negatives"], content["scores"], Counter(content["left_out"]))
        complete = len(mined.negatives) == len(mined.scores) == len(blocks.rows[number])
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise blocks.damaged(number)
    return mined


@contextlib.contextmanager
def index_on_all_ranks(
    encoder: Encoder,
    queries: Sequence[str],
    k: int,
    *,
    corpus: Corpus | None,
    options: IndexOptions,
    folder: Path,
    index_dir: str | Path | None = None,
    embedding_dir: str | Path | None = None,
) -> Iterator[LocalDocumentIndex]:
    """Yields the index to search on every rank: the saved one in index_dir, or one that rank 0 builds and saves there.

    Without index_dir and embedding_dir the index and the vectors of the corpus are kept in `folder`. queries, k: the
    searches to tune a new index for. Other arguments and errors are those of `pipeline.open_or_build_index`.
    """
    index_dir, embedding_dir = index_dir or folder / INDEX_FOLDER, embedding_dir or folder / VECTORS_FOLDER
    query_vectors = encode_queries(encoder, sample_of(queries))
    with open_or_build_index(
        encoder,
        query_vectors,
        k,
        corpus=corpus,
        options=options,
        parent=folder,
        index_dir=index_dir,
        embedding_dir=embedding_dir,
    ) as own:
        barrier()  # rank 0 has saved it
        yield own or load_index(index_dir, encoder.fingerprint, corpus)


def encode_for_teacher(teacher: Encoder, documents: Corpus | Documents, folder: Path) -> TeacherEncoder:
    """Encodes the documents that are searched with another encoder, on all ranks; the vectors are kept in `folder`.

    Raises InputError as `encode_corpus` does.
    """
    return TeacherEncoder(teacher, encode_corpus(teacher, documents, folder / TEACHER_FOLDER))


class MiningSummary(NamedTuple):
    """What was mined for a training file."""

    pairs: int
    complete: int  # pairs with as many hard negatives as wanted
    without: int  # pairs without any
    negatives: int
    left_out: Counter[str]

    def __str__(self) -> str:
        fewer = self.pairs - self.complete - self.without
        counts = f"all for {self.complete}, fewer for {fewer}, none for {self.without}"
        lines = [f"{self.negatives} hard negatives of {self.pairs} pairs: {counts}"]
        lines += [f"left out {self.left_out[reason]} hits {reason}" for reason in REASONS if self.left_out[reason]]
        return "\n".join(lines)


def write_training_file(
    path: str | Path, pairs: Sequence[TextPair], blocks: PairBlocks, wanted: int, write_scores: bool
) -> MiningSummary:
    """Writes `query<TAB>title[<TAB>hard negative]...` for each pair, in order, and with write_scores then the scores.

    wanted: hard negatives of a pair. Raises InputError if the file can't be written.
    """
    counts, left_out = Counter[int](), Counter[str]()
    with atomic_write(path) as file:
        for number, rows in enumerate(blocks.rows):
            mined = read_mined(blocks, number)
            left_out.update(mined.left_out)
            for row, negatives, scores in zip(rows, mined.negatives, mined.scores, strict=True):
                counts[len(negatives)] += 1
                columns = [pairs[row].query, pairs[row].title, *negatives]
                if write_scores:  # a title without one has no hard negatives, so that its score doesn't matter
                    columns += (f"{0.0 if math.isnan(score) else score:.6f}" for score in scores)
                file.write("\t".join(columns) + "\n")
    found = sum(count * pairs_with for count, pairs_with in counts.items())
    return MiningSummary(len(pairs), counts[wanted], counts[0], found, left_out)
