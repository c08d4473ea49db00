"""Folders in the Hugging Face form: PyTorch's outputs, the forms of their files, and what is refused.

The models of data/hugging_face and their expected outputs were computed by PyTorch; see make.py there.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

import export_model
import train_batch_neg
from base_model import SemanticIndexBase
from common.device import set_seed
from common.errors import InputError
from common.files import read_json, write_json
from data import TextTokenizer
from encoding.encoder import load_encoder
from encoding.exported_model import load_exported
from helpers import ROOT, V1, assert_close, assert_same_bits, make_model_folder, new_model
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint
from modeling.checkpoint_files import find_weights, lowercases
from modeling.weight_files import read_weights, write_safetensors

DATA = ROOT / "tests" / "data" / "hugging_face"
MODELS = ("bert", "ernie", "roberta")
TEXTS = ["水稻的产量", "桥", "糖尿病影响因素the wheats", "Rice"]
Weights = dict[str, np.ndarray]


def copy(name: str, folder: Path, weights: Mapping[str, np.ndarray] | None = None, **config: Any) -> Path:
    """One of the folders, with other weights in model.safetensors if given, and with changes of its config.json."""
    shutil.copytree(DATA / name, folder)
    if weights is not None:
        for file in ("pytorch_model.bin", "model.safetensors"):
            (folder / file).unlink(missing_ok=True)
        write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **config})
    return folder


def started(folder: Path, **options: Any) -> SemanticIndexBase:
    """The model that a training starts from, in evaluation mode."""
    options = {"pooling": "mean", "output_emb_size": 0, **options}
    model = create_model(SemanticIndexBase, model_name_or_path=str(folder), **options).model
    model.eval()
    return model


def assert_pytorchs_outputs(model: SemanticIndexBase, name: str) -> None:
    """The last layer where there are tokens, and the pooled output."""
    expected = load_file(DATA / name / "expected.safetensors")
    ids = expected["input_ids"]
    sequence, pooled = model.ptm(paddle.to_tensor(ids), paddle.to_tensor(expected["token_type_ids"]))
    is_token = ids != model.ptm.config.pad_token_id
    assert_close(sequence.numpy()[is_token], expected["sequence"][is_token], "sequence")
    assert_close(pooled.numpy(), expected["pooled"], "pooled")


def refusal(folder: Path, **options: Any) -> str:
    """The one line that refuses a start from a folder."""
    with pytest.raises(InputError) as error:
        started(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_are_pytorchs(name: str) -> None:
    """Three architectures, in safetensors, PyTorch's zip file, and its older format; task types, position offset."""
    assert_pytorchs_outputs(started(DATA / name), name)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_a_checkpoint_too(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--params_path and --init_from_ckpt take it; without semantic_index.json, settings are assumed, and said."""
    loaded = load_checkpoint(DATA / name)
    said = capsys.readouterr().err
    assert "has no semantic_index.json; assuming pooling cls" in said
    assert "vocabulary" not in said
    for model in (loaded.model, create_model(SemanticIndexBase, init_from_ckpt=str(DATA / name)).model):
        expected = load_file(DATA / name / "expected.safetensors")
        ids, types = (paddle.to_tensor(expected[key]) for key in ("input_ids", "token_type_ids"))
        model.eval()
        assert_close(model.ptm(ids, types)[1].numpy(), expected["pooled"], "pooled")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_checkpoint_of_such_a_start_gives_the_same_vectors(name: str, pooling: str, tmp_path: Path) -> None:
    """Also ERNIE's, whose epsilon PaddleNLP wouldn't take from the config."""
    model, tokenizer = create_model(SemanticIndexBase, model_name_or_path=str(DATA / name), pooling=pooling)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    loaded = load_checkpoint(tmp_path / "model_1")
    np.testing.assert_array_equal(loaded.model.embed(*tokenizer(TEXTS)), model.embed(*tokenizer(TEXTS)))
    assert loaded.tokenizer.settings == tokenizer.settings
    if pooling == "mean":
        assert_pytorchs_outputs(loaded.model, name)
    epsilons = {layer._epsilon for layer in loaded.model.sublayers() if isinstance(layer, paddle.nn.LayerNorm)}
    assert epsilons == {read_json(DATA / name / "config.json")["layer_norm_eps"]}


def test_an_epsilon_of_paddlenlps_ernie_stays_as_it_was(tmp_path: Path) -> None:
    """PaddleNLP uses 1e-12 whatever the config says, so earlier checkpoints were trained with it."""
    model, tokenizer = new_model(make_model_folder(tmp_path / "model", layer_norm_eps=1e-3))
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    loaded = load_checkpoint(tmp_path / "model_1").model
    epsilons = {layer._epsilon for layer in loaded.sublayers() if isinstance(layer, paddle.nn.LayerNorm)}
    assert epsilons == {1e-12}


@pytest.mark.parametrize("name", MODELS)
def test_training_export_and_resuming_go_on_from_it(name: str, recall_data: Path, tmp_path: Path) -> None:
    data = ["--train_set_file", str(recall_data / "train.csv"), "--batch_size", "8", "--max_seq_length", "24"]
    start = ["--model_name_or_path", str(DATA / name), "--pooling", "mean", "--output_emb_size", "0"]
    steps = ["--save_steps", "1", "--max_steps", "2"]
    assert train_batch_neg.main([*data, *start, *steps, "--save_dir", str(tmp_path / "whole")]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "model_2")
    resumed = ["--save_dir", str(tmp_path / "parts"), "--resume_from", "latest"]
    assert train_batch_neg.main([*data, *start, *steps, *resumed]) == 0
    assert_same_bits(tmp_path / "whole" / "model_2", tmp_path / "parts" / "model_2")
    checkpoint, output = tmp_path / "whole" / "model_1", tmp_path / "output"
    assert export_model.main(["--params_path", str(checkpoint), "--output_path", str(output)]) == 0
    loaded, exported = load_checkpoint(checkpoint), load_exported(output)
    expected = loaded.model.embed(*loaded.tokenizer(TEXTS))
    assert_close(exported.embed(*exported.tokenizer(TEXTS)), expected, "export")
    for engine in ("dygraph", "static"):
        assert_close(load_encoder(checkpoint, engine=engine).encode(TEXTS), expected, engine)


# ---------------------------------------------------------------------------------------------------------------------
# Forms of the files


def bert() -> Weights:
    return load_file(DATA / "bert" / "model.safetensors")


def with_prefix(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: array for name, array in weights.items()}


HEAD = {"cls.predictions.bias": np.zeros(65, np.float32), "cls.seq_relationship.weight": np.zeros((2, 32), np.float32)}
VARIANTS: dict[str, Callable[[Weights], Weights]] = {
    "bert.": lambda weights: with_prefix(weights, "bert."),
    "module.bert.": lambda weights: with_prefix(weights, "module.bert."),
    "head": lambda weights: {**with_prefix(weights, "bert."), **HEAD},
    "position ids": lambda weights: {**weights, "embeddings.position_ids": np.arange(40)[None]},
    "gamma and beta": lambda weights: {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in weights.items()
    },
    "float64": lambda weights: {name: array.astype(np.float64) for name, array in weights.items()},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_with_prefixes_heads_and_buffers(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("bert", tmp_path / "model", VARIANTS[variant](bert()))
    assert_pytorchs_outputs(started(folder), "bert")
    report = " (2 unexpected: cls.predictions.bias, cls.seq_relationship.weight)" if variant == "head" else ""
    assert f"took 39 of 39 parameters{report}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ernie", "roberta"])
def test_prefixes_of_the_other_models(name: str, tmp_path: Path) -> None:
    """`ernie.` comes with the folder; without it, and with `roberta.`."""
    weights = read_weights(DATA / name / "pytorch_model.bin")
    if name == "ernie":
        weights = {key.removeprefix("ernie."): array for key, array in weights.items() if key.startswith("ernie.")}
    else:
        weights = with_prefix(weights, "roberta.")
    assert_pytorchs_outputs(started(copy(name, tmp_path / "model", weights)), name)


def bfloat16_file(weights: Weights) -> bytes:
    """The safetensors file of the upper halves, which the package for NumPy can't write; a scale stays float32."""
    header: dict[str, Any] = {}
    data = b""
    for name, array in weights.items():
        is_long = name.endswith("LayerNorm.weight")
        raw = array.tobytes() if is_long else (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32" if is_long else "BF16", "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_float16_and_bfloat16(tmp_path: Path) -> None:
    """The same as the float32 weights that hold the same numbers."""
    half = {name: array.astype(np.float16) for name, array in bert().items()}
    rounded = {
        name: array if name.endswith("LayerNorm.weight") else (array.view("<u4") >> 16 << 16).view(np.float32)
        for name, array in bert().items()
    }
    folder = copy("bert", tmp_path / "bfloat16", bert(), dtype="bfloat16")
    (folder / "model.safetensors").write_bytes(bfloat16_file(bert()))
    folders = [
        (copy("bert", tmp_path / "float16", half, torch_dtype="float16"), {k: v.astype("f4") for k, v in half.items()}),
        (folder, rounded),
    ]
    for number, (short, long) in enumerate(folders):
        exact = started(copy("bert", tmp_path / f"exact{number}", long))
        model = started(short)
        ids = np.arange(5, 25)[None]
        np.testing.assert_array_equal(model.embed(ids, 0 * ids), exact.embed(ids, 0 * ids))
        assert {parameter.dtype for parameter in model.parameters()} == {paddle.float32}
    assert np.abs(started(folder).embed(ids, 0 * ids) - started(DATA / "bert").embed(ids, 0 * ids)).max() > 1e-6


def sharded(folder: Path, form: str) -> Path:
    """Two shards; those of PyTorch's form are copies of the whole file, of which the index takes a half each."""
    folder = copy({"safetensors": "bert", "bin": "ernie"}[form], folder)
    file = find_weights(folder)
    weights = read_weights(file)
    shards = {
        name: f"{file.stem}-{1 + number % 2:05}-of-00002{file.suffix}" for number, name in enumerate(sorted(weights))
    }
    for shard in set(shards.values()):
        if form == "bin":
            shutil.copy(file, folder / shard)
        else:
            write_safetensors(folder / shard, {name: weights[name] for name in weights if shards[name] == shard})
    file.unlink()
    write_json(folder / f"{file.name}.index.json", {"metadata": {"total_size": 1}, "weight_map": shards})
    return folder


@pytest.mark.parametrize(("form", "name"), [("safetensors", "bert"), ("bin", "ernie")])
def test_shards(form: str, name: str, tmp_path: Path) -> None:
    assert_pytorchs_outputs(started(sharded(tmp_path / "model", form)), name)
    assert load_checkpoint(tmp_path / "model").weights.name.endswith(".index.json")


def test_safetensors_are_taken_before_pytorchs_file(tmp_path: Path) -> None:
    """As transformers does; the other file isn't read."""
    folder = copy("bert", tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    assert_pytorchs_outputs(started(folder), "bert")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"])
@pytest.mark.parametrize("form", ["ours", "PaddleNLP's"])
def test_the_names_tell_the_form_and_not_the_files(file: str, form: str, tmp_path: Path) -> None:
    """Square matrices too: PaddleNLP's names in any file are PaddleNLP's form, as version 1 wrote model.safetensors."""
    model = started(DATA / "bert")
    folder = copy("bert", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weights = model.state_dict() if form == "ours" else model.ptm.state_dict()
    if file == "model.safetensors":
        write_safetensors(folder / file, {name: tensor.numpy() for name, tensor in weights.items()})
    else:
        paddle.save(weights, str(folder / file))
    assert_pytorchs_outputs(started(folder), "bert")


def test_other_weights_files_of_a_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But not the second one in a checkpoint of version 1."""
    folder = copy("bert", tmp_path / "model")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (folder / name).write_bytes(b"not read")
    said = "has several weights files; using model.safetensors, not pytorch_model.bin, pytorch_model.bin.index.json\n"
    for load in (load_checkpoint, started):
        load(folder)
        assert f"{folder}: {said}" in capsys.readouterr().err
    for load in (load_checkpoint, started):
        load(DATA / "bert")
        load(V1 / "run" / "model_4")
        assert "several weights files" not in capsys.readouterr().err


def test_pytorchs_names_in_paddles_file(tmp_path: Path) -> None:
    folder = copy("bert", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    paddle.save({name: paddle.to_tensor(array) for name, array in bert().items()}, str(folder / "model_state.pdparams"))
    assert_pytorchs_outputs(started(folder), "bert")


@pytest.mark.parametrize("pooling", ["mean", "first_token"])
def test_without_a_pooler_other_poolings_work_and_cls_is_refused(
    tmp_path: Path, pooling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """BGE and models of masked words have none."""
    weights = {name: array for name, array in bert().items() if not name.startswith("pooler")}
    folder = copy("bert", tmp_path / "model", weights)
    model = started(folder, pooling=pooling)
    assert "took 37 of 39 parameters (2 missing: ptm.pooler.dense.weight, ptm.pooler.dense.bias)" in (
        capsys.readouterr().err
    )
    ids = np.arange(5, 25)[None]
    np.testing.assert_array_equal(
        model.embed(ids, 0 * ids), started(DATA / "bert", pooling=pooling).embed(ids, 0 * ids)
    )
    assert (
        "has no pooler (pooler.dense), which cls pooling needs; train from it with --pooling first_token or mean"
        in refusal(folder, pooling="cls")
    )
    with pytest.raises(InputError, match="has no pooler"):
        load_checkpoint(folder)


@pytest.mark.parametrize("field", ["use_cache", "output_hidden_states", "output_attentions", "return_dict"])
@pytest.mark.parametrize("name", MODELS)
def test_fields_that_add_outputs_are_not_followed(name: str, field: str, tmp_path: Path) -> None:
    """Most configs set use_cache, with which PaddleNLP's BERT returns three things."""
    assert_pytorchs_outputs(started(copy(name, tmp_path / "model", **{field: True})), name)


def test_a_start_is_the_same_again(tmp_path: Path) -> None:
    """The drawn reduction follows the seed."""
    draws = []
    for _ in range(2):
        set_seed(3)
        draws.append(started(DATA / "bert", output_emb_size=8).emb_reduce_linear.weight.numpy())
    np.testing.assert_array_equal(*draws)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_a_folder_with_neither_form(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json; give a model folder of PaddleNLP or Hugging Face" in refusal(tmp_path / "empty")
    folder = copy("bert", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert "has no model_state.pdparams, model.safetensors or pytorch_model.bin; use --from_scratch" in refusal(folder)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        *((name, "a decoder") for name in ("qwen2", "qwen3", "gpt2", "llama", "mistral")),
        ("t5", "an encoder with a decoder"),
        ("xlm-roberta", "an encoder with a SentencePiece vocabulary"),
    ],
)
def test_models_of_another_kind_are_named(model_type: str, kind: str, tmp_path: Path) -> None:
    said = refusal(copy("bert", tmp_path / "model", model_type=model_type))
    assert said.endswith(f"model: is {kind} ({model_type}); need an encoder such as ERNIE or BERT")


@pytest.mark.parametrize("model_type", ["new", "modernbert", "nomic_bert"])
def test_types_that_paddlenlp_lacks_are_named(model_type: str, tmp_path: Path) -> None:
    said = refusal(copy("bert", tmp_path / "model", model_type=model_type, architectures=["NewModel"]))
    assert said.endswith(
        f"model: PaddleNLP knows no model of type '{model_type}'; need an encoder such as ERNIE or BERT"
    )


def test_albert_of_pytorch_is_named(tmp_path: Path) -> None:
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0."
    names = ["albert.embeddings.word_embeddings.weight", "albert.embeddings.LayerNorm.weight", f"{layer}ffn.weight"]
    weights = {name: np.zeros((2, 2), np.float32) for name in names}
    folder = copy("bert", tmp_path / "model", weights, model_type="albert", embedding_size=32)
    assert "is PyTorch's albert; need BERT, ERNIE, or RoBERTa with BERT's vocabulary" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position_embedding_type", "relative_key"),
        ("position_embedding_type", "alibi"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_fields_that_change_the_vectors_are_refused_by_name(
    name: str, field: str, value: object, tmp_path: Path
) -> None:
    said = refusal(copy(name, tmp_path / "model", **{field: value}))
    assert f"config.json: has {field} {value!r}, which this project doesn't have" in said


@pytest.mark.parametrize("value", ["gelu_new", "gelu_pytorch_tanh", None])
@pytest.mark.parametrize("name", MODELS)
def test_an_activation_that_paddle_lacks_is_named(name: str, value: object, tmp_path: Path) -> None:
    said = refusal(copy(name, tmp_path / "model", hidden_act=value))
    remedy = "need a model with gelu, relu, silu or another one of Paddle's"
    assert said == f"{tmp_path / 'model'}: config.json has hidden_act {value!r}; {remedy}"


@pytest.mark.parametrize("value", [2e-3, -1.0, "small", None])
@pytest.mark.parametrize("name", MODELS)
def test_an_epsilon_that_paddle_lacks_is_named(name: str, value: object, tmp_path: Path) -> None:
    """But PaddleNLP's own ERNIE ignores it."""
    said = refusal(copy(name, tmp_path / "model", layer_norm_eps=value))
    assert f"config.json has layer_norm_eps {value!r}; need a model with a number from 0 to 0.001" in said
    new_model(make_model_folder(tmp_path / "ernie", layer_norm_eps=value))


def test_code_of_the_folders_own_is_named_and_not_run(tmp_path: Path) -> None:
    folder = copy("bert", tmp_path / "model", auto_map={"AutoModel": "modeling.NewModel"})
    assert "code of its own (modeling.NewModel), which isn't run" in refusal(folder)


def test_a_cross_encoder_is_named(tmp_path: Path) -> None:
    head = {"classifier.weight": np.zeros((1, 32), np.float32), "classifier.bias": np.zeros(1, np.float32)}
    weights = {**with_prefix(bert(), "bert."), **head}
    folder = copy("bert", tmp_path / "model", weights, architectures=["BertForSequenceClassification"])
    assert "is a cross-encoder (BertForSequenceClassification), which scores pairs" in refusal(folder)
    assert_pytorchs_outputs(started(copy("bert", tmp_path / "other", weights)), "bert")  # a head without that name


def test_two_encoders_are_refused(tmp_path: Path) -> None:
    weights = {**with_prefix(bert(), "question."), **with_prefix(bert(), "context.")}
    assert "holds 2 encoders, not one" in refusal(copy("bert", tmp_path / "model", weights))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_quantized_weights_are_refused(dtype: type, tmp_path: Path) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    folder = copy("bert", tmp_path / "model", {**bert(), name: bert()[name].astype(dtype)})
    assert f"{name} holds {np.dtype(dtype)}, as in a quantized model" in refusal(folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_is_refused(layers: int, tmp_path: Path) -> None:
    folder = copy("bert", tmp_path / "model", num_hidden_layers=layers)
    assert f"has 2 layers, but num_hidden_layers is {layers} in config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", 64, "word_embeddings.weight [65, 32] instead of [65, 64]"),
        ("intermediate_size", 40, "linear1.weight [32, 48] instead of [32, 40]"),
        ("max_position_embeddings", 50, "position_embeddings.weight [40, 32] instead of [50, 32]"),
        ("type_vocab_size", 4, "token_type_embeddings.weight [2, 32] instead of [4, 32]"),
        ("vocab_size", 70, "word_embeddings.weight [65, 32] instead of [70, 32]"),
        ("vocab_size", 60, "its vocabulary has 65 tokens, more than the model's 60 embeddings"),
    ],
)
def test_a_config_that_contradicts_the_weights(field: str, value: int, said: str, tmp_path: Path) -> None:
    assert said in refusal(copy("bert", tmp_path / "model", **{field: value}))


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    weights = bert()
    del weights["encoder.layer.1.output.dense.bias"]
    assert "1 missing: ptm.encoder.layers.1.linear2.bias" in refusal(copy("bert", tmp_path / "model", weights))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_bad_shards(form: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", form)
    index = find_weights(folder)
    content = read_json(index)
    shards = sorted(set(content["weight_map"].values()))
    write_json(index, {"weight_map": {**content["weight_map"], "no.such": shards[1]}})
    assert f"names 'no.such', which {shards[1]} lacks" in refusal(folder)
    write_json(index, content)
    (folder / shards[0]).unlink()
    assert f"1 of its 2 shards are missing, such as {shards[0]}; get them into {folder}" in refusal(folder)
    for weight_map in ({}, None, {"a": 1}, {"a": "../model/x.bin"}, {"a": index.name}, {"a": "/etc/passwd"}):
        write_json(index, {"weight_map": weight_map})
        assert "isn't an index of shards" in refusal(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def changed_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """RoBERTa's folder, whose only tokenizer is tokenizer.json, with a change of it."""
    folder = copy("roberta", folder)
    content = read_json(folder / "tokenizer.json")
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_tokenizer_json_gives_the_vocabulary_in_the_order_of_ids(tmp_path: Path) -> None:

    def reverse(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))

    folder = changed_tokenizer(tmp_path / "model", reverse)
    _, tokenizer = create_model(SemanticIndexBase, model_name_or_path=str(folder))
    assert tokenizer.settings["vocabulary"][:5] == ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.pad_id == 1
    assert not tokenizer.lowercases
    assert not lowercases(DATA / "roberta")
    assert tokenizer.max_seq_length == 38  # of 40 positions, of which RoBERTa leaves two out
    vocabulary = tokenizer.settings["vocabulary"]
    words = [[vocabulary[number] for number in ids] for ids in tokenizer.tokenize(["the wheats 水", "The"])]
    assert words == [["[CLS]", "the", "wheat", "##s", "水", "[SEP]"], ["[CLS]", "[UNK]", "[SEP]"]]


def test_tokenizer_config_decides_on_lower_case(tmp_path: Path) -> None:
    """Then tokenizer.json, also beside vocab.txt."""
    folder = copy("roberta", tmp_path / "model")
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True})
    assert create_model(SemanticIndexBase, model_name_or_path=str(folder)).tokenizer.lowercases
    assert lowercases(folder)
    folder = copy("bert", tmp_path / "other")
    assert lowercases(folder)
    shutil.copy(DATA / "roberta" / "tokenizer.json", folder)
    assert not lowercases(folder)
    assert not create_model(SemanticIndexBase, model_name_or_path=str(folder)).tokenizer.lowercases


SYMBOLS = "the℃wheat"  # one word to Hugging Face's tokenizer, three to PaddleNLP's
SPLIT = ["[CLS]", "the", "[UNK]", "wheat", "[SEP]"]
WHOLE = ["[CLS]", "[UNK]", "[SEP]"]


def tokens_of(tokenizer: TextTokenizer) -> list[str]:
    vocabulary = tokenizer.settings["vocabulary"]
    return [vocabulary[token_id] for token_id in tokenizer.tokenize([SYMBOLS])[0]]


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_split_as_by_hugging_face_s_tokenizer_where_the_weights_are_pytorchs(
    name: str, tmp_path: Path
) -> None:
    """Also in a checkpoint that is saved, and in its exports; the folder may say otherwise."""
    folder = copy(name, tmp_path / "model")
    for start in ({"model_name_or_path": str(folder)}, {"init_from_ckpt": str(folder)}):
        loaded = create_model(SemanticIndexBase, **start, output_emb_size=0)
        assert tokens_of(loaded.tokenizer) == WHOLE
    assert tokens_of(load_checkpoint(folder).tokenizer) == WHOLE
    save_checkpoint(tmp_path / "model_1", *loaded)
    assert tokens_of(load_checkpoint(tmp_path / "model_1").tokenizer) == WHOLE
    options = ["--params_path", str(tmp_path / "model_1"), "--output_path", str(tmp_path / "output")]
    assert export_model.main(options) == 0
    assert tokens_of(load_exported(tmp_path / "output").tokenizer) == WHOLE
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False, "split_symbols": True})
    assert tokens_of(load_checkpoint(folder).tokenizer) == SPLIT


