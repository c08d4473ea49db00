"""Training on a CPU without padding: a chunk's texts follow each other in one row; only attention keeps them apart.

Where texts differ in length, a fifth of a padded batch is padding, and linear layers compute it as they compute tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from base_model import ClsOnlyLayer, SemanticIndexBase
from modeling.cpu_training_layers import CpuMultiHeadAttention, as_array, as_tensor, kept_by_dropout

# Of PaddleNLP's backbones, those that number the positions of a text from 0 and take position_ids.
PACKED_MODEL_TYPES = ("ernie", "bert")

# In multiplications. Beyond, NumPy's OpenBLAS starts threads of its own, which wait actively beside Paddle's.
MAX_SMALL_PRODUCT = 1 << 18


class TextRun(NamedTuple):
    """Texts of equal length that follow each other."""

    texts: int
    length: int  # in tokens


class Packing:
    """The texts that a model's layers see in one row; `runs` is empty while they see a padded batch."""

    def __init__(self) -> None:
        self.runs: list[TextRun] = []

    @contextmanager
    def of(self, lengths: np.ndarray) -> Iterator[None]:
        """Inside this block the layers see texts of these lengths, int64 [B], in one row."""
        self.runs = [TextRun(len(list(equal)), int(length)) for length, equal in groupby(lengths)]
        try:
            yield
        finally:
            self.runs = []

    @property
    def first_tokens(self) -> paddle.Tensor:
        """The position of each text's first token in the row, int64 [B]."""
        lengths = np.repeat([run.length for run in self.runs], [run.texts for run in self.runs])
        return paddle.to_tensor(np.cumsum(lengths) - lengths)


