"""The forms of TREC and BEIR, with ir_measures as the other program."""

import json
import random
from pathlib import Path

import ir_measures
import pytest
from ir_measures import RR, R, nDCG

from common.errors import InputError
from data import Hit
from retrieval.metrics import evaluate, judge_hits, summarize
from retrieval.trec import IdentifiedTexts, read_identified_texts, read_qrels, read_run, write_trec

Files = tuple[IdentifiedTexts, IdentifiedTexts]


@pytest.fixture
def texts(tmp_path: Path) -> Files:
    """Queries in BEIR's form, and documents, one per line."""
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "水稻"}\n{"_id": 2, "text": "小麦", "title": ""}\n')
    (tmp_path / "corpus.csv").write_text("甲\n乙\n丙\n丁\n", encoding="utf-8")
    return read_identified_texts(tmp_path / "queries.jsonl"), read_identified_texts(tmp_path / "corpus.csv")


def random_hits(seed: int) -> tuple[dict[str, set[str]], list[Hit]]:
    """40 queries; some hits have equal scores, some titles are never found, some queries find their own text."""
    rng = random.Random(seed)
    documents = [f"文献{number}" for number in range(60)]
    positives = {f"查询{number}": set(rng.sample(documents, rng.choice([1, 2, 5]))) for number in range(40)}
    hits = []
    for number, query in enumerate(positives):
        if number % 7:
            scores = sorted((rng.choice([0.1, 0.5, rng.random()]) for _ in range(20)), reverse=True)
            found = [query, *rng.sample(documents, 19)]
            hits += [Hit(query, document, score) for document, score in zip(found, scores, strict=True)]
    return positives, hits


def test_ir_measures_finds_the_same_metrics_in_what_is_written(tmp_path: Path) -> None:
    positives, hits = random_hits(1)
    judgement = judge_hits(positives, hits, 10)
    write_trec(tmp_path, judgement, [f"文献{number}" for number in range(50)])
    qrels = list(ir_measures.read_trec_qrels(str(tmp_path / "qrels.trec")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))
    measures = [R @ 1, R @ 5, R @ 10, RR @ 10, nDCG @ 10]
    expected = ir_measures.calc_aggregate(measures, qrels, run)
    evaluation = summarize(judgement)
    found = [*evaluation.recall.values(), evaluation.mrr, evaluation.ndcg]
    assert found == pytest.approx([expected[measure] for measure in measures], abs=1e-9)
    corpus = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    assert corpus[:2] == [{"_id": str(row + 1), "title": "", "text": f"文献{row}"} for row in range(2)]
    assert {each["_id"] for each in corpus[50:]} == {f"extra-{number}" for number in range(1, len(corpus) - 49)}
    assert {each.doc_id for each in (*qrels, *run)} <= {each["_id"] for each in corpus}


@pytest.mark.parametrize("qrels", ["qrels.trec", "qrels.tsv"])
def test_what_is_written_is_read(tmp_path: Path, qrels: str) -> None:
    positives, hits = random_hits(2)
    judgement = judge_hits(positives, hits, 20)
    write_trec(tmp_path, judgement, ())
    queries, documents = (read_identified_texts(tmp_path / name) for name in ("queries.jsonl", "corpus.jsonl"))
    assert read_qrels(tmp_path / qrels, queries, documents) == positives
    again = judge_hits(positives, read_run(tmp_path / "run.trec", queries, documents), 20)
    assert [each.documents for each in again.queries] == [each.documents for each in judgement.queries]
    assert summarize(again)._replace(own_texts=0) == summarize(judgement)._replace(own_texts=0)


