"""The model's vectors, and every way into and out of a checkpoint."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.base import core
from paddlenlp.transformers import ErnieModel
from paddlenlp.transformers.ernie.modeling import ErnieModel as ErnieBackbone

from base_model import ClsOnlyLayer, ModelConfig, SemanticIndexBase, use_cls_only_last_layer
from batch_negative.model import SemanticIndexBatchNeg
from common.device import set_device, set_seed
from common.errors import InputError
from common.files import read_json, write_json
from data import TextTokenizer
from helpers import all_pairs, assert_close, make_model_folder
from modeling.checkpoint import create_model, load_checkpoint, save_checkpoint
from modeling.cpu_training_layers import speed_up_training
from modeling.weight_files import read_weights

TEXTS = ["水稻的产量", "桥", "论糖尿病影响因素研究糖尿病,影响因素", "a" * 200, ""]


def new_model(folder: Path, **options: object):
    set_seed(1)
    return create_model(SemanticIndexBase, from_scratch=str(folder), **{"output_emb_size": 16, **options})


def original_checkpoint(folder: Path, model_folder: Path, output_emb_size: int = 16) -> tuple[Path, SemanticIndexBase]:
    """What the original scripts write: weights, a vocabulary and a tokenizer config, but no model config."""
    model, tokenizer = new_model(model_folder, output_emb_size=output_emb_size)
    folder.mkdir(parents=True)
    paddle.save(model.state_dict(), str(folder / "model_state.pdparams"))
    tokenizer.save(folder)
    return folder / "model_state.pdparams", model


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


@pytest.mark.parametrize("output_emb_size", [0, 16])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_follow_their_definition(still_model_folder: Path, pooling: str, output_emb_size: int) -> None:
    model, tokenizer = new_model(still_model_folder, pooling=pooling, output_emb_size=output_emb_size, dropout=0.0)
    model.eval()
    for text in TEXTS:
        input_ids, token_type_ids = map(paddle.to_tensor, tokenizer([text]))
        sequence, pooled = model.ptm(input_ids, token_type_ids)
        vector = sequence[0].mean(axis=0).numpy() if pooling == "mean" else pooled[0].numpy()
        if output_emb_size:
            vector = vector @ model.emb_reduce_linear.weight.numpy() + model.emb_reduce_linear.bias.numpy()
        vector /= np.linalg.norm(vector)
        assert len(vector) == model.embedding_size
        np.testing.assert_allclose(model.embed(*tokenizer([text]))[0], vector, atol=1e-6)


@pytest.mark.parametrize("fast_layers", [False, True])
def test_the_last_layer_computes_the_first_token_alone(still_model_folder: Path, fast_layers: bool) -> None:
    """With the vectors and gradients of a last layer that computes all tokens."""

    def vectors_and_gradients(all_tokens: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        model, tokenizer = new_model(still_model_folder, dropout=0.0)
        if all_tokens:
            model.ptm.encoder.layers[-1].__class__ = nn.TransformerEncoderLayer
        if fast_layers:
            speed_up_training(model)
        input_ids, token_type_ids = map(paddle.to_tensor, tokenizer(TEXTS))
        length = model.ptm(input_ids, token_type_ids)[0].shape[1]
        assert length == (input_ids.shape[1] if all_tokens else 1)
        vectors = model.get_pooled_embedding(input_ids, token_type_ids)
        vectors.multiply(paddle.linspace(0, 1, vectors.size).reshape(vectors.shape)).sum().backward()
        return vectors.numpy(), {name: value.grad.numpy() for name, value in model.named_parameters()}

    vectors, gradients = vectors_and_gradients(all_tokens=False)
    expected_vectors, expected_gradients = vectors_and_gradients(all_tokens=True)
    np.testing.assert_allclose(vectors, expected_vectors, rtol=0, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert_close(gradients[name], expected, name)


def test_where_all_tokens_are_computed(still_model_folder: Path) -> None:
    """For their mean, and by layers that aren't BERT's."""
    model, _ = new_model(still_model_folder, pooling="mean")
    last = model.ptm.encoder.layers[-1]
    assert type(last) is nn.TransformerEncoderLayer
    last.normalize_before = True
    use_cls_only_last_layer(model.ptm)
    assert type(last) is nn.TransformerEncoderLayer
    last.normalize_before = False
    use_cls_only_last_layer(model.ptm)
    assert type(last) is ClsOnlyLayer
    use_cls_only_last_layer(nn.Linear(2, 2))


def test_where_the_reduction_starts(model_folder: Path) -> None:
    def reduction(pooling: str, size: int) -> np.ndarray:
        return new_model(model_folder, pooling=pooling, output_emb_size=size)[0].emb_reduce_linear.weight.numpy()

    assert reduction("cls", 512).std() == pytest.approx(0.02, rel=0.05)
    hidden_size = len(reduction("mean", 1))
    for size in (hidden_size // 2, hidden_size, 2 * hidden_size):
        weight = reduction("mean", size)
        product = weight.T @ weight if size <= hidden_size else weight @ weight.T
        np.testing.assert_allclose(product, np.eye(min(size, hidden_size)), atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_text_has_one_vector_whatever_the_padding(model_folder: Path, pooling: str) -> None:
    model, tokenizer = new_model(model_folder, pooling=pooling, max_seq_length=32)
    alone = np.concatenate([model.embed(*tokenizer([text])) for text in TEXTS])
    together = model.embed(*tokenizer(TEXTS))
    tokenizer.pad_to_max_seq_len = True
    padded = model.embed(*tokenizer(TEXTS))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(padded, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


def test_embed_leaves_the_mode_as_it_was(model_folder: Path) -> None:
    model, tokenizer = new_model(model_folder)
    first, second = (model.embed(*tokenizer(TEXTS)) for _ in range(2))
    assert model.training and model.ptm.training
    np.testing.assert_array_equal(first, second)  # no dropout


def test_padding_is_looked_at_in_float32(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 would round to more than the effect that is looked for, in a large model on a GPU."""
    switched: list[bool] = []
    monkeypatch.setattr(core, "get_cublas_switch", lambda: True)
    monkeypatch.setattr(core, "set_cublas_switch", switched.append)
    new_model(model_folder)
    assert switched == [False, True]


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2"])
def test_the_last_layer_drops_what_paddles_does(name: str) -> None:
    set_seed(2)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    x, mask = paddle.randn([3, 5, 16]), paddle.zeros([3, 1, 1, 5])
    everything = layer(x, mask)[:, :1].numpy()
    getattr(layer, name).p = 1.0
    expected = layer(x, mask)[:, :1].numpy()
    assert np.abs(everything - expected).max() > 0.01
    layer.__class__ = ClsOnlyLayer
    np.testing.assert_allclose(layer(x, mask).numpy(), expected, atol=1e-5)


