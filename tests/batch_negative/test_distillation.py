"""The distillation loss against a double loop in NumPy, and a batch's against its pairs one after the other."""

from pathlib import Path

import numpy as np
import paddle
import pytest

import train_batch_neg
from batch_negative.batches import PairBatcher, ScoredDocuments
from batch_negative.distillation import Distillation, kl_divergence
from batch_negative.gradient_cache import cached_backward
from batch_negative.model import SemanticIndexBatchNeg, batch_loss
from common.errors import InputError
from data import TextPair
from helpers import all_pairs, assert_close, small_tokenizer, train_options, write_pairs
from modeling.checkpoint import create_model

# Pairs with 0 to 3 hard negatives, of which the teacher scores one above its title.
PAIRS = [
    TextPair(
        query,
        title,
        tuple(text for _, text in all_pairs()[row + 20 : row + 20 + row % 4]),
        tuple(float(place * row % 5) / 5 for place in range(1, 2 + row % 4)),
    )
    for row, (query, title) in enumerate(all_pairs()[:7])
]


def slow_loss(student: list[np.ndarray], teacher: list[np.ndarray]) -> float:
    """The definition; of each query the logits of its title and hard negatives."""
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        ours, theirs = (np.exp(logits) / np.exp(logits).sum() for logits in (ours, theirs))
        losses.append(sum(p * np.log(p / q) for p, q in zip(theirs, ours, strict=True)))
    return float(np.mean(losses))


def test_the_loss_equals_a_double_loop() -> None:
    """Values, and gradients by central differences; the last query has no hard negative."""
    rng = np.random.default_rng(0)
    counts = [4, 2, 3, 1]
    is_document = np.arange(4) < np.array(counts)[:, None]
    student, teacher = rng.normal(size=(2, 4, 4)) * 3

    def slow(logits: np.ndarray) -> float:
        return slow_loss(
            *([row[:count] for row, count in zip(each, counts, strict=True)] for each in (logits, teacher))
        )

    logits = paddle.to_tensor(student, stop_gradient=False)
    loss = kl_divergence(logits, paddle.to_tensor(teacher), paddle.to_tensor(is_document))
    loss.backward()
    assert float(loss) == pytest.approx(slow(student), abs=1e-9)
    for place in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[place] = 1e-6
        assert float(logits.grad[place]) == pytest.approx(
            (slow(student + step) - slow(student - step)) / 2e-6, abs=1e-6
        )


def test_a_student_like_its_teacher_has_no_loss() -> None:
    logits, every = paddle.randn([3, 4]), paddle.ones([3, 4], "bool")
    assert float(kl_divergence(logits, logits, every)) == pytest.approx(0, abs=1e-6)
    assert float(kl_divergence(logits, -logits, every)) > 0.01
    assert np.isnan(float(kl_divergence(logits * float("nan"), logits, every)))


def test_a_batch_has_the_scores_of_its_pairs() -> None:
    """Of all ranks, whose hard negatives follow their titles."""
    tokenizer = small_tokenizer()
    pairs = [pair._replace(query=f"q{row}") for row, pair in enumerate(PAIRS)]
    ranks = [np.array([3, 0]), np.array([], dtype=np.int64), np.array([2, 5])]
    teacher = PairBatcher(tokenizer, pairs)(ranks, rank=2).teacher
    assert isinstance(teacher, ScoredDocuments)
    rows = np.concatenate(ranks)
    documents = [pairs[row].title for row in rows] + [text for row in rows for text in pairs[row].hard_negatives]
    assert teacher.columns.shape == teacher.scores.shape == (4, 4)
    for place, row in enumerate(rows):
        own = teacher.is_document[place]
        found = [documents[column] for column in teacher.columns[place][own]]
        assert found == [pairs[row].title, *pairs[row].hard_negatives]
        assert teacher.scores[place][own] == pytest.approx(pairs[row].teacher_scores)
    without = [pair._replace(teacher_scores=()) for pair in pairs]
    assert PairBatcher(tokenizer, without)(ranks).teacher is None


@pytest.mark.filterwarnings("error::RuntimeWarning")  # NumPy's, beside the one line
def test_nan_loss_names_the_lines(model_folder: Path, tmp_path: Path) -> None:
    rows = [(pair.query, pair.title, *pair.hard_negatives, *map(str, pair.teacher_scores)) for pair in PAIRS]
    write_pairs(tmp_path / "train.csv", rows)
    options = ["--teacher_scores", "--learning_rate", "1e30", "--batch_size", str(len(rows))]
    with pytest.raises(InputError, match="the loss of step 2 is nan; the batch has lines 1, 2, 3, 4, 5, 6, 7 of "):
        train_batch_neg.main(train_options(model_folder, tmp_path, tmp_path / "out", *options))


def test_scores_without_hard_negatives_are_refused(model_folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "train.csv", [(pair.query, pair.title, "0.5") for pair in PAIRS])
    options = train_options(model_folder, tmp_path, tmp_path / "out", "--teacher_scores", "--batch_size", "2")
    with pytest.raises(InputError, match=r"no line has a hard negative, .* leave out --teacher_scores"):
        train_batch_neg.main(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("teacher_scale", [None, 5.0])
def test_a_batch_s_loss_is_that_of_its_pairs(still_model_folder: Path, teacher_scale: float | None) -> None:
    """By the gradient cache too, in value and gradient; it is added to the loss of the in-batch negatives."""
    model, tokenizer = create_model(
        SemanticIndexBatchNeg, from_scratch=str(still_model_folder), pooling="mean", output_emb_size=16, dropout=0.0
    )
    batch = PairBatcher(tokenizer, PAIRS, chunk_texts=3)([np.arange(len(PAIRS))])
    distillation = Distillation(2.0, teacher_scale)
    loss = model(batch, 0.2, 30.0, distillation)
    loss.backward()
    gradients = {
        name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.clear_gradients()

    def vectors(*texts: str) -> np.ndarray:
        return np.concatenate([model.embed(*tokenizer([text])) for text in texts])

    cosines = [vectors(pair.title, *pair.hard_negatives) @ vectors(pair.query)[0] for pair in PAIRS]
    scores = [(teacher_scale or 30.0) * np.array(pair.teacher_scores) for pair in PAIRS]
    expected = slow_loss([30.0 * each for each in cosines], scores)
    assert float(loss) == pytest.approx(float(model(batch, 0.2, 30.0)) + 2.0 * expected, rel=1e-5)

    cached = cached_backward(
        lambda chunk: model.encode_chunk(batch.chunks[chunk]),
        len(batch.chunks),
        lambda rows: batch_loss(rows, batch, margin=0.2, scale=30.0, distillation=distillation),
        1.0,
    )
    assert float(cached) == pytest.approx(float(loss), rel=1e-6)
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad.numpy(), gradients[parameter_name], parameter_name)
