"""Training on a CPU without padding: a chunk's texts follow each other in one row; only attention keeps them apart.

Where texts differ in length, a fifth of a padded batch is padding, and linear layers compute it as they compute tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

from base_model import ClsOnlyLayer, SemanticIndexBase
from modeling.cpu_training_layers import CpuMultiHeadAttention, kept_by_dropout

# Of PaddleNLP's backbones, those that number the positions of a text from 0 and take position_ids.
PACKED_MODEL_TYPES = ("ernie", "bert")


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
    """Scaled dot-product attention within each text, over the heads' queries [H, Q, d], keys and values [H, T, d].

    Q is T, or the number of texts if only their first tokens ask. Runs of equally long texts are computed together.
    """

    @staticmethod
    def forward(
        ctx: Any, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, runs: list[TextRun], p: float
    ) -> paddle.Tensor:
        ctx.scale = q.shape[2] ** -0.5
        only_first = q.shape[1] != k.shape[1]
        ctx.q_shapes = [[q.shape[0], run.texts, 1 if only_first else run.length, q.shape[2]] for run in runs]
        ctx.k_shapes = [[q.shape[0], run.texts, run.length, q.shape[2]] for run in runs]
        queries = _split(q * ctx.scale, ctx.q_shapes)
        keys, values = _split(k, ctx.k_shapes), _split(v, ctx.k_shapes)
        weights = [F.softmax(paddle.matmul(a, b, transpose_y=True)) for a, b in zip(queries, keys, strict=True)]
        factors = _dropout_factors(weights, p) if p else [None] * len(runs)
        dropped = [_times(*each) for each in zip(weights, factors, strict=True)]
        ctx.runs = list(zip(queries, keys, values, weights, factors, dropped, strict=True))
        ctx.result = _join(map(paddle.matmul, dropped, values))
        return ctx.result

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        # With weights w = softmax(s) and their gradients dw, ds = w * (dw - sum(w * dw)), and the sum is that of
        # result * gradient over a head's components.
        sums = _split((ctx.result * gradient).sum(axis=-1, keepdim=True), [[*shape[:3], 1] for shape in ctx.q_shapes])
        parts = []
        for (query, key, value, weight, factor, dropped), d_result, total in zip(
            ctx.runs, _split(gradient, ctx.q_shapes), sums, strict=True
        ):
            d_weight = _times(paddle.matmul(d_result, value, transpose_y=True), factor)
            d_logits = weight * (d_weight - total)
            d_key = paddle.matmul(d_logits, query, transpose_x=True)
            parts.append((paddle.matmul(d_logits, key), d_key, paddle.matmul(dropped, d_result, transpose_x=True)))
        d_queries, d_keys, d_values = zip(*parts, strict=True)
        return _join(d_queries) * ctx.scale, _join(d_keys), _join(d_values)


def _split(rows: paddle.Tensor, shapes: list[list[int]]) -> list[paddle.Tensor]:
    """Cuts [H, N, d] into the shapes [H, count, length, d], of which the sum of count * length is N."""
    parts = paddle.split(rows, [count * length for _, count, length, _ in shapes], axis=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _join(parts: Any) -> paddle.Tensor:
    """Puts [H, count, length, d] together to [H, N, d]."""
    return paddle.concat([part.flatten(start_axis=1, stop_axis=2) for part in parts], axis=1)


def _dropout_factors(weights: list[paddle.Tensor], p: float) -> list[paddle.Tensor]:
    """What dropout multiplies each weight with, in the shapes of the weights."""
    sizes = [weight.size for weight in weights]
    kept, scale = kept_by_dropout(sum(sizes), p)
    parts = paddle.split(paddle.from_dlpack(kept * scale), sizes)
    return [part.reshape(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _times(tensor: paddle.Tensor, factor: paddle.Tensor | None) -> paddle.Tensor:
    return tensor if factor is None else tensor * factor


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
        heads = [
            projection(rows).reshape([-1, self.num_heads, self.head_dim]).transpose([1, 0, 2])
            for projection, rows in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        p = self.dropout if self.training else 0.0
        result = _PackedAttention.apply(*heads, self.packing.runs, p)
        return self.out_proj(result.transpose([1, 0, 2]).flatten(start_axis=1).unsqueeze(0))


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