def test_cosine_sim(model_folder: Path) -> None:
    model, tokenizer = new_model(model_folder)
    model.eval()
    queries, titles = tokenizer(TEXTS[:2]), tokenizer(TEXTS[2:4])
    cosines = model.cosine_sim(*map(paddle.to_tensor, (*queries, *titles))).numpy()
    np.testing.assert_allclose(cosines, (model.embed(*queries) * model.embed(*titles)).sum(axis=1), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("as_file", [False, True])
def test_a_checkpoint_says_everything_about_itself(model_folder: Path, tmp_path: Path, as_file: bool) -> None:
    model, tokenizer = new_model(model_folder, pooling="mean", max_seq_length=20, dropout=0.3)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    path = tmp_path / "model_1" / "model_state.pdparams" if as_file else tmp_path / "model_1"
    loaded, loaded_collator = load_checkpoint(path)
    assert loaded.config == ModelConfig(16, "mean", 0.3, 20)
    assert not loaded.training
    assert loaded_collator.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)
    np.testing.assert_array_equal(loaded.embed(*loaded_collator(TEXTS)), model.embed(*tokenizer(TEXTS)))
    assert [file.name for file in tmp_path.iterdir()] == ["model_1"]


def test_a_checkpoint_is_replaced_as_a_whole(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    save_checkpoint(tmp_path / "model_best", model, tokenizer, notes={"train_result.txt": "old"})
    save_checkpoint(tmp_path / "model_best", model, tokenizer)
    assert not (tmp_path / "model_best" / "train_result.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model_best"]


@pytest.mark.parametrize("output_emb_size", [0, 16])
def test_the_originals_checkpoints_load(model_folder: Path, tmp_path: Path, output_emb_size: int) -> None:
    path, model = original_checkpoint(tmp_path / "model_40", model_folder, output_emb_size)
    loaded, tokenizer = load_checkpoint(path, model_name_or_path=str(model_folder), max_seq_length=30)
    assert loaded.config == ModelConfig(output_emb_size, "cls", 0.1, 64)
    assert tokenizer.max_seq_length == 30
    np.testing.assert_array_equal(loaded.embed(*tokenizer(TEXTS)), model.embed(*tokenizer(TEXTS)))


def test_the_originals_checkpoints_need_no_network(tmp_path: Path) -> None:
    """With the default model name: PaddleNLP holds the config of ernie-1.0 itself."""
    from paddlenlp.transformers import ErnieConfig

    config = ErnieConfig.from_pretrained("ernie-1.0")
    config.num_hidden_layers = 12
    folder = make_model_folder(tmp_path / "base")
    (folder / "model_40").mkdir()
    shutil.copy(folder / "vocab.txt", folder / "model_40")
    model = SemanticIndexBase(ErnieModel(config), ModelConfig(output_emb_size=256))
    paddle.save(model.state_dict(), str(folder / "model_40" / "model_state.pdparams"))
    loaded, tokenizer = load_checkpoint(folder / "model_40", output_emb_size=256)
    assert (loaded.embedding_size, tokenizer.max_seq_length) == (256, 64)
    assert loaded.ptm.config.vocab_size == 18000  # more rows than the vocabulary has lines is no error


def test_a_contradicting_embedding_size_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    assert load_checkpoint(tmp_path / "model_1", output_emb_size=16).model.embedding_size == 16
    with pytest.raises(InputError, match=r"--output_emb_size 256: .* has 16"):
        load_checkpoint(tmp_path / "model_1", output_emb_size=256)


def test_more_than_the_position_table_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    assert tokenizer.max_seq_length == 40  # 512, cut to the table
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


def test_unexpected_parameters_alone_are_reported(model_folder: Path, tmp_path: Path, capsys) -> None:
    path, _ = original_checkpoint(tmp_path / "model_40", model_folder)
    paddle.save({**read_weights(path), "classifier.weight": np.zeros((2, 2), np.float32)}, str(path))
    load_checkpoint(path, model_name_or_path=str(model_folder))
    assert "1 unexpected: classifier.weight" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["nothing", "a folder without weights", "another architecture", "no weights"])
