"""The fast layers of training on a CPU give what Paddle's own layers give."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from batch_negative.model import SemanticIndexBatchNeg
from common.device import set_seed
from modeling.checkpoint import create_model
from modeling.cpu_training_layers import CpuDropout, CpuLayerNorm, CpuLinear, CpuMultiHeadAttention, speed_up_training

Results = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


def passes(layer: nn.Layer, x: np.ndarray, *arguments: object) -> Results:
    """The output, and the gradients of x and of the parameters, of a random linear function of the output."""
    layer.clear_gradients()
    tensor = paddle.to_tensor(x, stop_gradient=False)
    output = layer(tensor, *arguments)
    weights = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    (output * paddle.to_tensor(weights)).sum().backward()
    return output.numpy(), tensor.grad.numpy(), {name: p.grad.numpy() for name, p in layer.named_parameters()}


def assert_same(fast: Results, plain: Results) -> None:
    np.testing.assert_allclose(fast[0], plain[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(fast[1], plain[1], rtol=1e-5, atol=1e-5)
    assert fast[2].keys() == plain[2].keys()
    for name, value in plain[2].items():
        np.testing.assert_allclose(fast[2][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def random_parameters(layer: nn.Layer) -> nn.Layer:
    """Gives the parameters values far from those that they start with."""
    for parameter in layer.parameters():
        parameter.set_value(paddle.randn(parameter.shape) + 0.5)
    return layer


@pytest.mark.parametrize("shape", [(7, 16), (3, 5, 16), (2, 3, 5, 16)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 6), lambda: nn.LayerNorm(16, epsilon=1e-3)])
def test_linear_and_layer_norm(make: Callable[[], nn.Layer], shape: tuple[int, ...]) -> None:
    set_seed(2)
    model = nn.Sequential(random_parameters(make()))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 2 + 3
    plain = passes(model, x)
    speed_up_training(model)
    assert type(model[0]) in (CpuLinear, CpuLayerNorm)
    assert_same(passes(model, x), plain)


def test_layer_norm_of_rows_without_variance() -> None:
    set_seed(2)
    model = nn.Sequential(random_parameters(nn.LayerNorm(16)))
    x = np.repeat(np.float32([[0], [4], [-0.25]]), 16, axis=1)
    plain = passes(model, x)
    speed_up_training(model)
    fast = passes(model, x)
    assert np.isfinite(fast[1]).all()
    np.testing.assert_allclose(fast[1], plain[1], rtol=1e-4)


def test_layer_norm_of_transposed_rows() -> None:
    """A view whose elements don't lie in order."""
    model = nn.Sequential(random_parameters(nn.LayerNorm(16)))
    model.forward = lambda x: model[0](x.transpose([1, 0])).transpose([1, 0])
    x = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    plain = passes(model, x)
    speed_up_training(model)
    assert_same(passes(model, x), plain)


def test_dropout_drops_its_share_and_scales_the_rest() -> None:
    model = nn.Sequential(nn.Dropout(0.1))
    speed_up_training(model)
    assert type(model[0]) is CpuDropout
    set_seed(5)
    x = np.ones((501, 401), np.float32)
    output, gradient, _ = passes(model, x)
    values, counts = np.unique(output, return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.9], rtol=1e-4)
    assert counts[0] / x.size == pytest.approx(0.1, abs=0.003)  # four standard deviations
    kept = output > 0
    for axis in (0, 1):  # no row or column is favoured
        assert abs(kept.mean(axis) - 0.9).max() < 0.1
    weights = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    np.testing.assert_allclose(gradient, weights * output, rtol=1e-6)

    set_seed(5)
    np.testing.assert_array_equal(passes(model, x)[0], output)
    assert (passes(model, x)[0] != output).any()
    model.eval()
    np.testing.assert_array_equal(passes(model, x)[0], x)


@pytest.mark.parametrize("share", [0.0, 1 - 1e-9, 1.0])
def test_dropout_of_nothing_and_of_all(share: float) -> None:
    set_seed(5)
    model = nn.Sequential(nn.Dropout(share))
    speed_up_training(model)
    assert type(model[0]) is CpuDropout
    x = np.ones((3, 5), np.float32)
    np.testing.assert_allclose(passes(model, x)[0], x * (1 - share), atol=1e-8)


def test_attention() -> None:
    set_seed(2)
    attention = nn.MultiHeadAttention(16, 2)
    x = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    mask = paddle.zeros([3, 1, 1, 5])
    mask[1, :, :, 3:] = -1e4
    own = nn.Sequential(attention)
    own.forward = lambda x: attention(x, x, x, mask)
    plain = passes(own, x), passes(attention, x)
    speed_up_training(own)
    assert type(attention) is CpuMultiHeadAttention
    assert_same(passes(own, x), plain[0])
    real = paddle.ones([3, 1, 1, 5], dtype=bool)
    real[1, :, :, 3:] = False
    tensor = paddle.to_tensor(x)
    np.testing.assert_allclose(attention(tensor, tensor, tensor, real).numpy(), plain[0][0], atol=1e-5)
    assert_same(passes(attention, x), plain[1])
    attention.need_weights = True
    output, weights = attention(paddle.to_tensor(x), None, None, mask)
    np.testing.assert_allclose(output.numpy(), plain[0][0], atol=1e-5)
    assert weights.shape == [3, 2, 5, 5]


def test_attention_drops_weights() -> None:
    attention = nn.MultiHeadAttention(16, 2, dropout=0.5)
    speed_up_training(nn.LayerList([attention]))
    x, mask = paddle.randn([1, 4, 16]), paddle.zeros([1, 1, 1, 4])
    first, second = (attention(x, x, x, mask).numpy() for _ in range(2))
    assert (first != second).any()
    attention.eval()
    first, second = (attention(x, x, x, mask).numpy() for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_all_layers_of_the_encoder_are_fast(model_folder: Path) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    names = [name for name, _ in model.named_parameters()]
    speed_up_training(model)
    types = [type(layer) for layer in model.sublayers()]
    assert types.count(CpuLinear) == 2 * 6 + 2  # two layers of ERNIE, its pooler and the reduction
    assert types.count(CpuLayerNorm) == 2 * 2 + 1
    assert types.count(CpuDropout) == 2 * 3 + 2
    assert types.count(CpuMultiHeadAttention) == 2
    assert not {nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiHeadAttention} & set(types)
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(16, 6, bias_attr=False),
        lambda: nn.LayerNorm([5, 16]),
        lambda: nn.LayerNorm(16, weight_attr=False, bias_attr=False),
        lambda: nn.Dropout(0.3, axis=0),
        lambda: nn.Dropout(0.3, mode="downscale_in_infer"),
    ],
)
def test_other_kinds_of_layers_are_left_as_they_are(make: Callable[[], nn.Layer]) -> None:
    model = nn.Sequential(random_parameters(make()))
    x = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    results = []
    for _ in range(2):
        set_seed(2)
        results.append(passes(model, x))
        speed_up_training(model)
    assert_same(results[1], results[0])
