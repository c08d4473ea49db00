"""Both ways to a batch's gradient, on a layer without a tower around it; test_trainer.py compares them on the model."""

from collections.abc import Callable

import numpy as np
import paddle
import pytest

from batch_negative.gradient_cache import cached_backward, direct_backward

SIZES = (4, 1, 3)  # rows of each chunk


class Encoder:
    """Encodes chunks with dropout that a second pass repeats, and notes how each was encoded."""

    def __init__(self) -> None:
        rows = np.random.default_rng(0).standard_normal((sum(SIZES), 5)).astype("float32")
        self.chunks = [paddle.to_tensor(chunk) for chunk in np.split(rows, np.cumsum(SIZES)[:-1])]
        paddle.seed(1)
        self.layer = paddle.nn.Linear(5, 2)
        self.calls: list[tuple[int, bool]] = []  # (chunk, whether it kept its activations)

    def __call__(self, chunk: int) -> paddle.Tensor:
        self.calls.append((chunk, paddle.is_grad_enabled()))
        paddle.seed(chunk)
        return paddle.nn.functional.dropout(self.layer(self.chunks[chunk]), 0.5)


def loss_of(vectors: paddle.Tensor) -> paddle.Tensor:
    """A loss of all rows together."""
    return paddle.logsumexp(paddle.matmul(vectors, vectors, transpose_y=True))


def gradients(backward: Callable[..., paddle.Tensor], factor: float = 1.0) -> tuple[Encoder, float, list[np.ndarray]]:
    """The encoder after a pass, the loss, and the gradients of the layer's parameters."""
    encoder = Encoder()
    loss = backward(encode=encoder, chunks=len(SIZES), loss_of=loss_of, factor=factor)
    assert loss.stop_gradient  # so that it holds no activations
    return encoder, float(loss), [parameter.grad.numpy() for parameter in encoder.layer.parameters()]


def test_both_ways_give_the_same_loss_and_gradients() -> None:
    _, loss, direct = gradients(direct_backward)
    _, cached_loss, cached = gradients(cached_backward)
    assert cached_loss == pytest.approx(loss)
    for ours, theirs in zip(cached, direct, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert np.abs(theirs).max() > 0.1


def test_the_cache_keeps_the_activations_of_one_chunk() -> None:
    encoder, _, _ = gradients(direct_backward)
    assert encoder.calls == [(0, True), (1, True), (2, True)]
    encoder, _, _ = gradients(cached_backward)
    assert encoder.calls == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]


@pytest.mark.parametrize("backward", [direct_backward, cached_backward])
def test_the_factor_scales_the_gradients_but_not_the_loss(backward: Callable[..., paddle.Tensor]) -> None:
    _, loss, whole = gradients(backward)
    _, scaled_loss, scaled = gradients(backward, 0.25)
    assert scaled_loss == loss
    for ours, theirs in zip(scaled, whole, strict=True):
        np.testing.assert_allclose(ours, 0.25 * theirs, rtol=1e-5)


@pytest.mark.parametrize("backward", [direct_backward, cached_backward])
def test_gradients_are_added_to_those_already_there(backward: Callable[..., paddle.Tensor]) -> None:
    encoder, _, _ = gradients(backward)
    once = [parameter.grad.numpy().copy() for parameter in encoder.layer.parameters()]
    backward(encode=encoder, chunks=len(SIZES), loss_of=loss_of, factor=1.0)
    for parameter, first in zip(encoder.layer.parameters(), once, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), 2 * first, rtol=1e-5)
