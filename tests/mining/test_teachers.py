"""The teachers of mining."""

import random
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from common.texts import text_key
from helpers import write_pairs
from mining.teachers import TeacherScores

DOCUMENTS = ["a", "b B", "c", "d", "e"]


def test_scores_of_a_file_are_found_by_the_same_texts(tmp_path: Path) -> None:
    rng = random.Random(0)
    queries = [f"q{number}" for number in range(6)]
    lines = [(rng.choice(queries).upper(), rng.choice([*DOCUMENTS, "B  b"]), f"{rng.random():.6f}") for _ in range(25)]
    expected: dict[tuple[str, str], float] = {}
    for query, document, score in lines:
        expected.setdefault((text_key(query), text_key(document)), float(score))  # the first one counts
    teacher = TeacherScores(write_pairs(tmp_path / "scores.tsv", lines))
    query_of_title, ids = np.array([3, 0, 0, 5]), np.array([rng.sample(range(5), 3) for _ in queries])
    titles = ["A", "b b", "x", "e"]
    title_scores, hit_scores = teacher(queries, titles, query_of_title, ids, DOCUMENTS)
    wanted = [
        expected.get((queries[row], text_key(title)), np.nan) for row, title in zip(query_of_title, titles, strict=True)
    ]
    np.testing.assert_allclose(title_scores, wanted, rtol=1e-6)
    wanted_hits = [
        [expected.get((query, text_key(DOCUMENTS[each])), np.nan) for each in row]
        for query, row in zip(queries, ids, strict=True)
    ]
    np.testing.assert_allclose(hit_scores, wanted_hits, rtol=1e-6)
    assert 0 < np.isnan(hit_scores).sum() < hit_scores.size


def test_case_counts_if_the_model_tells_it_apart(tmp_path: Path) -> None:
    teacher = TeacherScores(write_pairs(tmp_path / "scores.tsv", [("Q", "A", "0.5")]), lowercase=False)
    title_scores, _ = teacher(["Q", "q"], ["A", "a", "A"], np.array([0, 0, 1]), np.array([[0], [0]]), DOCUMENTS)
    np.testing.assert_array_equal(title_scores, [0.5, np.nan, np.nan])


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "scores.tsv", [("q", "a", "0.5"), ("q", "b", "high")])
    with pytest.raises(InputError, match=r"scores\.tsv:2: the third column isn't a finite number"):
        TeacherScores(file)
    assert len(TeacherScores(file, skip_bad_lines=True)._scores) == 1