def test_texts_are_split_as_by_paddlenlp_s_tokenizer_where_the_weights_are_paddlenlps(tmp_path: Path) -> None:
    """Whatever the files are called, and with random weights."""
    model = started(DATA / "bert")
    folder = copy("bert", tmp_path / "model", {name: array.numpy() for name, array in model.ptm.state_dict().items()})
    shutil.copy(DATA / "roberta" / "tokenizer.json", folder)
    assert tokens_of(load_checkpoint(folder).tokenizer) == SPLIT
    assert tokens_of(create_model(SemanticIndexBase, model_name_or_path=str(folder)).tokenizer) == SPLIT
    assert tokens_of(create_model(SemanticIndexBase, from_scratch=str(DATA / "bert")).tokenizer) == SPLIT


def test_a_checkpoint_s_tokenizer_isn_t_called_another_one_for_its_splitting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(copy("bert", tmp_path / "model"))
    create_model(SemanticIndexBase, init_from_ckpt=folder, from_scratch=folder)
    assert "its tokenizer isn't used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["model"].update(type="Unigram"), "its tokenizer is SentencePiece (Unigram)"),
        (lambda content: content["model"].update(type="BPE"), "its tokenizer is BPE"),
        (lambda content: content.update(model=None), "its tokenizer is None"),
        (lambda content: content["model"].update(continuing_subword_prefix="@@"), "continuing_subword_prefix '@@'"),
        (lambda content: content["model"].update(unk_token="<unk>"), "unk_token '<unk>'"),
        (lambda content: content["normalizer"].update(type="NFKC"), "its normalizer is NFKC, not BertNormalizer"),
        (lambda content: content.update(pre_tokenizer=None), "its pre_tokenizer is None, not BertPreTokenizer"),
        (lambda content: content.pop("pre_tokenizer"), "its pre_tokenizer is None, not BertPreTokenizer"),
        (lambda content: content["model"]["vocab"].update({"x": 99}), "aren't 0 to 65"),
        (lambda content: content["model"]["vocab"].update({"x": "y"}), "aren't 0 to 65"),
        (lambda content: content["model"]["vocab"].update({"a\n": 65}), r"its token 'a\n' doesn't fit into a line"),
        (
            lambda content: (content.update(added_tokens=[]), content["model"]["vocab"].update({"[SEP]": 65})),
            "aren't 0 to 64",
        ),
        (
            lambda content: content["added_tokens"].append({"content": "<x>", "id": 65}),
            "has 66 tokens, more than the model's 65 embeddings",
        ),
    ],
)
def test_another_tokenizer_json_is_refused(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    assert said in refusal(changed_tokenizer(tmp_path / "model", change))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("sentencepiece.bpe.model", "its tokenizer is SentencePiece; need BERT's WordPiece tokenizer (vocab.txt)"),
        ("merges.txt", "its tokenizer is BPE; need BERT's WordPiece tokenizer (vocab.txt)"),
        ("other", "has no vocab.txt or tokenizer.json; need BERT's WordPiece tokenizer (vocab.txt)"),
    ],
)
def test_a_folder_without_wordpiece_is_refused(file: str, said: str, tmp_path: Path) -> None:
    folder = copy("bert", tmp_path / "model")
    (folder / "vocab.txt").unlink()
    (folder / file).touch()
    assert said in refusal(folder)


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False}])
def test_special_tokens_other_than_berts_are_refused(token: object, tmp_path: Path) -> None:
    folder = copy("bert", tmp_path / "model")
    write_json(folder / "special_tokens_map.json", {"cls_token": "[CLS]", "sep_token": token})
    assert "special_tokens_map.json: sep_token is '<s>', not [SEP]" in refusal(folder)
