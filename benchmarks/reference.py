"""The baseline of the benchmarks: the loops of the original scripts, without any optimization.

It uses PaddleNLP's model and pure Python tokenizer and leaves the environment as it is. Texts are taken in file order
and tokenized one at a time in the loop; a batch is padded to its longest text.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddlenlp.transformers import ErnieConfig, ErnieModel, ErnieTokenizer, LinearDecayWithWarmup

from batch_negative.batches import batched
from benchmarks.harness import (
    EMBEDDING_SIZE,
    MARGIN,
    MAX_SEQ_LENGTH,
    SCALE,
    Training,
    add_trainer_args,
    timed_steps,
    used,
    write_report,
)
from common.cli import ArgumentParser, run
from data import TextPair, read_text_pairs

Tokens = tuple[paddle.Tensor, paddle.Tensor]  # (input_ids, token_type_ids), int64 [B, L] each


class ReferenceModel(nn.Layer):
    """The dual tower on an ERNIE with random weights; its parameters have the names that ours have."""

    def __init__(self, config: ErnieConfig, output_emb_size: int = EMBEDDING_SIZE) -> None:
        super().__init__()
        self.ptm = ErnieModel(config)
        self.dropout = nn.Dropout(0.1)
        self.emb_reduce_linear = nn.Linear(config.hidden_size, output_emb_size)

    def embed(self, tokens: Tokens) -> paddle.Tensor:
        """Unit vectors [B, D]."""
        _, pooled = self.ptm(*tokens)
        return F.normalize(self.dropout(self.emb_reduce_linear(pooled)), axis=-1)

    def forward(self, queries: Tokens, titles: Tokens, margin: float, scale: float) -> paddle.Tensor:
        """Mean softmax cross entropy of each query's own title among the titles of the batch, a scalar."""
        cosines = paddle.matmul(self.embed(queries), self.embed(titles), transpose_y=True)
        logits = scale * (cosines - margin * paddle.eye(len(cosines)))
        return F.cross_entropy(logits, paddle.arange(len(cosines)))


def tokenize(tokenizer: ErnieTokenizer, texts: Sequence[str], max_seq_length: int) -> Tokens:
    """The texts' ids padded to the longest, and zeros of the same shape."""
    ids = [tokenizer(text, max_length=max_seq_length, truncation=True)["input_ids"] for text in texts]
    length = max(map(len, ids))
    input_ids = paddle.to_tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in ids], dtype="int64")
    return input_ids, paddle.zeros_like(input_ids)


def train(
    model: ReferenceModel,
    tokenizer: ErnieTokenizer,
    pairs: Iterator[TextPair],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[list[float], list[float]]:
    """(seconds, losses) of the steps."""
    scheduler = LinearDecayWithWarmup(learning_rate, steps, 0.1)
    decayed = {p.name for name, p in model.named_parameters() if not any(part in name for part in ("bias", "norm"))}
    optimizer = paddle.optimizer.AdamW(
        learning_rate=scheduler,
        parameters=model.parameters(),
        weight_decay=0.0,
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=nn.ClipGradByGlobalNorm(5.0),
    )

    def step(batch: list[TextPair]) -> float:
        queries, titles = (tokenize(tokenizer, column, MAX_SEQ_LENGTH) for column in list(zip(*batch, strict=True))[:2])
        loss = model(queries, titles, MARGIN, SCALE)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        scheduler.step()
        return float(loss)

    return timed_steps(step, islice(batched(pairs, batch_size), steps))


@paddle.no_grad()
def encode(model: ReferenceModel, tokenizer: ErnieTokenizer, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Vectors of the texts, float32 [N, D], in their order."""
    batches = batched(texts, batch_size)
    return np.concatenate([model.embed(tokenize(tokenizer, batch, MAX_SEQ_LENGTH)).numpy() for batch in batches])


def build_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_trainer_args(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports."""
    args = build_parser().parse_args(argv)
    paddle.set_device("cpu")
    paddle.seed(args.seed)
    seconds, losses = train(
        ReferenceModel(ErnieConfig.from_pretrained(args.model)),
        ErnieTokenizer.from_pretrained(args.model),
        cycle(read_text_pairs(args.train_set_file)),
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
    )
    if args.report:
        write_report(args.report, Training(seconds, losses, *used(["paddlepaddle", "paddlenlp"])))
    print(f"{len(losses)} steps, last loss {losses[-1]:.4f}")
    return 0


if __name__ == "__main__":
    run(main)