class _PackedAttention(PyLayer):
    """Scaled dot-product attention within each text; q: float32 [1, Q, D], k and v: [1, T, D], each of several heads.

    Q is T, or the number of texts if only their first tokens ask. Runs of equally long texts are computed together, in
    NumPy: to start an operation of Paddle takes longer than most of these small products, and NumPy needs no copies in
    the order of the heads.
    """

    @staticmethod
    def forward(
        ctx: Any, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, heads: int, runs: list[TextRun], p: float
    ) -> paddle.Tensor:
        ctx.heads, ctx.tokens = heads, k.shape[1]
        ctx.key_shapes = [(run.texts, run.length) for run in runs]
        only_first = q.shape[1] != ctx.tokens
        ctx.query_shapes = [(run.texts, 1) for run in runs] if only_first else ctx.key_shapes
        ctx.scale = np.float32((q.shape[2] // heads) ** -0.5)
        ctx.result = np.empty(q.shape, np.float32)
        queries, results = (_split(rows, heads, ctx.query_shapes) for rows in (as_array(q) * ctx.scale, ctx.result))
        keys, values = (_split(as_array(rows), heads, ctx.key_shapes) for rows in (k, v))
        weights = [_softmax(_product(a, b, transpose_y=True)) for a, b in zip(queries, keys, strict=True)]
        factors = _dropout_factors(weights, p) if p else [np.ones(1, np.float32)] * len(runs)
        ctx.runs = list(zip(queries, keys, values, weights, factors, strict=True))
        for weight, factor, value, result in zip(weights, factors, values, results, strict=True):
            _product(weight * factor, value, result)
        return as_tensor(ctx.result)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        # With weights w = softmax(s) and their gradients dw, ds = w * (dw - sum(w * dw)), and the sum is that of
        # result * gradient over a head's components.
        d_result = as_array(gradient)
        _, asking, size = d_result.shape
        by_head = [rows.reshape(asking, ctx.heads, size // ctx.heads) for rows in (ctx.result, d_result)]
        sums = np.einsum("nhd,nhd->nh", *by_head)
        dq, dk, dv = (np.empty((1, rows, size), np.float32) for rows in (asking, ctx.tokens, ctx.tokens))
        of_queries = [_split(rows, ctx.heads, ctx.query_shapes) for rows in (d_result, sums, dq)]
        of_keys = [_split(rows, ctx.heads, ctx.key_shapes) for rows in (dk, dv)]
        for (query, key, value, weight, factor), d_out, total, d_query, d_key, d_value in zip(
            ctx.runs, *of_queries, *of_keys, strict=True
        ):
            d_logits = _product(d_out, value, transpose_y=True) * factor
            d_logits -= total
            d_logits *= weight
            _product(d_logits, key, d_query)
            _product(d_logits, query, d_key, transpose_x=True)
            _product(weight * factor, d_out, d_value, transpose_x=True)
        dq *= ctx.scale
        return as_tensor(dq), as_tensor(dk), as_tensor(dv)


def _split(rows: np.ndarray, heads: int, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Each run of the rows [..., N, heads * d] as a view [texts, heads, length, d]. shapes: the texts and lengths."""
    rows = rows.reshape(-1, heads, rows.shape[-1] // heads)
    ends = np.cumsum([texts * length for texts, length in shapes])
    parts = np.split(rows, ends[:-1])
    return [part.reshape(*shape, *part.shape[1:]).swapaxes(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _product(
    x: np.ndarray, y: np.ndarray, out: np.ndarray | None = None, *, transpose_x: bool = False, transpose_y: bool = False
) -> np.ndarray:
    """paddle.matmul of arrays of 4 axes, written to `out` if it is given; small products by NumPy."""
    if x.shape[2] * x.shape[3] * y.shape[2 if transpose_y else 3] <= MAX_SMALL_PRODUCT:
        return np.matmul(x.swapaxes(2, 3) if transpose_x else x, y.swapaxes(2, 3) if transpose_y else y, out=out)
    tensors = (as_tensor(np.require(array, requirements=("C", "W"))) for array in (x, y))  # no others can be shared
    product = as_array(paddle.matmul(*tensors, transpose_x, transpose_y))
    if out is None:
        return product
    out[...] = product
    return out


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def _dropout_factors(weights: list[np.ndarray], p: float) -> list[np.ndarray]:
    """What dropout multiplies each weight with, in the shapes of the weights."""
    kept, scale = kept_by_dropout(sum(weight.size for weight in weights), p)
    parts = np.split(kept * scale, np.cumsum([weight.size for weight in weights])[:-1])
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


class PackedMultiHeadAttention(CpuMultiHeadAttention):
    """CpuMultiHeadAttention that keeps the texts of a row apart while `packing` has runs."""

    packing: Packing

    def forward(
        self,
        query: paddle.Tensor,
        key: paddle.Tensor | None = None,
        value: paddle.Tensor | None = None,
        attn_mask: paddle.Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        """As in CpuMultiHeadAttention; in a row, query: float32 [1, Q, D], key and value: [1, T, D]."""
        if not self.packing.runs:
            return super().forward(query, key, value, attn_mask, cache)
        rows = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        p = self.dropout if self.training else 0.0
        return self.out_proj(_PackedAttention.apply(*rows, self.num_heads, self.packing.runs, p))


class PackedClsOnlyLayer(ClsOnlyLayer):
    """ClsOnlyLayer for the texts of a row: [1, T, H] -> [1, B, H]."""

    packing: Packing

    def cls_of(self, src: paddle.Tensor) -> paddle.Tensor:
        """Each text's first token."""
        return src.index_select(self.packing.first_tokens, axis=1) if self.packing.runs else super().cls_of(src)


def pack_texts(model: SemanticIndexBase) -> Packing | None:
    """Makes the layers of a model that `speed_up_training` has changed take packed texts, too.

    None if the backbone isn't an encoder of PACKED_MODEL_TYPES with plain layers.
    """
    layers = list(getattr(getattr(model.ptm, "encoder", None), "layers", None) or ())
    is_plain = all(
        type(layer) in (nn.TransformerEncoderLayer, ClsOnlyLayer) and type(layer.self_attn) is CpuMultiHeadAttention
        for layer in layers
    )
    if not layers or not is_plain or model.ptm.config.model_type not in PACKED_MODEL_TYPES:
        return None
    packing = Packing()
    for layer in layers:
        layer.self_attn.__class__ = PackedMultiHeadAttention
        layer.self_attn.packing = packing
        if type(layer) is ClsOnlyLayer:
            layer.__class__ = PackedClsOnlyLayer
            layer.packing = packing
    return packing


def pool_packed(
    model: SemanticIndexBase, packing: Packing, input_ids: np.ndarray, token_type_ids: np.ndarray
) -> paddle.Tensor:
    """`model.pool` of a padded batch, int64 [B, L], without computing its padding."""
    is_token = input_ids != model.ptm.config.pad_token_id
    lengths = is_token.sum(axis=1)
    positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    row = [paddle.to_tensor(array[is_token][None]) for array in (input_ids, token_type_ids, positions)]
    with packing.of(lengths):
        sequence, _ = model.ptm(row[0], row[1], position_ids=row[2])
        if model.config.pooling == "mean":
            text_of_token = np.repeat(np.arange(len(lengths)), lengths)
            return paddle.geometric.segment_mean(sequence[0], paddle.to_tensor(text_of_token))
        is_cls_only = isinstance(model.ptm.encoder.layers[-1], ClsOnlyLayer)
        first = sequence[0] if is_cls_only else sequence[0].index_select(packing.first_tokens)
    return first if model.config.pooling == "first_token" else model.ptm.pooler(first.unsqueeze(1))
