"""The in-batch negatives loss, and the model that it trains."""

import paddle

from base_model import SemanticIndexBase
from data import PairBatch, TokenIds
from distributed import gather_rows

MASKED_LOGIT = -1e9  # its exponential is 0 beside any other logit, and unlike -inf it has a finite gradient


def in_batch_negatives_loss(
    query_emb: paddle.Tensor,
    title_emb: paddle.Tensor,
    *,
    margin: float,
    scale: float,
    mask: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Mean cross entropy of `scale * (Q T' - margin * I)` against the diagonal, a scalar.

    query_emb: unit vectors [B, D]; title_emb: unit vectors [C, D], of which the first B belong to the queries and the
    others, if any, are hard negatives; mask: bool [B, C], True where a title is no negative for the query. The diagonal
    is never masked. In-batch negatives: Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906; the margin on the
    positive's cosine: Wang et al. 2018 (CosFace), https://arxiv.org/abs/1801.09414.
    """
    own_title = paddle.eye(query_emb.shape[0], title_emb.shape[0], dtype=query_emb.dtype)
    logits = scale * (paddle.matmul(query_emb, title_emb, transpose_y=True) - margin * own_title)
    if mask is not None:
        masked = paddle.logical_and(mask, own_title == 0)
        logits = paddle.where(masked, paddle.full_like(logits, MASKED_LOGIT), logits)
    # Not F.cross_entropy: its softmax on the CPU turns NaN into a likely number, and caps a row's loss at 64.
    return (paddle.logsumexp(logits, axis=1) - paddle.diagonal(logits)).mean()


def batch_loss(vectors: paddle.Tensor, batch: PairBatch, *, margin: float, scale: float) -> paddle.Tensor:
    """The loss of a batch, a scalar, over the pairs of all ranks that it is scored against.

    vectors: unit vectors [T, D] of the rows of the batch's chunks. Each rank has the whole loss but only the gradient
    of its own vectors; the sum over the ranks is the gradient of one process with the whole batch.
    """
    own = paddle.index_select(vectors, paddle.to_tensor(batch.chunk_rows))
    counts = [2 * pairs + hard_negatives for pairs, hard_negatives in batch.sizes]
    ranks = list(zip(gather_rows(own, counts, batch.place), batch.sizes, strict=True))
    queries = [rows[:pairs] for rows, (pairs, _) in ranks]
    titles = [rows[pairs : 2 * pairs] for rows, (pairs, _) in ranks]
    hard_negatives = [rows[2 * pairs :] for rows, (pairs, hard) in ranks if hard]
    return in_batch_negatives_loss(
        paddle.concat(queries),
        paddle.concat(titles + hard_negatives),
        margin=margin,
        scale=scale,
        mask=None if batch.mask is None else paddle.to_tensor(batch.mask),
    )


class SemanticIndexBatchNeg(SemanticIndexBase):
    """The dual tower: one encoder for queries and titles, trained with the other titles of the batch as negatives."""

    def forward(self, batch: PairBatch, margin: float, scale: float) -> paddle.Tensor:
        """The loss of a batch, a scalar."""
        vectors = paddle.concat([self.encode_chunk(chunk) for chunk in batch.chunks])
        return batch_loss(vectors, batch, margin=margin, scale=scale)

    def encode_chunk(self, tokens: TokenIds) -> paddle.Tensor:
        """Unit vectors [N, D] of a chunk's N texts."""
        input_ids, token_type_ids = tokens
        return self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
