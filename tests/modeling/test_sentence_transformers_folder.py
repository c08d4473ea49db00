"""Folders in the form of sentence-transformers: their vectors, their settings, and what is refused.

The encoder is data/hugging_face/bert, whose outputs were computed by PyTorch; NumPy does the modules after it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import export_model
import train_batch_neg
from base_model import ModelConfig, SemanticIndexBase
from common.errors import InputError
from encoding.exported_model import load_exported
from helpers import ROOT, assert_close, write_pairs
from modeling.checkpoint import create_model, load_checkpoint
from modeling.sentence_transformers_folder import read_sentence_transformers_folder

BERT = ROOT / "tests" / "data" / "hugging_face" / "bert"
TRANSFORMER = ("", "sentence_transformers.models.Transformer")
NORMALIZE = ("2_Normalize", "sentence_transformers.models.Normalize")
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
DENSE = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
Modules = list[tuple[str, str]]


def made(folder: Path, pooling: dict[str, Any] = MEAN, dense: dict[str, Any] | None = None, **files: Any) -> Path:
    """A folder with these configs of its modules. files: name without suffix -> content of further JSON files."""
    shutil.copytree(BERT, folder)
    modules: Modules = [TRANSFORMER, ("1_Pooling", "sentence_transformers.models.Pooling")]
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    if dense is not None:
        modules.append(("2_Dense", "sentence_transformers.models.Dense"))
        write(folder / "2_Dense" / "config.json", dense)
        rng = np.random.default_rng(0)
        weights = {"linear.weight": rng.standard_normal((8, 32)), "linear.bias": rng.standard_normal(8)}
        save_file({name: w.astype(np.float32) for name, w in weights.items()}, folder / "2_Dense" / "model.safetensors")
    write_modules(folder, [*modules, NORMALIZE])
    for name, content in files.items():
        write(folder / f"{name}.json", content)
    return folder


def write(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def write_modules(folder: Path, modules: Modules) -> None:
    numbered = [{"idx": row, "name": str(row), "path": path, "type": kind} for row, (path, kind) in enumerate(modules)]
    write(folder / "modules.json", numbered)


def expected_vectors(pooling: str, dense: Path | None) -> np.ndarray:
    """What the modules make of PyTorch's last layer."""
    outputs = load_file(BERT / "expected.safetensors")
    is_token = (outputs["input_ids"] != 0)[..., None]
    sequence = outputs["sequence"]
    vectors = sequence[:, 0] if pooling == "cls" else (sequence * is_token).sum(axis=1) / is_token.sum(axis=1)
    if dense:
        weights = load_file(dense / "model.safetensors")
        vectors = vectors @ weights["linear.weight"].T + weights["linear.bias"]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def vectors_of(model: SemanticIndexBase) -> np.ndarray:
    outputs = load_file(BERT / "expected.safetensors")
    return model.embed(outputs["input_ids"], outputs["token_type_ids"])


@pytest.mark.parametrize("has_dense", [False, True])
@pytest.mark.parametrize(
    ("pooling", "config"),
    [("mean", MEAN), ("cls", CLS), ("mean", {"pooling_mode": "mean"}), ("cls", {"pooling_mode": ["cls"]})],
)
def test_the_vectors_are_those_of_the_modules(
    tmp_path: Path, pooling: str, config: dict[str, Any], has_dense: bool
) -> None:
    """In a start of a training, as a checkpoint, and after an export; both forms of Pooling's config."""
    folder = made(tmp_path / "model", config, DENSE if has_dense else None)
    expected = expected_vectors(pooling, folder / "2_Dense" if has_dense else None)
    assert_close(vectors_of(create_model(SemanticIndexBase, model_name_or_path=str(folder)).model), expected, "start")
    assert_close(vectors_of(load_checkpoint(folder).model), expected, "checkpoint")
    assert export_model.main(["--params_path", str(folder), "--output_path", str(tmp_path / "output")]) == 0
    outputs = load_file(BERT / "expected.safetensors")
    encoder = load_exported(tmp_path / "output")
    assert_close(encoder.embed(outputs["input_ids"], outputs["token_type_ids"]), expected, "export")


def test_a_training_takes_the_folder_s_settings_and_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made(tmp_path / "model", CLS, sentence_bert_config={"max_seq_length": 24, "do_lower_case": False})
    pairs = write_pairs(tmp_path / "train.csv", [("水稻的产量", "论水稻"), ("桥", "糖尿病"), ("小麦", "论小麦")])
    options = [
        "--model_name_or_path",
        str(folder),
        "--train_set_file",
        str(pairs),
        "--save_dir",
        str(tmp_path / "save"),
    ]
    assert train_batch_neg.main([*options, "--batch_size", "3", "--max_steps", "1", "--learning_rate", "0"]) == 0
    settings = "output_emb_size 0, pooling first_token, dropout 0.0, max_seq_length 24"
    error = capsys.readouterr().err
    assert f"{folder}: going on with its settings: {settings}\n" in error
    assert "semantic_index.json" not in error
    loaded = load_checkpoint(tmp_path / "save" / "model_1")
    assert loaded.model.config == ModelConfig(0, "first_token", 0.0, 24)
    assert_close(vectors_of(loaded.model), expected_vectors("cls", None), "checkpoint")
    assert train_batch_neg.main([*options, "--batch_size", "3", "--max_steps", "1", "--output_emb_size", "4"]) == 0
    assert f"--output_emb_size 4: {folder} was trained with 0" in capsys.readouterr().err


INSTRUCTION = "为这个句子生成表示："


