import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import bench_finetune, quality
from common.errors import InputError
from helpers import write_pairs

QUERIES = [f"query {number}" for number in range(10)]
FOUND = {  # of 10 titles, by what trained the model and its seed
    "sentence_transformers_train.py": (4, 6),
    "--no_false_negative_mask": (5, 6),
    "--grad_cache_chunk": (7, 10),
    "train_batch_neg.py": (8, 9),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """test.csv with the query n and the title n; the commands of this test read no other file."""
    write_pairs(tmp_path / "data" / "test.csv", [(query, f"title {query}") for query in QUERIES])
    return tmp_path / "data"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Replaces trainers and recall.py; the list of their commands. Every model finds as many titles as FOUND says."""
    commands: list[list[str]] = []
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "found").write_text("3")

    def run_checked(command: Sequence[str | Path]) -> None:
        words = list(map(str, command))
        commands.append(words)
        if any(word.endswith("recall.py") for word in words):
            found = int(Path(words[words.index("--params_path") + 1], "found").read_text())
            hits = [(query, f"title {query}" if row < found else "other", "0.5") for row, query in enumerate(QUERIES)]
            write_pairs(Path(words[words.index("--recall_result_dir") + 1], "recall_result.txt"), hits)
            return
        seed = int(words[words.index("--seed") + 1])
        found = next(counts[seed] for name, counts in FOUND.items() if any(word.endswith(name) for word in words))
        if "--save" in words:
            model = Path(words[words.index("--save") + 1])
        else:
            model = Path(words[words.index("--save_dir") + 1], f"model_{words[words.index('--max_steps') + 1]}")
        model.mkdir(parents=True)
        (model / "found").write_text(str(found))

    monkeypatch.setattr(bench_finetune, "run_checked", run_checked)
    monkeypatch.setattr(quality, "run_checked", run_checked)
    monkeypatch.setattr(bench_finetune, "check_benchmarks_python", lambda: None)
    return commands


def test_the_means_over_the_seeds(
    data: Path, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tmp_path / "start"), "--data", str(data), "--output", str(tmp_path / "results")]
    assert bench_finetune.main([*options, "--seeds", "2", "--steps", "7"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["recall@10_of_seeds"] == {
        "untuned": [30.0],
        "sentence-transformers": [40.0, 60.0],
        "ours, the same loss": [50.0, 60.0],
        "ours, margin and mask": [80.0, 90.0],
        "ours, gradient cache": [70.0, 100.0],
    }
    assert result["means"]["ours, margin and mask"]["recall@1"] == 85.0
    assert result["recall@10_same_loss_minus_peer"] == 5.0
    assert result["recall@10_defaults_minus_peer"] == result["recall@10_cache_minus_peer"] == 35.0
    trainings = [words for words in commands if not any(word.endswith("recall.py") for word in words)]
    assert len(trainings) == 2 * 4
    for name in ("--train_set_file", "--learning_rate", "--max_seq_length"):
        assert len({words[words.index(name) + 1] for words in trainings}) == 1
    sizes = [words[words.index("--batch_size") + 1] for words in trainings]
    assert sizes == 2 * ["64", "64", "64", "256"]
    cached = [words[words.index("--grad_cache_chunk") + 1] for words in trainings if "--grad_cache_chunk" in words]
    assert cached == ["64", "64"]
    commands.clear()
    assert bench_finetune.main([*options, "--seeds", "2", "--steps", "7"]) == 0
    assert commands == []
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["means"] == result["means"]
    assert bench_finetune.main([*options[:-1], str(tmp_path / "quick"), "--quick"]) == 0
    assert [words[words.index("--seed") + 1] for words in commands if "--seed" in words] == ["0"] * 4
    with pytest.raises(InputError, match="is of another task; give another --output"):
        bench_finetune.main([*options, "--seeds", "2", "--steps", "8"])


def test_the_model_of_the_package_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"{bench_finetune.PACKAGE}.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert bench_finetune.default_model() == str(tmp_path / "model")
    monkeypatch.setattr(bench_finetune, "PACKAGE", "no_such_package")
    assert bench_finetune.default_model() is None
