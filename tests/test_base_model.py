"""The model's vectors, their gradients, and the last layer that computes [CLS] only."""

from itertools import product
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from base_model import ClsOnlyLayer, use_cls_only_last_layer
from common.device import set_seed
from common.options import POOLINGS
from helpers import assert_close, new_model
from modeling.cpu_training_layers import speed_up_training

UNUSED = {"cls": [], "first_token": ["ptm.pooler.dense.weight", "ptm.pooler.dense.bias"]}  # without a gradient
TEXTS = ["水稻的产量", "桥", "论糖尿病影响因素研究糖尿病,影响因素", "a" * 200, ""]


@pytest.mark.parametrize("output_emb_size", [0, 16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_follow_their_definition(still_model_folder: Path, pooling: str, output_emb_size: int) -> None:
    model, tokenizer = new_model(still_model_folder, pooling=pooling, output_emb_size=output_emb_size, dropout=0.0)
    model.eval()
    for text in TEXTS:
        input_ids, token_type_ids = map(paddle.to_tensor, tokenizer([text]))
        sequence, pooled = model.ptm(input_ids, token_type_ids)
        rows = {"cls": pooled, "first_token": sequence[:, 0], "mean": sequence.mean(axis=1)}[pooling]
        vector = rows[0].numpy()
        if output_emb_size:
            vector = vector @ model.emb_reduce_linear.weight.numpy() + model.emb_reduce_linear.bias.numpy()
        vector /= np.linalg.norm(vector)
        assert len(vector) == model.embedding_size
        np.testing.assert_allclose(model.embed(*tokenizer([text]))[0], vector, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_does_not_change_a_vector(model_folder: Path, pooling: str) -> None:
    model, tokenizer = new_model(model_folder, pooling=pooling, max_seq_length=32)
    alone = np.concatenate([model.embed(*tokenizer([text])) for text in TEXTS])
    together = model.embed(*tokenizer(TEXTS))
    tokenizer.pad_to_max_seq_len = True
    padded = model.embed(*tokenizer(TEXTS))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(padded, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


def test_embed_keeps_the_training_mode(model_folder: Path) -> None:
    model, tokenizer = new_model(model_folder)
    first, second = (model.embed(*tokenizer(TEXTS)) for _ in range(2))
    assert model.training and model.ptm.training
    np.testing.assert_array_equal(first, second)  # no dropout


# ---------------------------------------------------------------------------------------------------------------------
# The last layer


@pytest.mark.parametrize("pooling", ["cls", "first_token"])
@pytest.mark.parametrize("fast_layers", [False, True])
def test_cls_only_layer_gives_the_same_vectors_and_gradients(
    still_model_folder: Path, fast_layers: bool, pooling: str
) -> None:
    """As a last layer that computes all tokens."""

    def vectors_and_gradients(all_tokens: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        model, tokenizer = new_model(still_model_folder, dropout=0.0, pooling=pooling)
        if all_tokens:
            model.ptm.encoder.layers[-1].__class__ = nn.TransformerEncoderLayer
        if fast_layers:
            speed_up_training(model)
        input_ids, token_type_ids = map(paddle.to_tensor, tokenizer(TEXTS))
        length = model.ptm(input_ids, token_type_ids)[0].shape[1]
        assert length == (input_ids.shape[1] if all_tokens else 1)
        vectors = model.get_pooled_embedding(input_ids, token_type_ids)
        vectors.multiply(paddle.linspace(0, 1, vectors.size).reshape(vectors.shape)).sum().backward()
        gradients = {name: value.grad for name, value in model.named_parameters()}
        assert [name for name, value in gradients.items() if value is None] == UNUSED[pooling]
        return vectors.numpy(), {name: value.numpy() for name, value in gradients.items() if value is not None}

    vectors, gradients = vectors_and_gradients(all_tokens=False)
    expected_vectors, expected_gradients = vectors_and_gradients(all_tokens=True)
    np.testing.assert_allclose(vectors, expected_vectors, rtol=0, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert_close(gradients[name], expected, name)


@pytest.mark.parametrize("name", ["dropout", "dropout1", "dropout2"])
def test_cls_only_layer_has_the_same_dropout_as_paddles(name: str) -> None:
    set_seed(2)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    x, mask = paddle.randn([3, 5, 16]), paddle.zeros([3, 1, 1, 5])
    everything = layer(x, mask)[:, :1].numpy()
    getattr(layer, name).p = 1.0
    expected = layer(x, mask)[:, :1].numpy()
    assert np.abs(everything - expected).max() > 0.01
    layer.__class__ = ClsOnlyLayer
    np.testing.assert_allclose(layer(x, mask).numpy(), expected, atol=1e-5)


def test_all_tokens_are_computed_for_mean_pooling_and_by_other_layers_than_berts(still_model_folder: Path) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# The linear reduction


def test_initial_weights_of_the_reduction(model_folder: Path) -> None:
    """Normal for the pooled output, orthogonal for the others."""

    def reduction(pooling: str, size: int) -> np.ndarray:
        return new_model(model_folder, pooling=pooling, output_emb_size=size).model.emb_reduce_linear.weight.numpy()

    assert reduction("cls", 512).std() == pytest.approx(0.02, rel=0.05)
    hidden_size = len(reduction("mean", 1))
    for size, pooling in product((hidden_size // 2, hidden_size, 2 * hidden_size), ("mean", "first_token")):
        weight = reduction(pooling, size)
        products = weight.T @ weight if size <= hidden_size else weight @ weight.T
        np.testing.assert_allclose(products, np.eye(min(size, hidden_size)), atol=1e-5)
