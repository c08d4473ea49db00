"""Encoders of PaddleNLP: which ones can be used, and where their config, weights and tokenizer come from."""

import re
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.base import core

from base_model import SemanticIndexBase
from common.device import set_seed
from common.errors import InputError
from helpers import make_model_folder, new_model
from modeling.backbone import build_backbone, find_backbone, pretrained_weights
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint

TEXTS = ["水稻的产量", "桥", "论糖尿病影响因素研究糖尿病,影响因素" * 10]


# ---------------------------------------------------------------------------------------------------------------------
# Which encoders can be used


def test_bert_is_an_encoder_too(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", architectures=["BertModel"], model_type="bert")
    model, tokenizer = new_model(folder)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    loaded = load_checkpoint(tmp_path / "model_1").model
    np.testing.assert_array_equal(loaded.embed(*tokenizer(TEXTS)), model.embed(*tokenizer(TEXTS)))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_robertas_longest_text_has_fewer_tokens_than_its_position_table_rows(tmp_path: Path, pooling: str) -> None:
    """Its positions start after the padding's."""
    folder = make_model_folder(tmp_path / "model", model_type="roberta")
    model, tokenizer = new_model(folder, pooling=pooling)
    assert tokenizer.max_seq_length == 39
    alone, padded = model.embed(*tokenizer(TEXTS[:1])), model.embed(*tokenizer([TEXTS[0], TEXTS[2]]))
    np.testing.assert_allclose(padded[:1], alone, atol=1e-6)
    with pytest.raises(InputError, match=r"--max_seq_length 40: .* 39 rows"):
        new_model(folder, max_seq_length=40)


@pytest.mark.parametrize("architecture", ["Electra", "DistilBert", "deberta", "no-such"])
def test_other_encoders_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    folder = make_model_folder(
        tmp_path / "model", architectures=[f"{architecture}Model"], model_type=architecture.lower()
    )
    with pytest.raises(InputError, match=architecture):
        build_backbone(find_backbone(folder))


@pytest.mark.parametrize("architecture", ["Albert", "FNet"])
def test_an_encoder_that_does_not_mask_padding_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    folder = make_model_folder(tmp_path / "model", model_type=architecture.lower(), embedding_size=32)
    with pytest.raises(InputError, match=f"{architecture}Model doesn't mask padding"):
        new_model(folder)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_checkpoint_that_does_not_mask_padding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooling: str
) -> None:
    """Its weights have been trained, and are larger than random ones."""
    folder = make_model_folder(tmp_path / "model", model_type="albert", embedding_size=32)
    monkeypatch.setattr("modeling.checkpoint.LARGEST_EFFECT_OF_PADDING", 2.0)
    model, tokenizer = new_model(folder, pooling=pooling)
    for parameter in model.parameters():
        parameter.set_value(parameter * 5)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    assert load_checkpoint(tmp_path / "model_1")
    monkeypatch.undo()
    for load in (load_checkpoint, lambda path: create_model(SemanticIndexBase, init_from_ckpt=path)):
        with pytest.raises(InputError, match=r"model_1: AlbertModel doesn't mask padding"):
            load(str(tmp_path / "model_1"))


