"""The rules about texts beside each other: a file that breaks each, and clean files that break none."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from data import VOCABULARY_FILE, TextTokenizer
from data_check.check import DataCheck, check_data
from data_check.files import read_corpus_file, read_pair_file
from data_check.model_tokenizer import load_model_tokenizer
from data_check.rules import Finding
from helpers import write_pairs
from retrieval.near_duplicates import jaccard, terms_of

# Two pairs of texts that have little in common.
TRAIN = [("水稻产量的影响因素", "氮肥用量与栽培密度试验"), ("图书馆管理对策", "高校读者服务工作探析")]
DEV = [("糖尿病检测方法", "空腹血糖仪的准确性比较")]
TEST = [("钢材疲劳模型", "循环载荷下裂纹扩展的数值模拟")]
CORPUS = [(title,) for _, title in [*TRAIN, *DEV, *TEST]] + [("桥梁隧道健康监测综述",)]
LONG = "在长期定位试验中不同施肥处理对土壤有机碳组分及其分布特征的影响研究"
NEAR = "在长期定位试验中不同施肥处理对土壤有机碳组分及分布特征的影响研究。"


def check(folder: Path, **changed: list[tuple[str, ...]]) -> DataCheck:
    """Checks files, of which some have changed."""
    rows = {"train": TRAIN, "dev": DEV, "test": TEST, "corpus": CORPUS, **changed}
    paths = {name: str(write_pairs(folder / f"{name}.csv", pairs)) for name, pairs in rows.items()}
    evaluated = [read_pair_file(paths[name]) for name in ("dev", "test")]
    return check_data(read_pair_file(paths["train"]), evaluated, read_corpus_file(paths["corpus"]))


def found(folder: Path, rule: str, **changed: list[tuple[str, ...]]) -> list[Finding]:
    """What of a rule is found in files of which some have changed; it must be broken."""
    findings = [finding for finding in check(folder, **changed).findings if finding.rule.name == rule and finding.count]
    assert all(finding.is_broken for finding in findings)
    return findings


def test_clean_files_break_no_rule(tmp_path: Path) -> None:
    clean = check(tmp_path)
    assert [finding for finding in clean.findings if finding.count] == []
    assert {finding.rule.name for finding in clean.findings} == {
        *("unreadable", "form", "encoding", "columns", "separator", "damaged", "invisible", "html"),
        *("repeated_pairs", "own_titles", "many_titles", "many_queries", "repeated_documents", "near_duplicates"),
        *("leaked", "nearly_leaked", "shared_titles", "not_in_corpus"),
    }
    assert clean.distinct[f"{tmp_path / 'train.csv'}, titles"] == 2
    assert clean.broken == clean.batches == clean.lengths == []


def test_repeated_pairs(tmp_path: Path) -> None:
    query, title = TRAIN[0]
    (finding,) = found(tmp_path, "repeated_pairs", train=[*TRAIN, (query + " ", title), (query, TRAIN[1][1])])
    assert (finding.count, finding.total) == (1, 4)
    assert finding.examples == [f"{tmp_path / 'train.csv'}:3: '{query}' → '{title}'"]


def test_queries_that_are_their_own_titles(tmp_path: Path) -> None:
    (finding,) = found(tmp_path, "own_titles", train=[*TRAIN, ("Rice Yield", "rice  yield")])
    assert (finding.count, finding.total) == (1, 3)


@pytest.mark.parametrize(("rule", "order"), [("many_titles", 1), ("many_queries", -1)])
def test_a_text_with_many_others(tmp_path: Path, rule: str, order: int) -> None:
    def rows(count: int) -> list[tuple[str, ...]]:
        return [*TRAIN, *(("何物", f"第{number}条全然不同之事")[::order] for number in range(count))]

    assert found(tmp_path, rule, train=[*rows(10), *rows(10)]) == []
    (finding,) = found(tmp_path, rule, train=rows(11))
    assert (finding.count, finding.total) == (11, 13)
    assert finding.examples == [f"11: {tmp_path / 'train.csv'}:3: '何物'"]


def test_repeated_documents_and_near_duplicates(tmp_path: Path) -> None:
    rows = [*CORPUS, (CORPUS[0][0],), (LONG,), (NEAR,)]
    (repeated,) = found(tmp_path, "repeated_documents", corpus=rows)
    assert (repeated.count, repeated.total) == (1, 8)
    assert repeated.examples == [f"{tmp_path / 'corpus.csv'}:6: '{CORPUS[0][0]}'"]
    (near,) = found(tmp_path, "near_duplicates", corpus=rows)
    assert (near.count, near.total) == (1, 7)
    assert near.examples == [f"{tmp_path / 'corpus.csv'}:8: '{NEAR}' ≈ {tmp_path / 'corpus.csv'}:7: '{LONG}'"]


def test_queries_and_titles_that_leaked(tmp_path: Path) -> None:
    rows = [
        *TRAIN,
        (DEV[0][0] + "！", "无关标题"),
        (f"{TEST[0][0]}\u200b", "另一标题"),
        ("又一问题", TEST[0][1]),
        (LONG, "标题"),
    ]
    changed = {"train": rows, "dev": [*DEV, (NEAR, DEV[0][1])]}
    (leaked,) = found(tmp_path, "leaked", **changed)
    assert (leaked.count, leaked.total) == (1, 1)
    train_csv = tmp_path / "train.csv"
    assert leaked.examples == [f"{tmp_path / 'test.csv'}:1: '{TEST[0][0]}' = {train_csv}:4: '{TEST[0][0]}\\u200b'"]
    (near,) = found(tmp_path, "nearly_leaked", **changed)
    assert (near.count, near.total) == (2, 2)  # one but for a mark, and one that is nearly the same
    assert near.examples[1] == f"{tmp_path / 'dev.csv'}:2: '{NEAR}' ≈ {train_csv}:6: '{LONG}'"
    (shared,) = found(tmp_path, "shared_titles", **changed)
    assert (shared.count, shared.where) == (1, f"{tmp_path / 'test.csv'}, titles")


def test_a_training_query_is_a_leak_of_a_title_s_column_too(tmp_path: Path) -> None:
    (leaked,) = found(tmp_path, "leaked", train=[*TRAIN, ("反过来", DEV[0][0])])
    assert leaked.examples[0].endswith(f"{tmp_path / 'train.csv'}:3: '{DEV[0][0]}'")


def test_titles_that_the_corpus_lacks(tmp_path: Path) -> None:
    similarity = jaccard(terms_of(NEAR), terms_of(LONG))
    rows = {"dev": [("无", "ABC"), *DEV], "test": [*TEST, ("施肥", NEAR)], "corpus": [*CORPUS, (LONG,)]}
    of_dev, of_test = found(tmp_path, "not_in_corpus", **rows)
    assert [(finding.count, finding.total) for finding in (of_dev, of_test)] == [(1, 2), (1, 2)]
    assert of_dev.examples == [f"{tmp_path / 'dev.csv'}:1: 'ABC'"]
    assert of_test.examples == [
        f"{tmp_path / 'test.csv'}:2: '{NEAR}' ≈ {similarity:.2f} {tmp_path / 'corpus.csv'}:6: '{LONG}'"
    ]


def test_hard_negatives_that_are_titles(tmp_path: Path) -> None:
    query = TRAIN[0][0]
    rows = [(*TRAIN[0], TRAIN[1][1]), (*TRAIN[1], LONG), (query, LONG, NEAR), (query, "第三标题", TRAIN[0][1])]
    (finding,) = found(tmp_path, "false_hard_negatives", train=rows)
    assert (finding.count, finding.total) == (2, 4)
    assert [example.partition(": ")[0] for example in finding.examples] == [
        f"{tmp_path / 'train.csv'}:{n}" for n in (3, 4)
    ]


def test_false_negatives_of_batches(tmp_path: Path) -> None:
    rows = [(f"问题{number}", ("同一标题", LONG, NEAR)[number % 3]) for number in range(64)]
    (batch,) = check(tmp_path, train=rows).batches
    assert batch.without_mask == 22 * 21 + 42 * 41  # of each third of the titles; the last two are near-duplicates
    assert batch.with_mask == 2 * 21 * 21


def test_any_of_the_files_is_enough(tmp_path: Path) -> None:
    corpus = read_corpus_file(str(write_pairs(tmp_path / "corpus.csv", CORPUS)))
    assert check_data(None, [], corpus).broken == []
    test = read_pair_file(str(write_pairs(tmp_path / "test.csv", TEST)))
    assert check_data(None, [test], None).broken == []
    empty = read_pair_file(str(write_pairs(tmp_path / "train.csv", [("bad",)])))
    assert [finding.rule.name for finding in check_data(empty, [], None).broken] == ["form", "columns"]


def test_tokens_that_a_model_does_not_see(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_model_tokenizer(str(model_folder), 8)
    counted: list[str] = []

    def count(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        counted.extend(texts)
        return TextTokenizer.count(tokenizer, texts)

    monkeypatch.setattr(tokenizer, "count", count)
    file = read_pair_file(str(write_pairs(tmp_path / "train.csv", [("水稻产量", "水稻" * 20), ("gene", "水稻")])))
    result = check_data(file, [], None, tokenizer)
    cut = {finding.where: finding for finding in result.findings if finding.rule.name == "cut" and finding.count}
    (finding,) = cut.values()
    assert (finding.count, finding.total) == (1, 2)
    assert finding.examples[0].startswith(f"42: {tmp_path / 'train.csv'}:1: '水稻")
    (unknown,) = [finding for finding in result.findings if finding.rule.name == "unknown" and finding.count]
    assert (unknown.count, unknown.total) == (1, 5)
    assert unknown.examples == [f"1: {tmp_path / 'train.csv'}:2: 'gene'"]
    assert [(advice.given, advice.suggested) for advice in result.lengths] == [(8, 6), (8, 42)]
    assert counted == ["水稻产量", "gene", "水稻" * 20, "水稻"]  # each once, as it takes the longest


def test_lengths_fit_into_the_position_table(checkpoint: Path, model_folder: Path) -> None:
    for path in (checkpoint, model_folder):
        message = f"^--max_seq_length 41: the position table of {path} has 40 rows; use at most that many tokens$"
        with pytest.raises(InputError, match=message):
            load_model_tokenizer(str(path), 41)
        assert load_model_tokenizer(str(path), 40).max_seq_length == 40
    assert load_model_tokenizer(str(model_folder)).max_seq_length == 40


def test_a_folder_without_a_config_has_no_position_table(tmp_path: Path, model_folder: Path) -> None:
    """As the original scripts write it."""
    shutil.copy(model_folder / VOCABULARY_FILE, tmp_path)
    assert load_model_tokenizer(str(tmp_path), 600).max_seq_length == 600