def test_what_is_no_checkpoint_is_refused(model_folder: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "model_40"
    if content != "nothing":
        path.mkdir()
    if content == "another architecture":
        paddle.save({"conv.weight": np.zeros((2, 2), np.float32)}, str(path / "model_state.pdparams"))
    if content == "no weights":
        (path / "model_state.pdparams").write_bytes(b"hello")
    with pytest.raises(InputError, match="model_40"):
        load_checkpoint(path, model_name_or_path=str(model_folder))


def test_a_file_in_a_folder_whose_replacement_was_cut_short_is_found(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / ".model.replaced")
    for name in ("model", "model/model_state.pdparams"):
        assert load_checkpoint(tmp_path / name)


def test_weights_that_are_no_numbers_are_not_saved(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = new_model(model_folder)
    model.emb_reduce_linear.bias.set_value(np.array([0.0] * 15 + [np.inf], np.float32))
    with pytest.raises(InputError, match=r"model_1: isn't written, since emb_reduce_linear.bias holds numbers that"):
        save_checkpoint(tmp_path / "model_1", model, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["", "model_40", "model_40/model_state.pdparams"])
def test_where_there_are_other_checkpoints_the_newest_is_named(model_folder: Path, tmp_path: Path, place: str) -> None:
    for name in ("model_9", "model_10", "model_best"):
        save_checkpoint(tmp_path / name, *new_model(model_folder))
    with pytest.raises(InputError, match=f"; the newest in {tmp_path} is model_10$"):
        load_checkpoint(tmp_path / place)


@pytest.mark.parametrize("changed", [{"pooling": "max"}, {"output_emb_size": "many"}, {"output_emb_size": None}])
def test_a_broken_model_config_is_refused(model_folder: Path, tmp_path: Path, changed: dict) -> None:
    model, tokenizer = new_model(model_folder)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    file = tmp_path / "model_1" / "semantic_index.json"
    write_json(file, {**read_json(file), **changed})
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
    with pytest.raises(InputError, match="no such folder"):
        create_model(SemanticIndexBase, from_scratch=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        create_model(SemanticIndexBase, from_scratch=str(tmp_path / "empty"))


@pytest.mark.parametrize("prefix", ["", "ernie."])
def test_a_pretrained_folder(model_folder: Path, tmp_path: Path, prefix: str, capsys) -> None:
    """As PaddleNLP saves a plain model, or one with a head whose weights are of no use here."""
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


def test_a_model_by_name_is_downloaded_and_read_safely(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaddleNLP's list points the name at a file of this machine; what a download gives is read as any other file."""
    backbone = new_model(model_folder).model.ptm
    file = tmp_path / "ernie_v1_chn_base.pdparams"
    paddle.save({f"ernie.{name}": value for name, value in backbone.state_dict().items()}, str(file))
    config = read_json(model_folder / "config.json")
    monkeypatch.setitem(ErnieBackbone.config_class.pretrained_init_configuration, "ernie-1.0", config)
    monkeypatch.setattr("backbone.resolve_file_path", lambda name, files: str(file))

    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            shutil.copy(model_folder / "vocab.txt", folder)

    monkeypatch.setattr("backbone.AutoTokenizer.from_pretrained", lambda name: Tokenizer())
    model, _ = create_model(SemanticIndexBase)
    for name, value in backbone.state_dict().items():
        np.testing.assert_array_equal(model.ptm.state_dict()[name].numpy(), value.numpy())
    file.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(InputError, match=r"os\.system|posix\.system"):
        create_model(SemanticIndexBase)


def test_a_name_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbone.resolve_file_path", lambda name, files: None)
    with pytest.raises(InputError, match=r"no-such-model: .* give a local folder"):
        create_model(SemanticIndexBase, model_name_or_path="no-such-model")


def test_init_from_ckpt_takes_what_fits(model_folder: Path, tmp_path: Path, capsys) -> None:
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


@pytest.mark.parametrize("architecture", ["Electra", "DistilBert", "deberta", "no-such"])
def test_other_encoders_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    folder = make_model_folder(
        tmp_path / "model", architectures=[f"{architecture}Model"], model_type=architecture.lower()
    )
    with pytest.raises(InputError, match=architecture):
        create_model(SemanticIndexBase, from_scratch=str(folder))


@pytest.mark.parametrize("architecture", ["Albert", "FNet"])
def test_an_encoder_that_does_not_mask_padding_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    folder = make_model_folder(tmp_path / "model", model_type=architecture.lower(), embedding_size=32)
    with pytest.raises(InputError, match=f"{architecture}Model doesn't mask padding"):
        create_model(SemanticIndexBase, from_scratch=str(folder))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_robertas_longest_text_has_fewer_tokens_than_its_position_table_rows(tmp_path: Path, pooling: str) -> None:
    """Its positions start after the padding's."""
    folder = make_model_folder(tmp_path / "model", model_type="roberta")
    model, tokenizer = new_model(folder, pooling=pooling)
    assert tokenizer.max_seq_length == 39
    alone, padded = model.embed(*tokenizer(TEXTS[:1])), model.embed(*tokenizer([TEXTS[0], TEXTS[2] * 10]))
    np.testing.assert_allclose(padded[:1], alone, atol=1e-6)
    with pytest.raises(InputError, match=r"--max_seq_length 40: .* 39 rows"):
        new_model(folder, max_seq_length=40)


@pytest.mark.parametrize("value", [None, "x", -1, 1.5, []])
@pytest.mark.parametrize("key", ["max_position_embeddings", "vocab_size", "pad_token_id"])
def test_a_number_of_the_config_that_is_none_is_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"{tmp_path}/model: .*{key}.*{re.escape(repr(value))}"):
        create_model(SemanticIndexBase, from_scratch=str(make_model_folder(tmp_path / "model", **{key: value})))


def test_bert_is_an_encoder_as_well(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", architectures=["BertModel"], model_type="bert")
    model, tokenizer = create_model(SemanticIndexBase, from_scratch=str(folder), output_emb_size=16)
    save_checkpoint(tmp_path / "model_1", model, tokenizer)
    loaded, _ = load_checkpoint(tmp_path / "model_1")
    np.testing.assert_array_equal(loaded.embed(*tokenizer(TEXTS)), model.embed(*tokenizer(TEXTS)))


@pytest.mark.parametrize("changed", [{"vocab_size": 5}, {"pad_token_id": 7}])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, changed: dict) -> None:
    with pytest.raises(InputError, match=r"vocab\.txt"):
        create_model(SemanticIndexBase, from_scratch=str(make_model_folder(tmp_path / "model", **changed)))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "ernie", "hidden_size": "x"}', '{"architectures": 3}'])
def test_a_broken_config_is_one_line(tmp_path: Path, content: str) -> None:
    folder = make_model_folder(tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError) as error:
        create_model(SemanticIndexBase, from_scratch=str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_no_gpu_names_the_cpu() -> None:
    with pytest.raises(InputError, match="use --device cpu"):
        set_device("gpu")


def test_the_saved_tokenizer_is_paddlenlps_too(model_folder: Path, tmp_path: Path) -> None:
    from paddlenlp.transformers import ErnieTokenizer

    TextTokenizer.load(model_folder, 24).save(tmp_path)
    texts = [text for pair in all_pairs()[:20] for text in pair]
    theirs = ErnieTokenizer.from_pretrained(str(tmp_path))
    expected = [theirs(text, max_seq_len=24)["input_ids"] for text in texts]
    assert TextTokenizer.load(tmp_path, 24).tokenize(texts) == expected
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["do_lower_case"] is True
