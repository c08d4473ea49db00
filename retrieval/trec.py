"""Queries, judgements and runs in the forms of TREC and BEIR, which other programs read and write. Imports no Paddle.

There, queries and documents have ids. Their texts are in files of JSON lines, `{"_id": ..., "title": ..., "text": ...}`
as BEIR has them (Thakur et al. 2021), or in a file with a text per line, whose ids are the numbers of the lines.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import atomic_write
from common.lines import read_lines
from common.logs import log
from common.texts import TextSet
from data import Hit, TextPair, parse_text, positives_by_query
from retrieval.metrics import Judgement

JSON_LINES = ".jsonl"
QRELS_HEAD = ["query-id", "corpus-id", "score"]  # BEIR's
RUN_FILE, QRELS_FILE, BEIR_QRELS_FILE = "run.trec", "qrels.trec", "qrels.tsv"
QUERIES_FILE, CORPUS_FILE = "queries.jsonl", "corpus.jsonl"
TAG = "semantic_index"  # the name of the run
REMEDY = "correct them"


class IdentifiedTexts(NamedTuple):
    """The texts of a file by their ids."""

    path: str | Path
    texts: dict[str, str]

    def find(self, text_id: str) -> str:
        """Raises ValueError if the file has no such id."""
        if text_id not in self.texts:
            raise ValueError(f"{self.path} has no text with the id {text_id}")
        return self.texts[text_id]


class _Scored(NamedTuple):
    query_id: str
    document_id: str
    score: float  # float32, as trec_eval has it


def read_identified_texts(path: str | Path) -> IdentifiedTexts:
    """The texts of a file of JSON lines (`.jsonl`) or of a text per line. Raises InputError as `read_lines` does."""
    if Path(path).suffix == JSON_LINES:
        rows = (line.row for line in read_lines(path, _parse_json, remedy=REMEDY))
        return IdentifiedTexts(path, dict(row for row in rows if row))
    lines = read_lines(path, parse_text, remedy=REMEDY)
    return IdentifiedTexts(path, {str(line.number): line.row for line in lines if line.row})


def _parse_json(text: str) -> tuple[str, str]:
    """The id and the text of a JSON line; a title comes before the text, as in BEIR. Raises ValueError."""
    try:
        content = json.loads(text)
    except RecursionError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("_id"), str | int):
        raise ValueError('isn\'t a JSON object with "_id" and "text"')
    parts = [content.get(name) or "" for name in ("title", "text")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("the title or the text isn't a string")
    return str(content["_id"]), parse_text(" ".join(" ".join(parts).split()))


def read_qrels(path: str | Path, queries: IdentifiedTexts, documents: IdentifiedTexts) -> dict[str, set[str]]:
    """Query -> the titles that answer it, as `positives_by_query`; logs that grades above 1 count as 1.

    The file has TREC's form, `query 0 document grade`, or BEIR's, with a head and tabs. Raises InputError as
    `read_lines` does, also for ids without a text.
    """

    def parse(text: str) -> tuple[TextPair, int] | None:
        fields = text.split()
        if fields == QRELS_HEAD:
            return None
        if len(fields) not in (3, 4):
            raise ValueError(f"{len(fields)} columns, where TREC's qrels have 4 and BEIR's 3")
        try:
            grade = int(fields[-1])
        except ValueError:
            raise ValueError("the last column, the grade, isn't a whole number") from None
        return TextPair(queries.find(fields[0]), documents.find(fields[-2])), grade

    judged = [line.row for line in read_lines(path, parse, remedy=REMEDY) if line.row]
    if any(grade > 1 for _, grade in judged):
        log(f"{path}: has grades above 1, which count as 1")
    return positives_by_query(pair for pair, grade in judged if grade > 0)


def read_run(path: str | Path, queries: IdentifiedTexts, documents: IdentifiedTexts) -> list[Hit]:
    """The hits of a run, `query Q0 document rank score tag`, each query's best first.

    The order is trec_eval's: by the score in float32, of equal ones by the id, from the last to the first. Of queries
    with the same text the first counts. Raises InputError as `read_lines` does, also for ids without a text.
    """

    def parse(text: str) -> _Scored:
        fields = text.split()
        if len(fields) != 6:
            raise ValueError(f"{len(fields)} columns, where a TREC run has 6")
        query_id, _, document_id, _, score, _ = fields
        queries.find(query_id), documents.find(document_id)
        try:
            with np.errstate(over="ignore"):  # too large a number becomes infinite
                value = float(np.float32(score))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError("the fifth column isn't a finite number")
        return _Scored(query_id, document_id, value)

    by_query: dict[str, list[_Scored]] = {}
    for line in read_lines(path, parse, remedy=REMEDY):
        if line.row:
            by_query.setdefault(line.row.query_id, []).append(line.row)
    hits: list[Hit] = []
    seen = TextSet()
    for query_id, scored in by_query.items():
        if seen.add(queries.texts[query_id]):
            scored.sort(key=lambda each: (each.score, each.document_id), reverse=True)
            hits += (Hit(queries.texts[query_id], documents.texts[each.document_id], each.score) for each in scored)
    return hits


def write_trec(folder: str | Path, judgement: Judgement, corpus: Iterable[str]) -> None:
    """Writes what an evaluation compared: run, qrels in both forms, and the texts of the ids. Raises InputError.

    A query's id is its number, and a document's is its number in the corpus or, if it isn't there, `extra-` and another
    number. trec_eval looks at the scores alone, so one that isn't below the one before it is lowered by the least step.
    """
    folder = Path(folder)
    ids = _write_corpus(folder / CORPUS_FILE, judgement, corpus)
    queries = [(str(number), each) for number, each in enumerate(judgement.queries, 1)]
    qrels = [(query_id, ids[title]) for query_id, each in queries for title in sorted(each.titles)]
    with atomic_write(folder / QUERIES_FILE) as file:
        file.writelines(_json_line(query_id, each.query) for query_id, each in queries)
    with atomic_write(folder / QRELS_FILE) as file:
        file.writelines(f"{query_id} 0 {document_id} 1\n" for query_id, document_id in qrels)
    with atomic_write(folder / BEIR_QRELS_FILE) as file:
        file.writelines("\t".join(row) + "\n" for row in [QRELS_HEAD, *([*pair, "1"] for pair in qrels)])
    with atomic_write(folder / RUN_FILE) as file:
        for query_id, each in queries:
            scores = _descending(each.scores or range(len(each.documents), 0, -1))
            for rank, (document, score) in enumerate(zip(each.documents, scores, strict=True), 1):
                file.write(f"{query_id} Q0 {ids[document]} {rank} {score} {TAG}\n")


def _write_corpus(path: Path, judgement: Judgement, corpus: Iterable[str]) -> dict[str, str]:
    """Writes the texts of all documents; returns the ids of those of the evaluation, by their texts."""
    texts = [text for each in judgement.queries for text in (*sorted(each.titles), *each.documents)]
    distinct = TextSet(texts)
    ids: dict[str, str] = {}
    with atomic_write(path) as file:
        for number, document in enumerate(corpus, 1):
            file.write(_json_line(str(number), document))
            ids.setdefault(distinct.find(document) or "", str(number))
        for number, text in enumerate([text for text in distinct if text not in ids], 1):
            ids[text] = f"extra-{number}"
            file.write(_json_line(ids[text], text))
    return {text: ids[distinct.find(text) or ""] for text in texts}


def _json_line(text_id: str, text: str) -> str:
    return json.dumps({"_id": text_id, "title": "", "text": text}, ensure_ascii=False) + "\n"


def _descending(scores: Sequence[float]) -> Iterator[np.float32]:
    """The scores in float32, each below the one before it."""
    last = np.float32(np.inf)
    for score in scores:
        last = min(np.float32(score), np.nextafter(last, np.float32(-np.inf)))
        yield last
