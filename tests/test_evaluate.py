"""The command that prints the metrics."""

from collections.abc import Callable
from pathlib import Path

import pytest

import evaluate
from common.cli import run
from data import Hit, write_hits
from helpers import ROOT

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls the script with options; gives its exit code, stdout and stderr."""

    def call(*options: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(lambda: evaluate.main([str(option) for option in options]))
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two queries, the first with two titles; the result answers the first and a third query."""
    pairs, result = tmp_path / "dev.csv", tmp_path / "result" / "recall_result.txt"
    pairs.write_text("查询一\t标题甲\n查询二\t标题丙\n查询一\t标题乙\n", encoding="utf-8")
    write_hits(result, [Hit("查询一", "标题乙", 0.9), Hit("查询一", "标题丁", 0.8), Hit("查询三", "标题甲", 0.7)])
    return pairs, result


@pytest.mark.parametrize("option", ["--similar_text_pair", "--similar_text_pair_file"])
def test_prints_the_metrics_and_reports_queries_of_one_file_alone(
    command: Command, option: str, files: tuple[Path, Path]
) -> None:
    pairs, result = files
    code, out, err = command(option, pairs, "--recall_result_file", result, "--recall_num", 5)
    assert (code, out) == (0, "recall@1=25.0\nrecall@5=25.0\nmrr@5=50.0\nndcg@5=30.657\n")
    shorter, without_results, unknown = err.splitlines()
    assert shorter == f"--recall_num 5: {result} has no more than 2 documents per query"
    assert "1 of 2 queries have no result" in without_results and "查询二" in without_results
    assert "left out 1 queries" in unknown and "查询三" in unknown


def test_skips_bad_lines_of_the_pairs_if_told_to(command: Command, files: tuple[Path, Path]) -> None:
    pairs, result = files
    with open(pairs, "a", encoding="utf-8") as file:
        file.write("没有标题\n")
    options = ("--similar_text_pair", pairs, "--recall_result_file", result)
    code, out, err = command(*options)
    assert (code, out) == (2, "")
    assert f"{pairs}:4" in err
    code, out, _ = command(*options, "--skip_bad_lines")
    assert code == 0
    assert out.startswith("recall@1=25.0\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recall_num": 0}, "0 is out of range"),
        ({"--recall_num": "ten"}, "'ten'"),
        ({"--similar_text_pair": "missing.csv"}, "missing.csv: no such file"),
        ({"--recall_result_file": "missing.txt"}, "missing.txt: no such file"),
        ({"--recall_result_file": "tests"}, "is a folder"),
    ],
)
def test_refuses_bad_input_in_one_line(
    command: Command, change: dict[str, object], message: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = {"--similar_text_pair": files[0], "--recall_result_file": files[1]} | change
    code, out, err = command(*(part for option in options.items() for part in option))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_needs_both_files(command: Command, files: tuple[Path, Path]) -> None:
    for options in (("--similar_text_pair", files[0]), ("--recall_result_file", files[1])):
        code, out, err = command(*options)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "required" in err


def test_a_report_with_bm25_and_another_result(command: Command, files: tuple[Path, Path], tmp_path: Path) -> None:
    pairs, result = files
    other, report, corpus = (tmp_path / name for name in ("other.txt", "report.html", "corpus.csv"))
    write_hits(other, [Hit("查询一", "标题甲", 0.9), Hit("查询二", "标题丙", 0.7)])
    corpus.write_text("标题甲\n标题乙\n标题丙\n标题丁\n", encoding="utf-8")
    options = ("--similar_text_pair", pairs, "--recall_result_file", result, "--recall_num", 1)
    code, out, _ = command(*options, "--compare", other, "--corpus_file", corpus, "--report", report)
    assert (code, out.splitlines()[0]) == (0, "recall@1=25.0 other=75.0 difference=-50.000 p=1.0000")
    content = report.read_text()
    assert "Beside other.txt" in content and "BM25</th>" not in content and "Beside BM25" in content
    assert "evaluate.py --corpus_file" not in content


def test_runs_and_qrels_are_written_and_read(command: Command, files: tuple[Path, Path], tmp_path: Path) -> None:
    pairs, result = files
    folder = tmp_path / "trec"
    code, out, _ = command("--similar_text_pair", pairs, "--recall_result_file", result, "--write_trec", folder)
    assert {file.name for file in folder.iterdir()} == {
        *("corpus.jsonl", "qrels.trec", "qrels.tsv", "queries.jsonl", "run.trec")
    }
    ids = ("--queries_file", folder / "queries.jsonl", "--corpus_file", folder / "corpus.jsonl")
    for qrels in ("qrels.trec", "qrels.tsv"):
        again = command("--qrels", folder / qrels, "--trec_run", folder / "run.trec", *ids)
        assert again[:2] == (code, out)
    mixed = command("--similar_text_pair", pairs, "--trec_run", folder / "run.trec", *ids)
    assert mixed[:2] == (code, out)
    mixed = command("--qrels", folder / "qrels.trec", "--recall_result_file", result, *ids)
    assert mixed[:2] == (code, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--corpus_file", "c"), "--corpus_file: does nothing without --report or --write_trec"),
        (("--queries_file", "q"), "--queries_file: does nothing without --qrels or --trec_run"),
        (("--report", "/proc/none/report.html"), "/proc/none: can't be written"),
    ],
)
def test_options_that_need_others(
    command: Command, files: tuple[Path, Path], options: tuple[str, ...], message: str
) -> None:
    pairs, result = files
    code, out, err = command("--similar_text_pair", pairs, "--recall_result_file", result, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_ids_need_texts(command: Command, files: tuple[Path, Path]) -> None:
    code, _, err = command("--qrels", "q", "--recall_result_file", files[1])
    assert (code, err) == (2, "error: --qrels: has ids alone; give their texts with --queries_file\n")
    code, _, err = command("--similar_text_pair", files[0], "--trec_run", "r", "--queries_file", "q")
    assert (code, err) == (2, "error: --trec_run: has ids alone; give their texts with --corpus_file\n")
    code, _, err = command("--similar_text_pair", files[0], "--qrels", "q", "--recall_result_file", files[1])
    assert code == 2 and "not allowed with" in err
