"""The stages of each method with stand-ins for the trainings, and one method with the real scripts."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_recipe, quality
from common.errors import InputError
from helpers import all_pairs, write_pairs


@pytest.fixture
def data(recall_data: Path, tmp_path: Path) -> Path:
    """A folder with train.csv, test.csv and corpus.csv."""
    folder = tmp_path / "data"
    write_pairs(folder / "test.csv", all_pairs()[128:])
    for name in ("train.csv", "corpus.csv"):
        (folder / name).write_bytes((recall_data / name).read_bytes())
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the scripts; the list of their commands. recall.py finds the first ten titles."""
    commands: list[list[str]] = []

    def run_checked(command: Sequence[str | Path]) -> None:
        words = list(map(str, command))[1:]
        commands.append([Path(words[0]).name, *words[1:]])
        if "--recall_result_dir" in words:
            queries = enumerate(all_pairs()[128:])
            hits = [(query, title if row < 10 else "other", "0.5") for row, (query, title) in queries]
            write_pairs(Path(value(words, "--recall_result_dir"), "recall_result.txt"), hits)
        elif "--save_dir" in words:
            Path(value(words, "--save_dir"), f"model_{value(words, '--max_steps')}").mkdir()
        else:
            Path(value(words, "--output")).write_bytes(Path(value(words, "--train_set_file")).read_bytes())

    for module in (bench_recipe, quality):
        monkeypatch.setattr(module, "run_checked", run_checked)
    return commands


def value(words: list[str], option: str) -> str:
    """The last one wins, as in argparse."""
    return words[len(words) - words[::-1].index(option)]


def options(data: Path, output: Path, *others: str) -> list[str]:
    start = ["--from_scratch", "ernie", "--pooling", "mean"]
    return ["--data", str(data), "--output", str(output), "--steps", "6", "--batch_size", "8", *start, *others]


def test_the_stages_of_each_method(
    data: Path, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_recipe.main(options(data, tmp_path / "results", "--seeds", "1", "--pieces_batch_size", "32")) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recall@10_of_seeds"] == {method: [25.0] for method in bench_recipe.RECIPES}  # 10 of 40 queries
    trainings = [words for words in commands if "--save_dir" in words]
    shared = [(Path(value(words, "--save_dir")).name, value(words, "--max_steps")) for words in trainings]
    plain, pieces, simcse, halves = [("pairs", "6")], [("pieces", "3")], [("simcse", "3")], [("pairs", "3")]
    words, whole = [("words", "6")], [("pieces", "2"), ("words", "2"), ("mined", "2")]
    assert shared == [*plain, *pieces, *halves, *simcse, *halves, *halves, ("mined", "3"), *words, *whole]
    starts = ["--init_from_ckpt" in words for words in trainings]
    assert starts == [False, False, True, False, True, False, True, False, False, True, True]
    for before, words in itertools.pairwise(trainings):
        if "--init_from_ckpt" in words:
            checkpoint = Path(value(before, "--save_dir"), f"model_{value(before, '--max_steps')}")
            assert value(words, "--init_from_ckpt") == str(checkpoint)
    assert {value(words, "--from_scratch") for words in trainings} == {"ernie"}
    sizes = [value(words, "--batch_size") for words in trainings]
    assert [size for size, (kind, _) in zip(sizes, shared, strict=True) if kind == "pieces"] == ["32", "32"]
    assert set(sizes) == {"8", "32"}
    mined = [words for words in commands if words[0] == "mine_hard_negatives.py"]
    assert ["--lexical" in words for words in mined] == [False, True, True, False]
    assert not any((tmp_path / "results" / "unfinished").iterdir())


def test_what_is_done_is_kept(data: Path, commands: list[list[str]], tmp_path: Path) -> None:
    given = options(data, tmp_path / "results", "--methods", "plain", "pre-training", "--seeds", "2")
    assert bench_recipe.main(given) == 0
    assert [value(words, "--seed") for words in commands if "--seed" in words] == ["0", "0", "0", "1", "1", "1"]
    commands.clear()
    assert bench_recipe.main(given) == 0
    assert commands == []
    with pytest.raises(InputError, match="is of another task; give another --output"):
        bench_recipe.main([*given, "--steps", "7"])


def test_an_interrupted_run_repeats_no_stage(
    data: Path, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(data, tmp_path / "results", "--methods", "hard negatives", "--seeds", "1")
    stand_in = bench_recipe.run_checked

    def interrupt(command: Sequence[str | Path]) -> None:
        if "mine_hard_negatives.py" in str(command[1]):
            raise KeyboardInterrupt
        stand_in(command)

    with monkeypatch.context() as patch:
        patch.setattr(bench_recipe, "run_checked", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bench_recipe.main(given)
    assert [words[0] for words in commands] == ["train_batch_neg.py"]
    commands.clear()
    assert bench_recipe.main(given) == 0
    assert [words[0] for words in commands] == ["mine_hard_negatives.py", "train_batch_neg.py", "recall.py"]


def test_a_sample_has_each_line_once(tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "train.csv", all_pairs())
    lines = file.read_text(encoding="utf-8").splitlines()
    for count, seed in ((10, 1), (10, 2), (1000, 1)):
        bench_recipe.write_sample(file, count, seed, tmp_path / f"{count}_{seed}")
    ten, others, whole = (
        (tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("10_1", "10_2", "1000_1")
    )
    assert len(set(ten)) == 10 and set(ten) < set(lines) and ten != others
    assert whole != lines and sorted(whole) == sorted(lines)
    (tmp_path / "odd").write_text(
        "甲\u2028乙\t丙\n丁\t戊", encoding="utf-8"
    )  # one line ends nowhere, one in the middle
    bench_recipe.write_sample(tmp_path / "odd", 2, 1, tmp_path / "odd_2")
    assert sorted((tmp_path / "odd_2").read_text(encoding="utf-8").split("\n")) == ["", "丁\t戊", "甲\u2028乙\t丙"]


@pytest.mark.process
def test_the_scripts_take_the_commands(
    data: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--from_scratch", str(model_folder), "--pooling", "mean", "--device", "cpu"]
    sizes = ["--steps", "3", "--seeds", "1", "--batch_size", "16", "--pieces_batch_size", "32", "--word_negatives", "2"]
    sizes += ["--max_seq_length", "24"]
    folders = ["--data", str(data), "--output", str(tmp_path / "results")]
    assert bench_recipe.main([*folders, *sizes, "--methods", "all", "SimCSE", *start]) == 0
    means = json.loads(capsys.readouterr().out.splitlines()[-1])["means"]
    assert all(
        0 < means[method]["recall@50"] <= 100 and means[method]["training_s"] > 0 for method in ("all", "SimCSE")
    )
