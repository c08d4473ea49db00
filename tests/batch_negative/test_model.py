"""The in-batch negatives loss against a double loop in NumPy, and the model's loss of a batch in chunks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest

from batch_negative.batches import PairBatcher
from batch_negative.model import SemanticIndexBatchNeg, in_batch_negatives_loss
from data import TextPair
from helpers import all_pairs
from modeling.checkpoint import create_model


def slow_loss(queries: np.ndarray, titles: np.ndarray, margin: float, scale: float, mask: np.ndarray | None) -> float:
    """The definition, one logit after the other."""
    losses = []
    for i, query in enumerate(queries):
        exponentials = []
        for j, title in enumerate(titles):
            if i != j and mask is not None and mask[i, j]:
                continue
            logit = scale * (float(query @ title) - (margin if i == j else 0.0))
            exponentials.append(np.exp(logit))
            if i == j:
                positive = np.exp(logit)
        losses.append(-np.log(positive / sum(exponentials)))
    return float(np.mean(losses))


def slow_gradient(function: Callable[[np.ndarray], float], matrix: np.ndarray) -> np.ndarray:
    """Central differences, one element after the other."""
    gradient = np.empty_like(matrix)
    for index in np.ndindex(matrix.shape):
        step = np.zeros_like(matrix)
        step[index] = 1e-6
        gradient[index] = (function(matrix + step) - function(matrix - step)) / 2e-6
    return gradient


def unit_rows(rng: np.random.Generator, rows: int) -> np.ndarray:
    matrix = rng.normal(size=(rows, 5))
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


@pytest.mark.parametrize("hard_negatives", [0, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_loss_equals_a_double_loop(hard_negatives: int, masked: bool, margin: float) -> None:
    rng = np.random.default_rng(hard_negatives)
    queries, titles = unit_rows(rng, 4), unit_rows(rng, 4 + hard_negatives)
    mask = rng.random((4, 4 + hard_negatives)) < 0.4 if masked else None
    if masked:
        np.fill_diagonal(mask, True)  # must change nothing
    query_emb, title_emb = paddle.to_tensor(queries), paddle.to_tensor(titles)
    query_emb.stop_gradient = title_emb.stop_gradient = False

    mask_tensor = None if mask is None else paddle.to_tensor(mask)
    loss = in_batch_negatives_loss(query_emb, title_emb, margin=margin, scale=5.0, mask=mask_tensor)
    loss.backward()

    assert float(loss) == pytest.approx(slow_loss(queries, titles, margin, 5.0, mask), abs=1e-9)
    by_query = slow_gradient(lambda changed: slow_loss(changed, titles, margin, 5.0, mask), queries)
    by_title = slow_gradient(lambda changed: slow_loss(queries, changed, margin, 5.0, mask), titles)
    np.testing.assert_allclose(query_emb.grad.numpy(), by_query, atol=1e-7)
    np.testing.assert_allclose(title_emb.grad.numpy(), by_title, atol=1e-7)


def test_loss_equals_the_originals() -> None:
    """Without a mask: cross_entropy(scale * (Q T' - margin * I), diagonal), written as the original does."""
    rng = np.random.default_rng(0)
    queries, titles = (paddle.to_tensor(unit_rows(rng, 6).astype("float32")) for _ in range(2))
    cosines = paddle.matmul(queries, titles, transpose_y=True)
    logits = (cosines - paddle.diag(paddle.full([6], 0.2))) * 30
    original = paddle.nn.functional.cross_entropy(logits, paddle.arange(6).reshape([-1, 1]))
    ours = in_batch_negatives_loss(queries, titles, margin=0.2, scale=30.0)
    assert float(ours) == pytest.approx(float(original), abs=1e-5)


@pytest.mark.parametrize("pairs", [2, 8, 64])
def test_loss_is_nan_if_a_vector_is_nan(pairs: int) -> None:
    """Paddle's own cross entropy gives log(pairs) from 8 pairs on."""
    vectors = paddle.to_tensor(unit_rows(np.random.default_rng(0), pairs).astype("float32"))
    broken = paddle.where(paddle.eye(pairs, 5) > 0, paddle.full_like(vectors, float("nan")), vectors)
    assert np.isnan(float(in_batch_negatives_loss(broken, vectors, margin=0.0, scale=30.0)))


def test_a_masked_title_gets_no_gradient() -> None:
    query, titles = (paddle.to_tensor(unit_rows(np.random.default_rng(rows), rows)) for rows in (1, 3))
    titles.stop_gradient = False
    mask = paddle.to_tensor([[True, True, False]])
    in_batch_negatives_loss(query, titles, margin=0.0, scale=30.0, mask=mask).backward()
    assert [bool(row.any()) for row in titles.grad.numpy()] == [True, False, True]


def test_a_batch_in_chunks_equals_encoding_each_text_alone(still_model_folder: Path) -> None:
    """The model's loss and its gradients."""
    texts = all_pairs()
    pairs = [
        TextPair(query, title, tuple(text for _, text in texts[row + 20 : row + 20 + row % 3]))
        for row, (query, title) in enumerate(texts[:9])
    ]
    pairs.append(TextPair(pairs[0].query, pairs[4].title))  # one query with two titles
    model, tokenizer = create_model(SemanticIndexBatchNeg, from_scratch=str(still_model_folder), dropout=0.0)
    batch = PairBatcher(tokenizer, pairs)([np.arange(10)])
    assert len(batch.chunks) > 1
    loss = model(batch, 0.2, 30.0)
    loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    model.clear_gradients()

    def vectors(texts: list[str]) -> paddle.Tensor:
        return paddle.concat([model.get_pooled_embedding(*map(paddle.to_tensor, tokenizer([text]))) for text in texts])

    columns = [pair.title for pair in pairs] + [text for pair in pairs for text in pair.hard_negatives]
    paired = {(pair.query, pair.title) for pair in pairs}
    mask = paddle.to_tensor([[(pair.query, text) in paired for text in columns] for pair in pairs])
    queries = vectors([pair.query for pair in pairs])
    slow = in_batch_negatives_loss(queries, vectors(columns), margin=0.2, scale=30.0, mask=mask)
    slow.backward()
    assert float(loss) == pytest.approx(float(slow), abs=1e-5)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad.numpy(), atol=1e-5, err_msg=name)
