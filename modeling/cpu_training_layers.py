"""Faster float32 versions of Paddle's layers for training on a CPU; docs/benchmarks.md has the figures.

Paddle computes the gradients of biases and of layer norm element by element in one thread, and draws dropout masks with
a slow generator. These layers use matrix products on all threads instead, and NumPy for the rest.
"""

from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

BLOCK_ELEMENTS = 1 << 17  # of rows that are computed together: several such blocks fit into a core's cache


def as_array(tensor: paddle.Tensor) -> np.ndarray:
    """The tensor's memory as a read-only array, without a copy."""
    return np.from_dlpack(tensor.detach())


def as_tensor(array: np.ndarray) -> paddle.Tensor:
    """The array's memory as a tensor, without a copy."""
    return paddle.from_dlpack(array)


def _row_sum(rows: paddle.Tensor) -> paddle.Tensor:
    """The sum [C] of the rows [N, C]."""
    return paddle.matmul(paddle.ones([1, rows.shape[0]]), rows)[0]


class _Linear(PyLayer):
    """`x @ weight + bias` and its gradients: x [..., in], weight [in, out], bias [out]."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x, weight)
        return paddle.addmm(bias, x.reshape([-1, x.shape[-1]]), weight).reshape([*x.shape[:-1], -1])

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        x, weight = ctx.saved_tensor()
        x_rows, g_rows = x.reshape([-1, x.shape[-1]]), gradient.reshape([-1, gradient.shape[-1]])
        dx = paddle.matmul(gradient, weight, transpose_y=True)
        return dx, paddle.matmul(x_rows, g_rows, transpose_x=True), _row_sum(g_rows)


class CpuLinear(nn.Linear):
    """nn.Linear with bias, and with a fast gradient of it."""

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """float32 [..., in] -> [..., out]."""
        return _Linear.apply(input, self.weight, self.bias)


class _LayerNorm(PyLayer):
    """Layer norm over the last axis: `c / s * weight + bias` with c = x - mean(x), s = sqrt(mean(c^2) + epsilon)."""

    @staticmethod
    def forward(
        ctx: Any, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float
    ) -> paddle.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        x, weight = ctx.saved_tensor()
        size = x.shape[-1]
        x_rows, g_rows, w = as_array(x.reshape([-1, size])), as_array(gradient.reshape([-1, size])), as_array(weight)
        dx = np.empty_like(x_rows)
        d_weight, d_bias = np.zeros_like(w), np.zeros_like(w)
        block = max(1, BLOCK_ELEMENTS // size)
        for start in range(0, len(dx), block):
            rows = slice(start, start + block)
            block_weight, block_bias = _layer_norm_gradient(x_rows[rows], g_rows[rows], w, ctx.epsilon, dx[rows])
            d_weight += block_weight
            d_bias += block_bias
        return as_tensor(dx).reshape(x.shape), as_tensor(d_weight), as_tensor(d_bias)


def _layer_norm_gradient(
    x: np.ndarray, g: np.ndarray, weight: np.ndarray, epsilon: float, dx: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the gradient of x [N, C] into dx; returns those of weight and bias, [C]. g: the gradient of the result.

    Sums by einsum: NumPy's matrix products have threads of their own, which wait actively beside Paddle's.
    """
    size = x.shape[1]
    centred = x - x.mean(axis=1, keepdims=True)
    inverse = 1 / np.sqrt(np.einsum("ij,ij->i", centred, centred) / size + np.float32(epsilon))  # 1 / s
    products = g * centred
    # d = g * weight; dx = (d - mean(d) - c * mean(d * c) / s^2) / s
    mean_d, mean_dc = (np.einsum("ij,j->i", rows, weight / size) for rows in (g, products))
    np.multiply(g, weight, out=dx)
    dx -= mean_d[:, None]
    centred *= (mean_dc * inverse**2)[:, None]
    dx -= centred
    dx *= inverse[:, None]
    return np.einsum("i,ij->j", inverse, products), g.sum(axis=0)


class CpuLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last axis, with a fast gradient."""

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """float32 [..., size] -> [..., size]."""
        return _LayerNorm.apply(input, self.weight, self.bias, self._epsilon)


class _Dropout(PyLayer):
    """Sets elements to zero with probability `p` and scales up the others, see `kept_by_dropout`."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, p: float) -> paddle.Tensor:
        kept, ctx.scale = kept_by_dropout(x.size, p)
        ctx.kept = kept.reshape(x.shape)
        return _Dropout._apply(ctx, x)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> paddle.Tensor:
        return _Dropout._apply(ctx, gradient)

    @staticmethod
    def _apply(ctx: Any, x: paddle.Tensor) -> paddle.Tensor:
        result = as_array(x) * ctx.kept
        result *= ctx.scale
        return as_tensor(result)


def kept_by_dropout(size: int, p: float) -> tuple[np.ndarray, np.float32]:
    """Which elements dropout with probability `p` keeps, bool [size], and what it multiplies these with.

    They depend on the state of Paddle's generator. An element takes 16 random bits, so p is rounded to a multiple of
    1 / 65,536; the scale fits the rounded p.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2**16 values of an element's bits
    generator = np.random.SFC64(paddle.randint(0, 2**31 - 1, [2]).numpy())
    bits = generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
    return bits >= dropped, np.float32(2**16 / (2**16 - dropped))


def dropout(x: paddle.Tensor, p: float, training: bool) -> paddle.Tensor:
    """F.dropout in mode upscale_in_train, with other masks."""
    return _Dropout.apply(x, p) if training and 0 < p < 1 and x.size else F.dropout(x, p, training=training)


class CpuDropout(nn.Dropout):
    """nn.Dropout over all axes in mode upscale_in_train, with a fast generator."""

    def forward(self, input: paddle.Tensor) -> paddle.Tensor:
        """float32, any shape; the result has the same."""
        return dropout(input, self.p, self.training)


class CpuMultiHeadAttention(nn.MultiHeadAttention):
    """nn.MultiHeadAttention, faster for the arguments that an encoder passes."""

    def forward(
        self,
        query: paddle.Tensor,
        key: paddle.Tensor | None = None,
        value: paddle.Tensor | None = None,
        attn_mask: paddle.Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        """query: float32 [B, Q, D]; key, value: [B, L, D]; attn_mask: added to the logits [B, heads, Q, L]."""
        is_added = attn_mask is not None and attn_mask.dtype == query.dtype  # Paddle converts other masks
        if key is None or value is None or not is_added or cache is not None or self.need_weights:
            return super().forward(query, key, value, attn_mask, cache)
        q, k, v = self._prepare_qkv(query, key, value)
        logits = paddle.matmul(q * self.head_dim**-0.5, k, transpose_y=True) + attn_mask
        weights = dropout(F.softmax(logits), self.dropout, self.training)
        return self.out_proj(paddle.matmul(weights, v).transpose([0, 2, 1, 3]).flatten(start_axis=2))


def speed_up_training(model: nn.Layer) -> None:
    """Makes the model's layers compute as above; parameters and their names stay. Leaves subclasses alone."""
    for layer in model.sublayers():
        if type(layer) is nn.Linear and layer.bias is not None:
            layer.__class__ = CpuLinear
        elif type(layer) is nn.LayerNorm and len(layer._normalized_shape) == 1 and layer.weight is not None:
            layer.__class__ = CpuLayerNorm
        elif type(layer) is nn.Dropout and layer.axis is None and layer.mode == "upscale_in_train":
            layer.__class__ = CpuDropout
        elif type(layer) is nn.MultiHeadAttention:
            layer.__class__ = CpuMultiHeadAttention