@pytest.mark.parametrize(
    ("prompts", "query_prefix", "document_prefix", "others"),
    [
        ({"query": INSTRUCTION, "document": ""}, INSTRUCTION, "", ""),
        ({"query": "query: ", "passage": "passage: "}, "query: ", "passage: ", ""),
        ({"query": "q: ", "corpus": "c: ", "passage": "p: ", "document": None}, "q: ", "p: ", ""),
        ({"query": "q: ", "sts": "same: ", "s2s": ""}, "q: ", "", "sts 'same: '"),
        ({}, "", "", ""),
    ],
)
def test_prompts_are_prefixes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prompts: dict[str, str],
    query_prefix: str,
    document_prefix: str,
    others: str,
) -> None:
    """In a start of a training and as a checkpoint; those of other tasks are said."""
    folder = made(tmp_path / "model", config_sentence_transformers={"prompts": prompts, "default_prompt_name": None})
    for load in (
        lambda: create_model(SemanticIndexBase, model_name_or_path=str(folder)),
        lambda: load_checkpoint(folder),
    ):
        loaded = load()
        error = capsys.readouterr().err
        assert loaded.model.config.query_prefix == query_prefix
        assert loaded.model.config.document_prefix == document_prefix
        assert loaded.tokenizer.prefixes == {"query": query_prefix, "document": document_prefix}
        assert (f"prompts for other tasks aren't used ({others}); to train with one of them" in error) == bool(others)
        if "going on" in error:
            assert (f", query_prefix {query_prefix!r}" in error) == bool(query_prefix)
            assert ("document_prefix" in error.splitlines()[0]) == bool(document_prefix)


def test_prompts_that_can_t_be_followed(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "query: "}}
    folder = made(tmp_path / "model", {**MEAN, "include_prompt": False}, config_sentence_transformers=prompts)
    with pytest.raises(InputError, match="leaves prompts out"):
        load_checkpoint(folder)
    folder = made(tmp_path / "other", config_sentence_transformers={"prompts": {"query": 1}})
    with pytest.raises(InputError, match="its prompts aren't texts by names"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ([TRANSFORMER], "has the modules Transformer; only Transformer, Pooling, Dense"),
        ([("0_Transformer", TRANSFORMER[1]), ("1_Pooling", "a.Pooling")], "is in the folder 0_Transformer; move"),
        ([TRANSFORMER, ("1_Pooling", "a.Pooling"), ("2", "a.LSTM")], "Transformer, Pooling, LSTM"),
        (
            [TRANSFORMER, ("1", "a.Pooling"), ("2", "a.Dense"), ("3", "a.Dense"), ("4", "a.Dense")],
            "Dense, Dense, Dense",
        ),
        ([("", "a.Router")], "has the modules Router"),
        ([("", "a.WordEmbeddings"), ("1_Pooling", "a.Pooling")], "WordEmbeddings, Pooling"),
        ([], "has the modules none"),
    ],
)
def test_modules_that_can_t_be_followed_are_named(tmp_path: Path, modules: Modules, reason: str) -> None:
    folder = made(tmp_path / "model")
    write_modules(folder, modules)
    with pytest.raises(InputError, match=f"{folder / 'modules.json'}: .*{re.escape(reason)}"):
        create_model(SemanticIndexBase, model_name_or_path=str(folder))


@pytest.mark.parametrize(
    ("pooling", "dense", "reason"),
    [
        ({"pooling_mode_max_tokens": True}, None, "pools by max; only cls or mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, None, "pools by cls and mean"),
        ({"pooling_mode_lasttoken": True}, None, "pools by lasttoken"),
        ({"pooling_mode": ["mean", "max"]}, None, "pools by mean and max"),
        ({}, None, "pools by nothing"),
        (
            MEAN,
            {**DENSE, "activation_function": "torch.nn.modules.activation.Tanh"},
            "has activation_function torch.nn.modules.activation.Tanh; only a",
        ),
        (MEAN, {**DENSE, "bias": False}, "has bias False; only a layer with bias"),
        (MEAN, {**DENSE, "use_residual": True}, "has use_residual True"),
        (MEAN, {"in_features": 32}, "has no out_features"),
    ],
)
def test_what_modules_do_otherwise_is_named(
    tmp_path: Path, pooling: dict[str, Any], dense: dict[str, Any] | None, reason: str
) -> None:
    folder = made(tmp_path / "model", pooling, dense)
    file = folder / ("2_Dense" if dense else "1_Pooling") / "config.json"
    for load in (create_model_of, load_checkpoint):
        with pytest.raises(InputError, match=f"{file}: .*{reason}"):
            load(folder)


def create_model_of(folder: Path) -> object:
    return create_model(SemanticIndexBase, model_name_or_path=str(folder))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("modules.json", "{}", "isn't a JSON list"),
        ("modules.json", "[1]", "isn't a list of modules"),
        ("modules.json", "[", "isn't a JSON list .* at line 1"),
        ("2_Dense/model.safetensors", None, "has no weights, though modules.json lists it"),
        ("1_Pooling/config.json", None, "no such file"),
    ],
)
def test_damaged_folders_are_named(tmp_path: Path, file: str, content: str | None, reason: str) -> None:
    folder = made(tmp_path / "model", dense=DENSE)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=f"{folder}.*{reason}"):
        create_model(SemanticIndexBase, model_name_or_path=str(folder))


def test_a_dense_module_without_its_layer_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", dense=DENSE)
    save_file({"weight": np.ones((8, 32), np.float32)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match="isn't the weights of a Dense module"):
        create_model(SemanticIndexBase, model_name_or_path=str(folder))


def test_what_a_folder_tells(tmp_path: Path) -> None:
    told = read_sentence_transformers_folder(made(tmp_path / "model", CLS, DENSE))
    assert told == ("first_token", None, tmp_path / "model" / "2_Dense", 8, None, "", "", {})