def test_a_run_is_in_trec_eval_s_order(texts: Files, tmp_path: Path) -> None:
    """By the score in float32, whatever the ranks and the lines say; of equal scores by the id, backwards."""
    run = "2 Q0 1 1 0.1 x\n2 Q0 2 2 0.5 x\nq1 Q0 2 1 0.7 x\n2 Q0 3 3 0.50000000001 x\n2 Q0 4 4 2 x\n"
    qrels = "2 0 1 1\n2 0 2 0\n2 0 3 1\nq1 0 4 1\n"
    (tmp_path / "run").write_text(run)
    (tmp_path / "qrels").write_text(qrels)
    hits = read_run(tmp_path / "run", *texts)
    assert [(hit.query, hit.document) for hit in hits] == [*(("小麦", name) for name in "丁丙乙甲"), ("水稻", "乙")]
    positives = read_qrels(tmp_path / "qrels", *texts)
    assert positives == {"小麦": {"甲", "丙"}, "水稻": {"丁"}}
    read = ir_measures.read_trec_qrels(qrels), ir_measures.read_trec_run(run)
    read = ir_measures.read_trec_qrels(qrels), ir_measures.read_trec_run(run)
    expected = ir_measures.calc_aggregate([RR @ 10], *read)
    assert summarize(judge_hits(positives, hits, 10)).mrr == expected[RR @ 10]


def test_grades_above_1_are_said_and_count_as_1(
    texts: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qrels").write_text("query-id\tcorpus-id\tscore\nq1\t1\t2\nq1\t3\t-1\n")
    assert read_qrels(tmp_path / "qrels", *texts) == {"水稻": {"甲"}}
    assert capsys.readouterr().err == f"{tmp_path}/qrels: has grades above 1, which count as 1\n"


def test_a_title_stands_before_the_text_and_line_breaks_become_spaces(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"_id": "a", "title": "Rice", "text": "is\\n a\\tplant", "metadata": {}}\n')
    assert read_identified_texts(tmp_path / "c.jsonl").texts == {"a": "Rice is a plant"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels", "q1 0 9 1\n", "qrels:1: {folder}/corpus.csv has no text with the id 9"),
        ("qrels", "q9 0 1 1\n", "qrels:1: {folder}/queries.jsonl has no text with the id q9"),
        ("qrels", "q1 0 1 yes\n", "qrels:1: the last column, the grade, isn't a whole number"),
        ("qrels", "q1 1\n", "qrels:1: 2 columns, where TREC's qrels have 4 and BEIR's 3"),
        ("run", "q1 Q0 1 1 0.5\n", "run:1: 5 columns, where a TREC run has 6"),
        ("run", "q1 Q0 1 1 nan x\n", "run:1: the fifth column isn't a finite number"),
        ("run", "q1 Q0 1 1 1e39 x\n", "run:1: the fifth column isn't a finite number"),
        ("run", "q1 Q0 5 1 0.5 x\n", "run:1: {folder}/corpus.csv has no text with the id 5"),
        ("t.jsonl", '["a"]\n', 't.jsonl:1: isn\'t a JSON object with "_id" and "text"'),
        ("t.jsonl", '{"text": "a"}\n', 't.jsonl:1: isn\'t a JSON object with "_id" and "text"'),
        ("t.jsonl", '{"_id": "a", "text": 1}\n', "t.jsonl:1: the title or the text isn't a string"),
        ("t.jsonl", '{"_id": "a", "text": " "}\n', "t.jsonl:1: the line is empty"),
        ("t.jsonl", "{\n", "t.jsonl:1: Expecting property name"),
        ("t.jsonl", "[" * 100_000 + "\n", 't.jsonl:1: isn\'t a JSON object with "_id" and "text"'),
    ],
)
def test_bad_lines_are_named(texts: Files, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    read, arguments = {"run": (read_run, texts), "qrels": (read_qrels, texts)}.get(name, (read_identified_texts, ()))
    with pytest.raises(InputError) as raised:
        read(tmp_path / name, *arguments)
    assert message.format(folder=tmp_path) in str(raised.value)


def test_an_evaluation_of_ids_is_that_of_their_texts(texts: Files, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("q1 Q0 1 1 0.9 x\nq1 Q0 2 2 0.8 x\n2 Q0 3 1 0.9 x\n")
    (tmp_path / "qrels").write_text("q1 0 2 1\n2 0 3 1\n")
    judgement = judge_hits(read_qrels(tmp_path / "qrels", *texts), read_run(tmp_path / "run", *texts), 5)
    expected = evaluate({"水稻": {"乙"}, "小麦": {"丙"}}, {"水稻": ["甲", "乙"], "小麦": ["丙"]}, 5)
    assert summarize(judgement) == expected
