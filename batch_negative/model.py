"""The in-batch negatives loss, and the model that is trained with it."""

import paddle

from base_model import SemanticIndexBase
from batch_negative.batches import CHUNKS_PER_BATCH, PairBatch
from batch_negative.distillation import MASKED_LOGIT, Distillation
from common.distributed import gather_rows
from data import TokenIds
from modeling.packed_texts import Packing, pool_packed


def in_batch_negatives_loss(
    query_emb: paddle.Tensor,
    title_emb: paddle.Tensor,
    *,
    margin: float,
    scale: float,
    mask: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Mean cross entropy of `scale * (Q T' - margin * I)` against the diagonal, a scalar.

    query_emb: unit vectors [B, D]; title_emb: unit vectors [C, D], first the B titles of the queries, then hard
    negatives; mask: bool [B, C], True where a text is no negative of the query. The diagonal is never masked.
    In-batch negatives: Karpukhin et al. 2020, https://arxiv.org/abs/2004.04906; the margin on the positive's cosine:
    Wang et al. 2018 (CosFace), https://arxiv.org/abs/1801.09414.
    """
    diagonal = paddle.eye(query_emb.shape[0], title_emb.shape[0], dtype=query_emb.dtype)
    logits = scale * (paddle.matmul(query_emb, title_emb, transpose_y=True) - margin * diagonal)
    if mask is not None:
        is_masked = paddle.logical_and(mask, diagonal == 0)
        logits = paddle.where(is_masked, paddle.full_like(logits, MASKED_LOGIT), logits)
    # Not F.cross_entropy: its softmax on the CPU turns NaN into a plausible number and limits a row's loss to 64.
    return (paddle.logsumexp(logits, axis=1) - paddle.diagonal(logits)).mean()


def batch_loss(
    vectors: paddle.Tensor, batch: PairBatch, *, margin: float, scale: float, distillation: Distillation | None = None
) -> paddle.Tensor:
    """The mean loss over the pairs of all ranks in `batch.sizes`, a scalar.

    vectors: unit vectors [T, D] of the concatenated chunks; distillation: adds the loss of the batch's teacher scores.
    Every rank computes the whole loss, but only the gradient of its own vectors; the sum over the ranks is the gradient
    that one process gets for the whole batch.
    """
    own = paddle.index_select(vectors, paddle.to_tensor(batch.row_of_text))
    rows_of_ranks = gather_rows(own, batch.text_counts, batch.rank)
    parts = [batch.split(rows, rank) for rank, rows in enumerate(rows_of_ranks)]
    queries, titles, hard_negatives = zip(*parts, strict=True)
    query_emb = paddle.concat(queries)
    title_emb = paddle.concat([*titles, *(rows for rows in hard_negatives if len(rows))])
    mask = None if batch.mask is None else paddle.to_tensor(batch.mask)
    loss = in_batch_negatives_loss(query_emb, title_emb, margin=margin, scale=scale, mask=mask)
    if distillation and batch.teacher:
        loss = loss + distillation.weight * distillation(query_emb, title_emb, batch.teacher, scale)
    return loss


class SemanticIndexBatchNeg(SemanticIndexBase):
    """The dual encoder, one for queries and titles, trained with the other titles of the batch as negatives.

    packing: of `pack_texts`, to train without padding; None trains on padded chunks.
    """

    packing: Packing | None = None

    @property
    def chunks_per_batch(self) -> int:
        """Into how many chunks of similar length to cut a batch: only padding makes several pay."""
        return 1 if self.packing else CHUNKS_PER_BATCH

    def forward(
        self, batch: PairBatch, margin: float, scale: float, distillation: Distillation | None = None
    ) -> paddle.Tensor:
        """The loss of a batch, a scalar."""
        vectors = paddle.concat([self.encode_chunk(chunk) for chunk in batch.chunks])
        return batch_loss(vectors, batch, margin=margin, scale=scale, distillation=distillation)

    def encode_chunk(self, tokens: TokenIds) -> paddle.Tensor:
        """Unit vectors, float32 [n, D], of the n texts of a chunk."""
        input_ids, token_type_ids = tokens
        if self.packing:
            return self.unit_vectors(pool_packed(self, self.packing, input_ids, token_type_ids))
        return self.get_pooled_embedding(paddle.to_tensor(input_ids), paddle.to_tensor(token_type_ids))
