"""The semantic indexing model: one encoder whose unit vectors lie close where texts mean the same."""

import argparse
import os
import random
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddlenlp.transformers import PretrainedModel

from backbone import compute_first_token
from runtime import at_least
from static_graph import choose_device

STRIDE_FLAG = "FLAGS_use_stride_kernel"
DEFAULT_MODEL = "ernie-1.0"
DEFAULT_EMBEDDING_SIZE = 256
DEFAULT_LENGTH = 64  # of a checkpoint that doesn't tell: the original's default in recall and predict


@dataclass(frozen=True)
class ModelConfig:
    """What turns a backbone into a semantic indexing model; a checkpoint's semantic_index.json holds it."""

    output_emb_size: int = DEFAULT_EMBEDDING_SIZE  # 0: the backbone's hidden size, without a reduction
    pooling: str = "cls"  # "cls": the backbone's pooled output; "mean": the mean of its last layer over real tokens
    dropout: float = 0.1  # after the reduction, in training
    max_seq_length: int = DEFAULT_LENGTH


def reduction_start(pooling: str) -> nn.initializer.Initializer:
    """What the reduction starts from: after the pooled output the original's normal, after a mean an orthogonal matrix.

    The second (Saxe et al. 2014, arXiv:1312.6120) keeps the angles between means where both sizes are equal. From
    scratch the mean learns much faster from it (docs/results.md).
    """
    return nn.initializer.TruncatedNormal(std=0.02) if pooling == "cls" else nn.initializer.Orthogonal()


class SemanticIndexBase(nn.Layer):
    """An encoder whose unit vectors lie close where texts mean the same.

    ptm: a PaddleNLP encoder that gives (sequence, pooled) from input_ids and token_type_ids.
    """

    def __init__(self, ptm: PretrainedModel, config: ModelConfig) -> None:
        super().__init__()
        self.ptm = ptm
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        if config.pooling == "cls":
            compute_first_token(ptm)
        if config.output_emb_size:
            size = ptm.config.hidden_size
            initial = paddle.ParamAttr(initializer=reduction_start(config.pooling))
            self.emb_reduce_linear = nn.Linear(size, config.output_emb_size, weight_attr=initial)

    @property
    def embedding_size(self) -> int:
        """Length of a vector."""
        return self.config.output_emb_size or self.ptm.config.hidden_size

    def get_pooled_embedding(self, input_ids: paddle.Tensor, token_type_ids: paddle.Tensor) -> paddle.Tensor:
        """Unit vectors, float32 [B, D], of int64 [B, L] token ids padded with the backbone's pad_token_id."""
        sequence, pooled = self.ptm(input_ids, token_type_ids)
        if self.config.pooling == "mean":
            real = (input_ids != self.ptm.config.pad_token_id).astype(sequence.dtype).unsqueeze(-1)
            pooled = (sequence * real).sum(axis=1) / real.sum(axis=1)
        if self.config.output_emb_size:
            pooled = self.emb_reduce_linear(pooled)
        # float32 under mixed precision too: a norm in float16 is off in the third digit.
        return F.normalize(self.dropout(pooled).astype("float32"), axis=-1)

    def cosine_sim(
        self,
        query_input_ids: paddle.Tensor,
        query_token_type_ids: paddle.Tensor,
        title_input_ids: paddle.Tensor,
        title_token_type_ids: paddle.Tensor,
    ) -> paddle.Tensor:
        """Cosine of each query with the title of the same row, float32 [B]."""
        query_emb = self.get_pooled_embedding(query_input_ids, query_token_type_ids)
        title_emb = self.get_pooled_embedding(title_input_ids, title_token_type_ids)
        return (query_emb * title_emb).sum(axis=-1)

    @paddle.no_grad()
    def embed(self, input_ids: np.ndarray, token_type_ids: np.ndarray) -> np.ndarray:
        """`get_pooled_embedding` on arrays, without dropout: what `data.encode_texts` calls."""
        training = self.training
        self.eval()
        vectors = self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
        if training:
            self.train()
        return vectors.astype("float32").numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Options, device and seeds


def add_device_arg(parser: argparse.ArgumentParser, default: str | None) -> None:
    """`--device`; a default of None means a GPU where this Paddle has one."""
    help_text = "where to compute" if default else "where to compute (default: gpu if there is one, else cpu)"
    parser.add_argument("--device", choices=["cpu", "gpu"], default=default, help=help_text)


def add_checkpoint_args(parser: argparse.ArgumentParser, params_path: str | None = None) -> None:
    """Options of the scripts that use a trained model; without a default, `--params_path` is required."""
    parser.add_argument(
        "--params_path",
        required=params_path is None,
        default=params_path,
        help="checkpoint: its folder, or the .pdparams file in it",
    )
    parser.add_argument(
        "--output_emb_size", type=at_least(0), help="length of a vector; the checkpoint knows it, another is an error"
    )
    parser.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        help="backbone of a checkpoint that has no config.json, such as the original scripts' ones",
    )


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Options of training that make the model."""
    parser.add_argument(
        "--model_name_or_path",
        default=DEFAULT_MODEL,
        help="pretrained PaddleNLP encoder: a name, or a folder with config, vocabulary and weights",
    )
    parser.add_argument(
        "--from_scratch", metavar="FOLDER", help="start from random weights; FOLDER has a config.json and a vocab.txt"
    )
    parser.add_argument("--init_from_ckpt", help="start from the weights of this checkpoint (folder or .pdparams)")
    parser.add_argument(
        "--output_emb_size",
        type=at_least(0),
        default=DEFAULT_EMBEDDING_SIZE,
        help="length of a vector; 0 keeps the backbone's hidden size, without a reduction",
    )
    parser.add_argument(
        "--pooling",
        choices=["cls", "mean"],
        default="cls",
        help="cls: the pooled output; mean: the mean over tokens, which learns faster from scratch",
    )
    parser.add_argument("--dropout", type=at_least(0.0, float, 1.0), default=0.1, help="dropout of the vector")


def set_device(device: str | None) -> None:
    """Computes on "cpu" or "gpu" (None: a GPU if there is one). Raises InputError if there is no GPU.

    On a CPU transpositions copy at once, unless the user's environment says otherwise: a training step or an encoded
    text then takes about a fifth less time (docs/benchmarks.md), with the same result to the bit.
    """
    device = choose_device(device)
    # Without a number, Paddle takes the GPU that the launcher gave this rank.
    paddle.set_device(device)
    if device == "cpu" and STRIDE_FLAG not in os.environ:
        # By default a transposition only changes strides, and each kernel that uses it copies element by element.
        paddle.set_flags({STRIDE_FLAG: False})


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and Paddle."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)