@pytest.mark.parametrize("model_type", ["ernie", "bert", "roberta", "skep", "tinybert"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_encoders_with_large_weights_mask_padding(tmp_path: Path, model_type: str, pooling: str) -> None:
    """The bound is on unit vectors, so that it doesn't depend on the size of the outputs."""
    model, tokenizer = new_model(make_model_folder(tmp_path / "model", model_type=model_type), pooling=pooling)
    for parameter in model.parameters():
        parameter.set_value(parameter * 5)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    sequence, _ = load_checkpoint(tmp_path / "model_1").model.ptm(*map(paddle.to_tensor, tokenizer(TEXTS[:1])))
    assert sequence.abs().max() > 10


def test_the_effect_of_padding_is_computed_in_float32(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large model on a GPU the rounding error of TF32 would be larger than the effect."""
    switched: list[bool] = []
    monkeypatch.setattr(core, "get_cublas_switch", lambda: True)
    monkeypatch.setattr(core, "set_cublas_switch", switched.append)
    new_model(model_folder)
    assert switched == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Random weights


@pytest.mark.parametrize("model_type", ["ernie", "bert"])
def test_a_seed_gives_the_weights_that_it_gave_in_version_2_0_0(tmp_path: Path, model_type: str) -> None:
    parameters = new_model(make_model_folder(tmp_path / "model", model_type=model_type)).model.state_dict()
    for name, values in (
        ("ptm.embeddings.word_embeddings.weight", [-0.0096823685, -0.0018701694, -0.0181071963]),
        ("ptm.encoder.layers.1.linear2.weight", [-0.0139121963, 0.0071379342, 0.0155409630]),
        ("emb_reduce_linear.weight", [0.0229521170, 0.0004253271, -0.0122000705]),
    ):
        np.testing.assert_allclose(parameters[name].numpy().ravel()[:3], values, rtol=0, atol=1e-8, err_msg=name)


def test_pretrained_weights_leave_a_seeds_reduction_as_in_version_2_0_0(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    paddle.save(new_model(folder).model.ptm.state_dict(), str(folder / "model_state.pdparams"))
    set_seed(2)
    model, _ = create_model(SemanticIndexBase, model_name_or_path=str(folder), output_emb_size=16)
    values = model.emb_reduce_linear.weight.numpy().ravel()[:3]
    np.testing.assert_allclose(values, [0.0442445129, -0.0078133112, 0.0010629252], rtol=0, atol=1e-8)


@pytest.mark.parametrize("model_type", ["ernie", "bert", "roberta", "skep", "tinybert"])
def test_weights_that_a_checkpoint_replaces_are_not_drawn(tmp_path: Path, model_type: str) -> None:
    """Everything else is as with random weights, such as epsilon, which PaddleNLP sets while it draws."""
    backbone = find_backbone(make_model_folder(tmp_path / "model", model_type=model_type, layer_norm_eps=1e-3))
    drawn = build_backbone(backbone)
    set_seed(1)
    first = paddle.rand([3]).tolist()
    set_seed(1)
    built = build_backbone(backbone, draw=False)
    assert paddle.rand([3]).tolist() == first
    assert not any(parameter.abs().max() for name, parameter in built.state_dict().items() if parameter.ndim > 1)
    assert drawn.embeddings.word_embeddings.weight.abs().max()
    settings = [
        [(type(layer), getattr(layer, "_epsilon", None), layer.training) for layer in model.sublayers(True)]
        for model in (drawn, built)
    ]
    assert settings[0] == settings[1]


# ---------------------------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize("value", [None, "x", -1, 1.5, []])
@pytest.mark.parametrize("key", ["max_position_embeddings", "vocab_size", "pad_token_id"])
def test_a_wrong_number_in_the_config_is_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}/model: .*{key}.*{re.escape(repr(value))}"):
        find_backbone(make_model_folder(tmp_path / "model", **{key: value}))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "ernie", "hidden_size": "x"}', '{"architectures": 3}'])
def test_a_broken_config_is_one_line(tmp_path: Path, content: str) -> None:
    folder = make_model_folder(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError) as error:
        build_backbone(find_backbone(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{tmp_path}: has no config\.json"):
        find_backbone(tmp_path)


def test_a_relative_folder_with_the_name_of_a_model_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaddleNLP would take its own config for that name."""
    make_model_folder(tmp_path / "ernie-1.0")
    monkeypatch.chdir(tmp_path)
    assert find_backbone("ernie-1.0").config.max_position_embeddings == 40


# ---------------------------------------------------------------------------------------------------------------------
# Weights and tokenizers


@pytest.mark.parametrize("prefix", ["", "ernie."])
def test_pretrained_weights_of_a_folder(
    model_folder: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As PaddleNLP saves a plain model, or one with a head whose weights aren't used here."""
    folder = shutil.copytree(model_folder, tmp_path / "pretrained")
    backbone = new_model(model_folder).model.ptm
    weights = {prefix + name: value for name, value in backbone.state_dict().items()}
    if prefix:
        weights["cls.predictions.decoder_bias"] = paddle.zeros([3])
    paddle.save(weights, str(folder / "model_state.pdparams"))
    set_seed(2)
    model, _ = create_model(SemanticIndexBase, model_name_or_path=str(folder), output_emb_size=16)
    for name, value in backbone.state_dict().items():
        np.testing.assert_array_equal(model.ptm.state_dict()[name].numpy(), value.numpy())
    assert ("1 unexpected: ptm.cls.predictions.decoder_bias" in capsys.readouterr().err) == bool(prefix)


def test_a_folder_without_weights_is_refused(model_folder: Path) -> None:
    has_none = r"has no model_state\.pdparams, model\.safetensors or pytorch_model\.bin; use --from_scratch"
    with pytest.raises(InputError, match=rf"^{model_folder}: {has_none}"):
        pretrained_weights(find_backbone(model_folder))
