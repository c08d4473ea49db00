"""The semantic indexing model: one encoder that gives texts of similar meaning similar unit vectors."""

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from common.options import DEFAULT_DROPOUT, DEFAULT_EMBEDDING_SIZE, DEFAULT_POOLING
from common.texts import DOCUMENT, QUERY

DEFAULT_LENGTH = 64  # of a checkpoint without semantic_index.json: the default of the original's recall and predict


@dataclass(frozen=True)
class ModelConfig:
    """What turns a backbone into a semantic indexing model; stored in a checkpoint's semantic_index.json."""

    output_emb_size: int = DEFAULT_EMBEDDING_SIZE  # 0: the backbone's hidden size, without a linear reduction
    # "cls": the backbone's pooled output; "first_token": the last layer's first token, without the pooler's layer and
    # tanh; "mean": the mean of the last layer, without padding
    pooling: str = DEFAULT_POOLING
    dropout: float = DEFAULT_DROPOUT  # of the vector before it is normalized, in training
    max_seq_length: int = DEFAULT_LENGTH
    query_prefix: str = ""  # put before a query, such as BGE's instruction
    document_prefix: str = ""  # put before a document, such as E5's "passage: "

    @property
    def prefixes(self) -> dict[str, str]:
        """The prefixes by role."""
        return {QUERY: self.query_prefix, DOCUMENT: self.document_prefix}


class ClsOnlyLayer(nn.TransformerEncoderLayer):
    """A last encoder layer that computes only [CLS]; the other tokens are keys and values of its attention."""

    def forward(self, src: paddle.Tensor, src_mask: paddle.Tensor | None = None, **_: object) -> paddle.Tensor:
        """[B, L, H] -> [B, 1, H]; src_mask: [B, 1, 1, L]. Ignores the other arguments of PaddleNLP's encoders."""
        cls = self.cls_of(src)
        cls = self.norm1(cls + self.dropout1(self.self_attn(cls, src, src, src_mask)))
        return self.norm2(cls + self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(cls))))))

    def cls_of(self, src: paddle.Tensor) -> paddle.Tensor:
        """The tokens that are computed, [B, 1, H]."""
        return src[:, :1]


def use_cls_only_last_layer(ptm: nn.Layer) -> None:
    """Makes the last layer compute only [CLS], which is all that the pooled output and the first token need.

    The encoder's sequence output is then [B, 1, H]. Parameters and their names don't change. Does nothing if the last
    layer isn't like BERT's, a plain TransformerEncoderLayer with normalize_before=False.
    """
    layers = getattr(getattr(ptm, "encoder", None), "layers", None)
    if not layers:
        return
    last = layers[-1]
    is_bert = type(last) is nn.TransformerEncoderLayer and type(last.self_attn) is nn.MultiHeadAttention
    if is_bert and not last.normalize_before:
        last.__class__ = ClsOnlyLayer


def projection_initializer(pooling: str) -> nn.initializer.Initializer:
    """Initial weights of the linear reduction: truncated normal as in the original for "cls", else orthogonal.

    A square orthogonal matrix (Saxe et al. 2014, arXiv:1312.6120) keeps the angles between vectors. From random
    weights, mean pooling learns much faster with it (docs/results.md).
    """
    return nn.initializer.TruncatedNormal(std=0.02) if pooling == "cls" else nn.initializer.Orthogonal()


class SemanticIndexBase(nn.Layer):
    """Turns token ids into unit vectors: a backbone, pooling and, unless output_emb_size is 0, a linear reduction.

    ptm: a PaddleNLP encoder that returns (sequence, pooled) for input_ids and token_type_ids.
    """

    def __init__(self, ptm: nn.Layer, config: ModelConfig) -> None:
        super().__init__()
        self.ptm = ptm
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        if config.pooling != "mean":
            use_cls_only_last_layer(ptm)
        if config.output_emb_size:
            weight_attr = paddle.ParamAttr(initializer=projection_initializer(config.pooling))
            self.emb_reduce_linear = nn.Linear(ptm.config.hidden_size, config.output_emb_size, weight_attr=weight_attr)

    @property
    def embedding_size(self) -> int:
        """Length of a vector."""
        return self.config.output_emb_size or self.ptm.config.hidden_size

    def get_pooled_embedding(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        """Unit vectors, float32 [B, D], for int64 [B, L] token ids padded with the backbone's pad_token_id."""
        return self.unit_vectors(self.pool(input_ids, token_type_ids))

    def pool(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        """One vector of the backbone for each text, [B, H]."""
        sequence, pooled = self.ptm(input_ids, token_type_ids)
        if self.config.pooling == "first_token":
            return sequence[:, 0]
        if self.config.pooling == "mean":
            is_token = (input_ids != self.ptm.config.pad_token_id).astype(sequence.dtype).unsqueeze(-1)
            return (sequence * is_token).sum(axis=1) / is_token.sum(axis=1)
        return pooled

    def unit_vectors(self, pooled: paddle.Tensor) -> paddle.Tensor:
        """The model's vectors, float32 [B, D], of those of the backbone, [B, H]."""
        if self.config.output_emb_size:
            pooled = self.emb_reduce_linear(pooled)
        # Normalized in float32 also in mixed precision: a norm in float16 is wrong in the third digit.
        return F.normalize(self.dropout(pooled).astype("float32"), axis=-1)

    @paddle.no_grad()
    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """`get_pooled_embedding` for NumPy arrays, without dropout and gradients; for `data.encode_texts`."""
        training = self.training
        self.eval()
        vectors = self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
        if training:
            self.train()
        return vectors.astype("float32").numpy()
