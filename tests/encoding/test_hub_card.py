"""The model card that hubs show: valid metadata, a command that is the training's, and nothing that isn't known."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

import train_batch_neg
from common.files import read_json, write_json
from encoding.hub_card import base_model, hub_card, training_command
from helpers import evaluation_options, new_model, train_options
from modeling.checkpoint import load_checkpoint, save_checkpoint
from modeling.training_progress import STATE_FILE, read_progress


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Its metadata and its text."""
    start, header, text = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), text


@pytest.fixture(scope="module")
def trained(model_folder: Path, recall_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a training with prefixes and an evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    prefixes = ["--query_prefix", "it's a query: ", "--document_prefix", "论: "]
    evaluation = evaluation_options(recall_data, folder / "result", "--recall_num", "5")
    train_batch_neg.main(train_options(model_folder, recall_data, folder, "--max_steps", "2", *prefixes, *evaluation))
    return folder / "model_2"


def test_the_metrics_are_those_of_the_checkpoints_evaluation(trained: Path) -> None:
    metadata, text = parts(hub_card(load_checkpoint(trained)))
    report = (trained.parent / "result" / "evaluate_result.txt").read_text().splitlines()[-1].split("\t")[1:]
    scores = {name: float(value) for name, value in (each.split("=") for each in report)}
    assert list(scores) == metadata["metrics"] == ["recall@1", "recall@5", "mrr@5", "ndcg@5"]
    (result,) = metadata["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == scores
    digest = read_progress(trained)["evaluator"]["SHA-256 of the evaluation pairs"]
    assert result["dataset"]["name"] == f"evaluation pairs, SHA-256 {digest}"
    assert all(f"| {name} | {value} |\n" in text for name, value in scores.items())
    assert "base_model" not in metadata  # random weights


def test_prefixes_are_shown_and_used(trained: Path, model_folder: Path, tmp_path: Path) -> None:
    text = parts(hub_card(load_checkpoint(trained)))[1]
    assert "- prefix of a query: `\"it's a query: \"`\n- prefix of a document: `'论: '`\n" in text
    assert 'model.encode_query("a query")' in text
    save_checkpoint(tmp_path / "plain", *new_model(model_folder))
    plain = hub_card(load_checkpoint(tmp_path / "plain"))
    assert "prefix" not in plain
    assert 'model.encode(["a query", "a title"])' in plain


def test_a_checkpoint_without_a_training_state_tells_nothing_of_one(
    trained: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tmp_path / "plain", *new_model(model_folder))
    metadata, text = parts(hub_card(load_checkpoint(tmp_path / "plain")))
    assert list(metadata) == ["library_name", "pipeline_tag", "tags"]
    assert text.startswith("\n# plain\n")
    assert "## Training" not in text
    assert capsys.readouterr().err == ""
    (tmp_path / "plain" / STATE_FILE).write_text("{}")
    assert parts(hub_card(load_checkpoint(tmp_path / "plain"))) == (metadata, text)
    assert "the model card tells nothing of the training" in capsys.readouterr().err


def test_only_the_evaluation_of_its_own_step_counts(trained: Path, model_folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other", *new_model(model_folder))
    write_json(tmp_path / "other" / STATE_FILE, {**read_json(trained / STATE_FILE), "step": 3})
    metadata, text = parts(hub_card(load_checkpoint(tmp_path / "other")))
    assert "metrics" not in metadata and "| metric" not in text
    assert "3 steps with in-batch negatives" in text


def described(options: list[str]) -> dict[str, Any]:
    return train_batch_neg.describe_run(vars(train_batch_neg.build_parser().parse_args(options)), 1)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--symmetric_pairs", "--group_by_length", "--label_column", "--grad_cache_chunk", "4"],
        ["--symmetric_pairs", "False", "--use_gradient_cache", "--chunk_numbers", "2", "--max_steps", "3"],
        ["--no_false_negative_mask", "--use_amp", "--amp_dtype", "bfloat16", "--epochs", "2"],
        ["--query_prefix", "it's: ", "--margin", "0", "--no_cross_device_negatives", "--skip_bad_lines"],
    ],
)
@pytest.mark.parametrize("start", ["from_scratch", "init_from_ckpt"])
def test_the_command_is_the_training_s(
    start: str, options: list[str], trained: Path, recall_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It describes the same run; each part has an effect."""
    monkeypatch.chdir(trained.parent)
    data = str(recall_data / "train.csv")
    run_config = described([f"--{start}", trained.name, "--train_set_file", data, *options])
    command = training_command(run_config)
    assert all(len(line) < 120 for line in command.splitlines())
    python, script, *given = shlex.split(command.replace("\\\n", ""))
    assert (python, script) == ("python", "train_batch_neg.py")
    assert "ernie-1.0" not in given
    given[given.index("FILE")] = data
    assert described(given) == {**run_config, "epochs": 10 if "--max_steps" in options else run_config["epochs"]}
    parser = train_batch_neg.build_parser()
    values = vars(parser.parse_args(given))
    chosen = {name: value for name, value in values.items() if value != parser.get_default(name)}
    train_batch_neg.check_options(chosen, "gpu")


def test_the_command_has_no_absolute_paths(trained: Path) -> None:
    run_config = read_progress(trained)["run_config"]
    folder = run_config["from_scratch"]
    assert os.path.isabs(folder)
    command = training_command(run_config)
    assert folder not in command
    assert f"--from_scratch {os.path.basename(folder)}" in command


def test_the_base_model_is_a_name_on_the_hub_that_is_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    other = {"from_scratch": None, "init_from_ckpt": None}
    names = {
        "ernie-1.0": "PaddlePaddle/ernie-1.0-base-zh",
        "rocketqa-zh-base-query-encoder": None,
        "owner/model": "owner/model",
        "owner/model@main": "owner/model",
        "models/ernie": None,  # may have been a folder
        "/home/ernie": None,
    }
    commit = "0" * 40
    cache = tmp_path / "cache" / "models--owner--model"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    for name, expected in names.items():
        assert base_model({"model_name_or_path": name, **other}) == expected, name
        assert base_model({"model_name_or_path": name, **other, "init_from_ckpt": "model_1"}) is None
        assert base_model({"model_name_or_path": name, **other, "from_scratch": "ernie"}) is None
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "ernie-1.0").mkdir()
    for name in ("ernie-1.0", "owner/model"):
        assert base_model({"model_name_or_path": name, **other}) is None
