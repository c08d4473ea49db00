"""The report of an evaluation: its numbers, and what a real Chromium makes of it."""

import random
import re
from pathlib import Path

import pytest
from selenium import webdriver

from browser_helpers import at, complaints, requests, set_scheme, set_width, texts
from data import Hit
from helpers import all_pairs
from reporting.evaluation_report import Result, bm25_result, write_evaluation_report
from reporting.page import Bilingual
from retrieval.metrics import judge_hits, metrics, summarize

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & 水稻"
PAIRS = [(HOSTILE, f"{HOSTILE} 论"), *all_pairs()[:120]]
POSITIVES = {query: {title} for query, title in PAIRS}
CORPUS = [title for _, title in PAIRS]
SECTIONS = [
    *("Metrics", "Recall@K", "Groups of queries", "Beside BM25", "Beside other.txt", "Scores of right and wrong hits"),
    *("Suspected false negatives", "Worst queries", "Method"),
]


def result(name: str, seed: int, share: float, depth: int = 20) -> Result:
    """Of a search that puts the right answer first for this share of the queries, and else anywhere or nowhere."""
    rng = random.Random(seed)
    hits = []
    for query, title in PAIRS:
        documents = rng.sample(CORPUS, depth)
        if rng.random() < share:
            documents.insert(0, title)
        if seed == 1 and query == HOSTILE:
            documents = [f"{title}!?", *(document for document in documents if document != title)]
        hits += [Hit(query, document, 1 - rank / 100) for rank, document in enumerate(documents)]
    return Result(Bilingual(name, name), judge_hits(POSITIVES, hits, depth))


@pytest.fixture(scope="module")
def ours() -> Result:
    return result("ours.txt", 1, 0.6)


@pytest.fixture(scope="module")
def report(ours: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_evaluation_report(path, ours, bm25_result(POSITIVES, CORPUS, 20), result("other.txt", 2, 0.3))
    return path


@pytest.mark.browser
def test_it_has_all_parts_and_asks_nobody(window: webdriver.Chrome, report: Path) -> None:
    requests(window)
    window.get(report.as_uri())
    assert [address for address in requests(window) if not address.startswith("data:")] == [report.as_uri()]
    assert complaints(window) == []
    assert texts(window, "h2") == texts(window, "nav a") == SECTIONS
    assert window.execute_script("return window.hacked") is None
    at(window, "#language").click()
    assert len(set(texts(window, "h2")) & set(SECTIONS)) == 1  # Recall@K
    words = texts(window, "main p, main h3 span, main figcaption")
    assert [text for text in words if text and not re.search("[一-鿿]", text)] == []


@pytest.mark.browser
def test_its_numbers_are_those_of_evaluate(window: webdriver.Chrome, report: Path, ours: Result) -> None:
    window.get(report.as_uri())
    rows = [row.split() for row in texts(window, "section:first-of-type tbody tr")]
    expected = metrics(summarize(ours.judgement))
    assert [row[0] for row in rows] == list(expected)
    assert [float(row[1]) for row in rows] == pytest.approx([100 * value for value in expected.values()], abs=0.051)
    assert all(float(row[2]) <= float(row[1]) <= float(row[4]) for row in rows)
    groups = window.find_elements("css selector", "section:nth-of-type(3) table")
    counts = [[int(cell.text) for cell in table.find_elements("css selector", "td:nth-child(2)")] for table in groups]
    assert [sum(each) for each in counts] == [len(PAIRS)] * 3


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window(window: webdriver.Chrome, report: Path, width: int, scheme: str) -> None:
    """And the smallest text of its charts is legible."""
    set_scheme(window, scheme)
    set_width(window, width)
    window.get(report.as_uri())
    assert window.execute_script("return document.documentElement.scrollWidth") <= width
    size = "return document.querySelector('figure svg text').getBoundingClientRect().height"
    assert window.execute_script(size) > 12
    lines = "return [...document.querySelectorAll('figure > svg .line')].map(line => getComputedStyle(line).stroke)"
    colours = window.execute_script(lines)
    assert len(set(colours)) == len(colours) == 3  # of Recall@K
    assert "none" not in colours


@pytest.mark.browser
def test_a_worst_query_shows_what_was_wanted_and_what_came(window: webdriver.Chrome, report: Path) -> None:
    window.get(report.as_uri())
    section = window.find_elements("css selector", "section")[SECTIONS.index("Worst queries")]
    cards = section.find_elements("css selector", "article")
    card = next(card for card in cards if card.find_element("css selector", "h3").text == HOSTILE)
    wanted, *came = (each.text for each in card.find_elements("css selector", "dd"))
    assert wanted == f"{HOSTILE} 论"
    assert came[0] == f"1. {HOSTILE} 论!? 1.0000"
    assert came[-1] == "no right answer in 20 documents"
    assert "水稻" in [mark.text for mark in card.find_elements("css selector", "mark")]


def test_a_hit_that_says_the_same_is_suspected(report: Path) -> None:
    content = report.read_text()
    assert "1 hits of 1 queries, among the first 10 of each, count as wrong" in content
    assert "window.hacked = 1</script>" not in content


def test_without_a_corpus_or_another_result_it_says_so(ours: Result, tmp_path: Path) -> None:
    write_evaluation_report(tmp_path / "report.html", ours, bm25=None)
    content = (tmp_path / "report.html").read_text()
    assert "BM25 needs the documents" in content and "other.txt" not in content
    write_evaluation_report(tmp_path / "again.html", ours, bm25=None)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_a_search_that_finds_nothing_has_a_report(tmp_path: Path) -> None:
    for name, hits in (("nothing", []), ("all", [Hit("q", "a", 1.0)])):
        judgement = judge_hits({"q": {"a"}}, hits, 10)
        write_evaluation_report(tmp_path / name, Result(Bilingual(name, name), judgement), None)
        assert "There are no right or no wrong hits with scores" in (tmp_path / name).read_text()
