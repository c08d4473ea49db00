"""Distillation: each query ranks its own title and hard negatives as a teacher's scores do."""

from typing import NamedTuple

import paddle

from batch_negative.batches import ScoredDocuments

MASKED_LOGIT = -1e9  # gives a probability of 0, as -inf does, but a finite gradient


def kl_divergence(student: paddle.Tensor, teacher: paddle.Tensor, is_document: paddle.Tensor) -> paddle.Tensor:
    """Mean over the queries of KL(softmax(teacher) || softmax(student)), a scalar.

    student, teacher: logits [P, M]; is_document: bool [P, M], False for padding. Hinton et al. 2015,
    https://arxiv.org/abs/1503.02531; over the documents of a query: Ren et al. 2021 (RocketQAv2),
    https://arxiv.org/abs/2110.07367.
    """

    def log_probabilities(logits: paddle.Tensor) -> paddle.Tensor:
        logits = paddle.where(is_document, logits, paddle.full_like(logits, MASKED_LOGIT))
        return logits - paddle.logsumexp(logits, axis=1, keepdim=True)

    log_student, log_teacher = log_probabilities(student), log_probabilities(teacher)
    return (paddle.exp(log_teacher) * (log_teacher - log_student)).sum(axis=1).mean()


class Distillation(NamedTuple):
    """The distillation loss: its weight beside that of the in-batch negatives, and the teacher's scale.

    teacher_scale * score is a teacher's logit, as scale * cosine is a student's; None: the student's scale, which suits
    a teacher whose scores are cosines.
    """

    weight: float
    teacher_scale: float | None

    def __call__(
        self, query_emb: paddle.Tensor, document_emb: paddle.Tensor, teacher: ScoredDocuments, scale: float
    ) -> paddle.Tensor:
        """The loss without its weight, a scalar. query_emb: [P, D]; document_emb: [C, D], of all documents."""
        own = paddle.index_select(document_emb, paddle.to_tensor(teacher.columns.ravel()))
        own = own.reshape([*teacher.columns.shape, document_emb.shape[1]])
        student = scale * (query_emb.unsqueeze(1) * own).sum(axis=2)
        teacher_scale = scale if self.teacher_scale is None else self.teacher_scale
        scores = paddle.to_tensor(teacher.scores, dtype=student.dtype)
        return kl_divergence(student, teacher_scale * scores, paddle.to_tensor(teacher.is_document))
