"""The checkpoint folder: what it holds, loading, saving, and what a training starts from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

import train_batch_neg
from base_model import ModelConfig, SemanticIndexBase
from batch_negative.model import SemanticIndexBatchNeg
from common import __version__
from common.device import set_seed
from common.errors import InputError
from common.files import read_json, sha256, write_json
from helpers import all_pairs, make_model_folder, new_model, train_options
from modeling.checkpoint import create_model, load_checkpoint, model_fingerprint, save_checkpoint
from modeling.weight_files import read_weights

TEXTS = ["水稻的产量", "桥", "论糖尿病影响因素研究糖尿病,影响因素", "a" * 200, ""]
WEIGHTS = "model_state.pdparams"


def original_checkpoint(folder: Path, model_folder: Path, output_emb_size: int = 16) -> tuple[Path, SemanticIndexBase]:
    """What the original scripts write: weights, a vocabulary and a tokenizer config, but no model config."""
    model, tokenizer = new_model(model_folder, output_emb_size=output_emb_size)
    folder.mkdir(parents=True)
    paddle.save(model.state_dict(), str(folder / WEIGHTS))
    tokenizer.save(folder)
    return folder / WEIGHTS, model


# ---------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("as_file", [False, True])
def test_a_checkpoint_describes_its_model_completely(model_folder: Path, tmp_path: Path, as_file: bool) -> None:
    model, tokenizer = new_model(model_folder, pooling="mean", max_seq_length=20, dropout=0.3)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    loaded = load_checkpoint(tmp_path / "model_1" / WEIGHTS if as_file else tmp_path / "model_1")
    assert loaded.model.config == ModelConfig(16, "mean", 0.3, 20)
    assert not loaded.model.training
    assert loaded.weights == tmp_path / "model_1" / WEIGHTS
    assert loaded.tokenizer.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)
    np.testing.assert_array_equal(loaded.model.embed(*loaded.tokenizer(TEXTS)), model.embed(*tokenizer(TEXTS)))
    assert [file.name for file in tmp_path.iterdir()] == ["model_1"]


def test_files_of_a_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    """The weights once, and the version that wrote them."""
    save_checkpoint(tmp_path / "model_1", *new_model(model_folder, max_seq_length=20))
    assert {file.name for file in (tmp_path / "model_1").iterdir()} == {
        *(WEIGHTS, "config.json", "semantic_index.json", "vocab.txt", "tokenizer_config.json", "manifest.json")
    }
    assert read_json(tmp_path / "model_1" / "semantic_index.json") == {
        **{"output_emb_size": 16, "pooling": "cls", "dropout": 0.1, "max_seq_length": 20},
        **{"query_prefix": "", "document_prefix": ""},
        "version": __version__,
    }


def test_a_checkpoint_is_replaced_as_a_whole(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    save_checkpoint(tmp_path / "model_best", model, tokenizer, lambda folder: write_json(folder / "state.json", {}))
    assert (tmp_path / "model_best" / "state.json").is_file()
    save_checkpoint(tmp_path / "model_best", model, tokenizer)
    assert not (tmp_path / "model_best" / "state.json").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model_best"]


def test_weights_that_are_not_finite_are_not_saved(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    model.emb_reduce_linear.bias.set_value(np.array([0.0] * 15 + [np.inf], np.float32))
    with pytest.raises(InputError, match=r"model_1: isn't written, since emb_reduce_linear.bias holds numbers that"):
        save_checkpoint(tmp_path / "model_1", model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_paddlenlp_reads_the_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    from paddlenlp.transformers import ErnieTokenizer

    save_checkpoint(tmp_path / "model_1", *new_model(model_folder, max_seq_length=24))
    texts = [text for pair in all_pairs()[:20] for text in pair]
    theirs = ErnieTokenizer.from_pretrained(str(tmp_path / "model_1"))
    expected = [theirs(text, max_length=24, truncation=True)["input_ids"] for text in texts]
    assert load_checkpoint(tmp_path / "model_1").tokenizer.tokenize(texts) == expected
    assert json.loads((tmp_path / "model_1" / "tokenizer_config.json").read_text())["do_lower_case"] is True


# ---------------------------------------------------------------------------------------------------------------------
# The fingerprint, and which files are hashed


def test_fingerprints_differ_with_any_weight_and_setting(checkpoint: Path) -> None:
    model, tokenizer, first, _ = load_checkpoint(checkpoint)
    assert first == load_checkpoint(checkpoint).fingerprint == model_fingerprint(model, tokenizer)
    config, model.config = model.config, replace(model.config, pooling="cls")
    assert first != model_fingerprint(model, tokenizer)
    model.config = config
    tokenizer.max_seq_length -= 1
    assert first != model_fingerprint(model, tokenizer)
    tokenizer.max_seq_length += 1
    assert first == model_fingerprint(model, tokenizer)
    bias = model.emb_reduce_linear.bias
    bias.set_value(bias + 1e-6)
    assert first != model_fingerprint(model, tokenizer)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are compared with a manifest by their SHA-256."""
    names: list[str] = []

    def spy(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr("common.manifest.sha256", spy)
    return names


def assert_weights_are_hashed_once(folder: Path, hashed: list[str]) -> None:
    """By their fingerprint alone."""
    hashed.clear()
    loaded = load_checkpoint(folder)
    assert loaded.fingerprint == read_json(folder / "manifest.json")["fingerprint"]
    assert hashed and WEIGHTS not in hashed


@pytest.mark.parametrize("model_type", ["ernie", "bert", "roberta"])
def test_weights_of_a_created_model_are_hashed_once(tmp_path: Path, hashed: list[str], model_type: str) -> None:
    """Saved after it was created, after it was loaded, and after another training started from it."""
    folder = make_model_folder(tmp_path / "ernie", model_type=model_type)
    for name, loaded in (
        ("created", lambda: new_model(folder)),
        ("loaded", lambda: load_checkpoint(tmp_path / "created")[:2]),
        ("started", lambda: create_model(SemanticIndexBatchNeg, init_from_ckpt=str(tmp_path / "created"))),
    ):
        save_checkpoint(tmp_path / name, *loaded())
        assert_weights_are_hashed_once(tmp_path / name, hashed)


def test_weights_of_a_training_are_hashed_once(
    model_folder: Path, recall_data: Path, tmp_path: Path, hashed: list[str]
) -> None:
    """Also if it was resumed."""
    options = train_options(model_folder, recall_data, tmp_path, "--max_steps", "4", "--save_steps", "2")
    assert train_batch_neg.main(options) == 0
    for step in (2, 4):
        assert_weights_are_hashed_once(tmp_path / f"model_{step}", hashed)
    shutil.rmtree(tmp_path / "model_4")
    assert train_batch_neg.main([*options, "--resume_from", "latest"]) == 0
    assert_weights_are_hashed_once(tmp_path / "model_4", hashed)


def test_another_length_than_the_checkpoints_hashes_its_weights_file(checkpoint: Path, hashed: list[str]) -> None:
    """The fingerprint covers the length, so it can't show that the weights are unchanged."""
    load_checkpoint(checkpoint, max_seq_length=20)
    assert hashed.count(WEIGHTS) == 1


def test_a_checkpoint_without_a_manifest_loads(checkpoint: Path, tmp_path: Path) -> None:
    """A user may change files on purpose."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / "manifest.json").unlink()
    assert load_checkpoint(folder).fingerprint == load_checkpoint(checkpoint).fingerprint


@pytest.mark.parametrize("max_seq_length", [None, 20])
def test_a_changed_weight_is_refused_by_name(checkpoint: Path, tmp_path: Path, max_seq_length: int | None) -> None:
    """By everything that starts from the checkpoint."""
    folder = shutil.copytree(checkpoint, tmp_path / "model_4")
    weights = read_weights(folder / WEIGHTS)
    weights["emb_reduce_linear.bias"][0] += 1e-3
    paddle.save(weights, str(folder / WEIGHTS))
    message = f"^{folder / WEIGHTS}: isn't as it was written .*; take another checkpoint"
    with pytest.raises(InputError, match=message):
        load_checkpoint(folder, max_seq_length=max_seq_length)
    with pytest.raises(InputError, match=message):
        create_model(SemanticIndexBase, init_from_ckpt=str(folder), max_seq_length=max_seq_length)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("output_emb_size", [0, 16])
def test_checkpoints_of_the_original_scripts_load(model_folder: Path, tmp_path: Path, output_emb_size: int) -> None:
    path, model = original_checkpoint(tmp_path / "model_40", model_folder, output_emb_size)
    loaded = load_checkpoint(path, model_name_or_path=str(model_folder), max_seq_length=30)
    assert loaded.model.config == ModelConfig(output_emb_size, "cls", 0.1, 64)
    assert loaded.tokenizer.max_seq_length == 30
    np.testing.assert_array_equal(loaded.model.embed(*loaded.tokenizer(TEXTS)), model.embed(*loaded.tokenizer(TEXTS)))


def test_checkpoints_of_the_original_scripts_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default model name: PaddleNLP holds the config of ernie-1.0 itself."""
    from paddlenlp.transformers import ErnieConfig, ErnieModel

    monkeypatch.setenv("PPNLP_HOME", str(tmp_path / "ppnlp"))  # a config of another layer count may be cached
    configs = ErnieConfig.pretrained_init_configuration
    monkeypatch.setitem(configs, "ernie-1.0", {**configs["ernie-1.0"], "num_hidden_layers": 1})  # saves 10 s
    folder = make_model_folder(tmp_path / "base")
    (folder / "model_40").mkdir()
    shutil.copy(folder / "vocab.txt", folder / "model_40")
    model = SemanticIndexBase(ErnieModel(ErnieConfig.from_pretrained("ernie-1.0")), ModelConfig(output_emb_size=256))
    paddle.save(model.state_dict(), str(folder / "model_40" / WEIGHTS))
    loaded = load_checkpoint(folder / "model_40", output_emb_size=256)
    assert (loaded.model.embedding_size, loaded.tokenizer.max_seq_length) == (256, 64)
    assert loaded.model.ptm.config.vocab_size == 18000  # more rows than the vocabulary has lines is no error


def test_another_embedding_size_than_the_checkpoints_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model_1", *new_model(model_folder))
    assert load_checkpoint(tmp_path / "model_1", output_emb_size=16).model.embedding_size == 16
    with pytest.raises(InputError, match=r"--output_emb_size 256: .* has 16"):
        load_checkpoint(tmp_path / "model_1", output_emb_size=256)


def test_a_length_above_the_position_table_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    assert tokenizer.max_seq_length == 40  # 512, limited to the table
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    assert load_checkpoint(tmp_path / "model_1", max_seq_length=40).tokenizer.max_seq_length == 40
    with pytest.raises(InputError, match=r"--max_seq_length 41: .* 40 rows"):
        load_checkpoint(tmp_path / "model_1", max_seq_length=41)
    with pytest.raises(InputError, match=r"--max_seq_length 41: .* 40 rows"):
        new_model(model_folder, max_seq_length=41)


def test_parameters_that_do_not_fit_are_named(model_folder: Path, tmp_path: Path) -> None:
    path, _ = original_checkpoint(tmp_path / "model_40", model_folder)
    weights = read_weights(path)
    del weights["ptm.pooler.dense.bias"]
    weights["ptm.pooler.dense.weight"] = np.zeros((3, 3), np.float32)
    weights["classifier.weight"] = np.zeros((2, 2), np.float32)
    paddle.save(weights, str(path))
    with pytest.raises(InputError) as error:
        load_checkpoint(path, model_name_or_path=str(model_folder))
    message = str(error.value)
    assert "1 missing: ptm.pooler.dense.bias" in message
    assert "1 wrong-shaped: ptm.pooler.dense.weight [3, 3] instead of [32, 32]" in message
    assert "1 unexpected: classifier.weight" in message


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_types_become_float32(model_folder: Path, tmp_path: Path, dtype: str) -> None:
    path, _ = original_checkpoint(tmp_path / "model_40", model_folder)
    expected = read_weights(path)
    paddle.save({name: paddle.to_tensor(array).astype(dtype) for name, array in expected.items()}, str(path))
    for name, parameter in load_checkpoint(path, model_name_or_path=str(model_folder)).model.state_dict().items():
        np.testing.assert_allclose(parameter.numpy(), expected[name], rtol=0.01, atol=1e-4, err_msg=name)


def test_unexpected_parameters_alone_are_reported(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = original_checkpoint(tmp_path / "model_40", model_folder)
    paddle.save({**read_weights(path), "classifier.weight": np.zeros((2, 2), np.float32)}, str(path))
    load_checkpoint(path, model_name_or_path=str(model_folder))
    assert "1 unexpected: classifier.weight" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["nothing", "a folder without weights", "another architecture", "no weights"])
def test_an_unusable_checkpoint_is_refused(model_folder: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "model_40"
    if content != "nothing":
        path.mkdir()
    if content == "another architecture":
        paddle.save({"conv.weight": np.zeros((2, 2), np.float32)}, str(path / WEIGHTS))
    if content == "no weights":
        (path / WEIGHTS).write_bytes(b"hello")
    with pytest.raises(InputError, match="model_40"):
        load_checkpoint(path, model_name_or_path=str(model_folder))


def test_a_checkpoint_whose_replacement_was_interrupted_loads(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / ".model.replaced")
    for name in ("model", f"model/{WEIGHTS}"):
        assert load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "changed", [{"pooling": "max"}, {"output_emb_size": "many"}, {"output_emb_size": None}, {"max_seq_length": 2}]
)
@pytest.mark.parametrize("has_manifest", [False, True])
def test_a_broken_model_config_is_refused(
    model_folder: Path, tmp_path: Path, changed: dict[str, object], has_manifest: bool
) -> None:
    save_checkpoint(tmp_path / "model_1", *new_model(model_folder))
    file = tmp_path / "model_1" / "semantic_index.json"
    write_json(file, {**read_json(file), **changed})
    if not has_manifest:
        (tmp_path / "model_1" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"semantic_index\.json"):
        load_checkpoint(tmp_path / "model_1")


# ---------------------------------------------------------------------------------------------------------------------
# Starting a training


def test_a_new_model_is_in_training_mode(model_folder: Path) -> None:
    """All of it: the backbone has dropout too."""
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder), dropout=0.0)
    assert all(layer.training for layer in model.sublayers(include_self=True))
    ids = paddle.to_tensor([[1, 5, 6, 7, 2]])
    first, second = (model.get_pooled_embedding(ids, paddle.zeros_like(ids)).numpy() for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_random_weights_only_on_request(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--from_scratch"):
        create_model(SemanticIndexBase, model_name_or_path=str(model_folder))
    with pytest.raises(InputError, match="is no folder here"):
        create_model(SemanticIndexBase, from_scratch=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        create_model(SemanticIndexBase, from_scratch=str(tmp_path / "empty"))


def test_init_from_ckpt_takes_the_parameters_that_fit(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = new_model(model_folder, output_emb_size=0)
    save_checkpoint(tmp_path / "simcse", model, tokenizer)
    set_seed(2)
    started, _ = create_model(SemanticIndexBase, init_from_ckpt=str(tmp_path / "simcse"), output_emb_size=8)
    assert "2 missing: emb_reduce_linear.weight, emb_reduce_linear.bias" in capsys.readouterr().err
    for name, value in model.ptm.state_dict().items():
        np.testing.assert_array_equal(started.ptm.state_dict()[name].numpy(), value.numpy())


def test_init_from_ckpt_never_leaves_the_backbone_random(model_folder: Path, tmp_path: Path) -> None:
    path, _ = original_checkpoint(tmp_path / "model_40", model_folder)
    weights = {name: value for name, value in read_weights(path).items() if "layers.1" not in name}
    paddle.save(weights, str(path))
    with pytest.raises(InputError, match=r"missing: ptm\.encoder\.layers\.1"):
        create_model(SemanticIndexBase, model_name_or_path=str(model_folder), init_from_ckpt=str(path))


@pytest.mark.parametrize("changed", [{"vocab_size": 5}, {"pad_token_id": 7}])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"vocab\.txt"):
        create_model(SemanticIndexBase, from_scratch=str(make_model_folder(tmp_path / "model", **changed)))
