"""The rules of mining, each against a slow, obvious twin."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from common.errors import InputError
from common.texts import text_ids, text_key
from data import TextPair
from mining.hard_negatives import (
    EARLY_RANK,
    NEAR_DUPLICATE,
    OWN_TEXT,
    POSITIVE,
    TOO_SIMILAR,
    UNSCORED,
    KnownPositives,
    MiningRules,
    PairHits,
    QueryPositives,
    choose_negatives,
    score_limits,
)
from retrieval.near_duplicates import jaccard, terms_of

WORDS = ["apple", "Apple", "pear", "plum", "fig", "ｆｉｇ", "a-b", "a - b", "水稻", "水 稻"]


def random_texts(rng: random.Random, count: int) -> list[str]:
    """Short texts of few words, of which many are the same, nearly the same, or have the same key."""
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 6))) for _ in range(count)]


def known(pairs: list[TextPair], symmetric: bool, lowercase: bool = True) -> KnownPositives:
    ids = text_ids([text for pair in pairs for text in pair[:2]], lowercase)
    return KnownPositives(pairs, ids[::2], ids[1::2], symmetric, lowercase)


# ---------------------------------------------------------------------------------------------------------------------
# What isn't taken


@pytest.mark.parametrize("symmetric", [True, False])
def test_known_positives_are_those_of_all_pairs_of_the_query(symmetric: bool) -> None:
    rng = random.Random(1)
    pairs = [TextPair(*texts) for texts in zip(random_texts(rng, 60), random_texts(rng, 60), strict=True)]
    positives = known(pairs, symmetric)
    for row, pair in enumerate(pairs):
        key = text_key(pair.query)
        expected = {text_key(other.title) for other in pairs if text_key(other.query) == key} - {key}
        if symmetric:
            expected |= {text_key(other.query) for other in pairs if text_key(other.title) == key} - {key}
        for text in {text for each in pairs for text in each[:2]}:
            reason = positives.of(row).reason(text, 0.0, 1.0)
            assert (reason == POSITIVE) == (text_key(text) in expected)
            assert (reason == OWN_TEXT) == (text_key(text) == key)


@pytest.mark.parametrize(
    ("document", "score", "limit", "expected"),
    [
        ("水稻的产量", 0.9, 0.5, OWN_TEXT),
        ("论水稻产量，研究", 0.9, 0.5, TOO_SIMILAR),
        ("论水稻产量,研究", 0.9, 0.5, POSITIVE),
        ("论水稻产量研究", 0.5, 0.5, NEAR_DUPLICATE),
        ("水稻的产量。", 0.1, 0.5, NEAR_DUPLICATE),
        ("论玉米品质研究", 0.5, 0.5, None),
        ("论玉米品质研究", 0.51, 0.5, TOO_SIMILAR),
        ("论玉米品质研究", math.nan, 0.5, UNSCORED),
        ("论玉米品质研究", 0.1, math.nan, UNSCORED),
    ],
)
def test_reasons(document: str, score: float, limit: float, expected: str | None) -> None:
    assert QueryPositives("水稻的产量", ["论水稻产量,研究"]).reason(document, score, limit) == expected


def test_case_counts_if_the_model_tells_it_apart() -> None:
    assert QueryPositives("fig", ["Apple"]).reason("apple", 0.1, 0.5) == POSITIVE
    assert QueryPositives("fig", ["Apple"], lowercase=False).reason("apple", 0.1, 0.5) == NEAR_DUPLICATE


def test_a_limit_is_never_above_the_score_of_the_positive() -> None:
    scores = np.array([0.8, 0.0, -0.4], np.float32)
    np.testing.assert_allclose(score_limits(scores, 0.95), [0.76, 0, -0.42], rtol=1e-6)
    np.testing.assert_array_equal(score_limits(scores, 1.0), scores)


# ---------------------------------------------------------------------------------------------------------------------
# What is taken


def wanted_reason(query: str, titles: list[str], document: str, score: float, limit: float) -> str | None:
    """The rules once more, without shortcuts."""
    texts = [query, *titles]
    checks = {
        OWN_TEXT: text_key(document) == text_key(query),
        POSITIVE: text_key(document) in map(text_key, titles),
        UNSCORED: math.isnan(score),
        TOO_SIMILAR: score > limit,
        NEAR_DUPLICATE: any(jaccard(terms_of(document), terms_of(text)) >= 0.8 for text in texts),
    }
    return next((reason for reason, holds in checks.items() if holds), None)


@pytest.mark.parametrize("seed", range(40))
def test_the_first_hits_that_no_rule_leaves_out(seed: int) -> None:
    rng = random.Random(seed)
    documents, titles, query = random_texts(rng, 30), random_texts(rng, rng.randrange(1, 4)), random_texts(rng, 1)[0]
    ids = rng.sample(range(30), 20)
    scores = [rng.choice([math.nan, rng.random()]) if seed % 2 else rng.random() for _ in ids]
    limit = rng.random()
    rules = MiningRules(negatives=rng.randrange(1, 5), from_rank=rng.randrange(1, 6))
    left_out: Counter[str] = Counter()
    positives = QueryPositives(query, titles)
    places = choose_negatives(PairHits(ids, scores, limit), documents, positives, rules, 0, left_out)
    found = [documents[ids[place]] for place in places]

    expected: list[str] = []
    reasons: Counter[str] = Counter()
    for rank, (document_id, score) in enumerate(zip(ids, scores, strict=True), 1):
        if len(expected) == rules.negatives:
            break
        document = documents[document_id]
        reason = EARLY_RANK if rank < rules.from_rank else wanted_reason(query, titles, document, score, limit)
        if reason:
            reasons[reason] += 1
        else:
            expected.append(document)
    assert found == expected
    assert +left_out == reasons


def draw(rules: MiningRules, row: int, hits: int = 20) -> list[int]:
    """The places of the negatives among hits of which every third is too similar."""
    documents = [f"{chr(0x4E00 + 50 * number)}{chr(0x6000 + 50 * number)}" for number in range(hits)]
    scores = [1.0 if place % 3 == 0 else 0.1 for place in range(hits)]
    positives = QueryPositives("水稻", ["玉米"])
    return choose_negatives(PairHits(range(hits), scores, 0.5), documents, positives, rules, row, Counter())


def test_a_share_is_drawn_from_all_ranks() -> None:
    rules = MiningRules(negatives=4, from_rank=4, random_share=0.5, seed=7)
    allowed = {place for place in range(3, 20) if place % 3}
    drawn = Counter()
    for row in range(300):
        places = draw(rules, row)
        assert places[:2] == [4, 5] and len(set(places)) == 4 and set(places) <= allowed
        assert places == draw(rules, row)
        drawn.update(places[2:])
    assert drawn.keys() == allowed - {4, 5}
    assert max(drawn.values()) < 2 * min(drawn.values())  # 67 of each are expected, with a deviation of 8
    assert [draw(rules, row) for row in range(9)] != [draw(rules._replace(seed=8), row) for row in range(9)]


def test_a_share_of_one_negative_is_a_share_of_the_pairs() -> None:
    rules = MiningRules(random_share=0.5)
    first = sum(draw(rules, row) == [1] for row in range(400))
    assert 170 < first < 290  # 200, and one in 13 of the others
    assert all(draw(rules._replace(random_share=1.0, negatives=2), row) != [] for row in range(20))


def test_a_pair_keeps_what_it_has_if_the_hits_are_used_up() -> None:
    for share in (0.0, 0.5, 1.0):
        assert sorted(draw(MiningRules(negatives=20, random_share=share), 0, hits=8)) == [1, 2, 4, 5, 7]
        assert draw(MiningRules(negatives=2, from_rank=9, random_share=share), 0, hits=8) == []


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (MiningRules(negatives=7, from_rank=10, to_rank=15), "--negatives 7: --from_rank 10 to --to_rank 15 has fewer"),
        (MiningRules(random_share=1.5), "--random_share 1.5: is a share; give 0 to 1"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules: MiningRules, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rules.check()
    MiningRules(negatives=6, from_rank=10, to_rank=15, random_share=1.0).check()
