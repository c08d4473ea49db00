"""Groups, worst queries, suspected false negatives and distributions, on queries of which each is known."""

import numpy as np
import pytest

from retrieval.error_analysis import (
    HISTOGRAM_BINS,
    by_overlap,
    by_positive_count,
    by_query_length,
    changed_most,
    curve_cutoffs,
    overlap,
    recall_curve,
    score_distributions,
    suspected_false_negatives,
    worst_first,
)
from retrieval.metrics import JudgedQuery, Judgement, recall_at_k


def judged(query: str, titles: set[str], documents: list[str], scores: list[float] | None = None) -> JudgedQuery:
    return JudgedQuery(query, titles, documents, scores or [], bool(documents), has_own_text=False)


def sizes(groups: list) -> dict[str, list[int]]:
    return {group.label: group.rows.tolist() for group in groups}


def test_groups_by_length_are_about_equal_and_hold_each_query_once() -> None:
    queries = [judged("长" * length, {"a"}, []) for length in (1, 2, 3, 4, 5, 6, 7, 8)]
    assert sizes(by_query_length(queries)) == {"1–2": [0, 1], "3–4": [2, 3], "5–6": [4, 5], "7–8": [6, 7]}
    assert sizes(by_query_length(queries[:1] * 3)) == {"1": [0, 1, 2]}
    assert sizes(by_query_length([queries[0], *queries[4:5] * 3])) == {"1–4": [0], "5": [1, 2, 3]}


def test_groups_by_number_of_positives() -> None:
    counts = [1, 2, 3, 5, 6, 10, 11, 500]
    queries = [judged("q", set(map(str, range(count))), []) for count in counts]
    assert sizes(by_positive_count(queries)) == {"1": [0], "2": [1], "3–5": [2, 3], "6–10": [4, 5], "> 10": [6, 7]}


def test_groups_by_overlap_with_the_nearest_title() -> None:
    titles = {"x", "one two"}, {"x"}, {"ONE, two three four!"}, {"one"}
    queries = [judged("one two three four", each, []) for each in titles]
    assert [overlap(each) for each in queries] == [0.5, 0, 1, 0.25]
    assert sizes(by_overlap(queries)) == {"0 %": [1], "25–49 %": [3], "50–74 %": [0], "100 %": [2]}
    assert overlap(judged("!?", {"x"}, [])) == 0


def test_the_curve_is_recall_at_each_k() -> None:
    queries = [judged("q", {"a", "b"}, ["x", "a", "y", "b"]), judged("p", {"a"}, ["a"]), judged("o", {"a"}, [])]
    judgement = Judgement(queries, [], 10)
    cutoffs = curve_cutoffs([judgement])
    assert cutoffs.tolist() == [1, 2, 3, 4]
    expected = [[recall_at_k(each.documents, each.titles, k) for k in cutoffs] for each in queries]
    assert recall_curve(judgement, cutoffs).tolist() == expected
    many = Judgement([judged("q", {"0"}, list(map(str, range(1000))))], [], 1000)
    assert curve_cutoffs([judgement, many])[[0, -1]].tolist() == [1, 1000] and len(curve_cutoffs([many])) <= 50
    assert curve_cutoffs([Judgement(queries[2:], [], 10)]).tolist() == [1]


def test_the_worst_come_first_and_right_first_hits_not_at_all() -> None:
    queries = [judged("a", {"x"}, documents) for documents in (["x"], ["y", "x"], ["y"], [], ["y", "z", "x"])]
    assert worst_first(queries, [1.0, 0.6, 0.0, 0.0, 0.5]) == [2, 3, 4, 1]


def test_hits_that_say_the_same_as_a_title_are_suspected() -> None:
    title = "a survey of rice yield in china"
    same, other = "A Survey of Rice Yield, in China: 2", "wheat"
    found = suspected_false_negatives([judged("q", {title, "x"}, [title, other, same]), judged("p", {title}, [other])])
    assert [(each.row, each.rank, each.document, each.title) for each in found] == [(0, 3, same, title)]
    assert found[0].similarity == pytest.approx(7 / 8)
    far = [*map(str, range(10)), same]  # not among the first ten
    assert suspected_false_negatives([judged("q", {title}, far)]) == []


def test_right_and_wrong_scores_are_kept_apart() -> None:
    queries = [judged("q", {"a", "b"}, ["a", "x", "b"], [0.9, 0.5, 0.4]), judged("p", {"a"}, ["y"], [0.1])]
    found = score_distributions(queries)
    assert (found.right_median, found.wrong_median) == (pytest.approx(0.65), pytest.approx(0.3))
    assert found.edges[[0, -1]].tolist() == pytest.approx([0.1, 0.9])
    assert (found.right.sum(), found.wrong.sum(), len(found.right)) == (1, 1, HISTOGRAM_BINS)
    assert (found.right[-1], found.wrong[0]) == (0.5, 0.5)
    for without in (
        [judged("q", {"a"}, ["a"], [1.0])],
        [judged("q", {"a"}, ["b"], [1.0])],
        [judged("q", {"a"}, ["a"])],
    ):
        assert score_distributions(without) is None


def test_the_rows_that_changed_most() -> None:
    values, others = np.array([0.5, 0.1, 0.9, 0.3, 0.3]), np.array([0.5, 0.4, 0.1, 0.2, 0.4])
    assert changed_most(values, others, 10) == ([2, 3], [1, 4])
    assert changed_most(values, others, 1) == ([2], [1])
