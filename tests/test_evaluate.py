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
