"""Training on texts in one row, without padding, gives what training on padded batches gives."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from batch_negative.batches import PairBatcher, PlannedStep
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import Trainer, make_optimizer
from data import TextPair
from helpers import all_pairs, make_model_folder, new_model
from modeling import packed_texts
from modeling.cpu_training_layers import speed_up_training
from modeling.packed_texts import PackedMultiHeadAttention, TextRun, _PackedAttention, pack_texts, pool_packed
from train_batch_neg import prepare_model

LENGTHS = [9, 9, 9, 6, 4, 4, 1, 7]  # of tokens; also one that isn't in order


def fast_model(folder: Path, **options: Any) -> SemanticIndexBatchNeg:
    """With the same random weights in each call; it still trains on padded batches."""
    model = new_model(folder, SemanticIndexBatchNeg, **options).model
    speed_up_training(model)
    return model


def padded_batch(lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, 0 where there is padding, and token types of both kinds."""
    random = np.random.default_rng(0)
    is_token = np.arange(width) < np.array(lengths)[:, None]
    input_ids = random.integers(1, 50, is_token.shape) * is_token
    return input_ids, random.integers(0, 2, is_token.shape) * is_token


def gradients(model: SemanticIndexBatchNeg, vectors: paddle.Tensor) -> dict[str, np.ndarray]:
    """Of the parameters, for a random linear function of the vectors."""
    model.clear_gradients()
    weights = np.random.default_rng(1).standard_normal(vectors.shape).astype(np.float32)
    (vectors * paddle.to_tensor(weights)).sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(packed: dict[str, np.ndarray], padded: dict[str, np.ndarray]) -> None:
    assert packed.keys() == padded.keys()
    for name, value in padded.items():
        np.testing.assert_allclose(packed[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("model_type", ["ernie", "bert"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "first_token"])
@pytest.mark.parametrize("lengths", [LENGTHS, [5], [3, 3]])
def test_packed_texts_have_the_vectors_and_gradients_of_padded_ones(
    tmp_path: Path, model_type: str, pooling: str, lengths: list[int]
) -> None:
    architecture = {"ernie": "ErnieModel", "bert": "BertModel"}[model_type]
    folder = make_model_folder(tmp_path / "model", model_type=model_type, architectures=[architecture])
    model = fast_model(folder, pooling=pooling)
    model.eval()
    batch = padded_batch(lengths, 12)
    expected = model.encode_chunk(batch)
    expected_gradients = gradients(model, expected)
    model.packing = pack_texts(model)
    assert model.packing
    vectors = model.encode_chunk(batch)
    np.testing.assert_allclose(vectors.numpy(), expected.numpy(), atol=1e-6)
    assert_same(gradients(model, vectors), expected_gradients)
    np.testing.assert_allclose(model.embed(*batch), expected.numpy(), atol=1e-6)  # padded again


def test_no_padding_is_computed(model_folder: Path) -> None:
    model = fast_model(model_folder, pooling="mean")
    model.packing = pack_texts(model)
    seen = []
    layer = model.ptm.encoder.layers[0].linear1
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1]))
    model.encode_chunk(padded_batch(LENGTHS, 12))
    assert seen == [[1, sum(LENGTHS)]]


def twin_attention(
    q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, heads: int, runs: list[TextRun], factors: list[np.ndarray]
) -> paddle.Tensor:
    """Text by text, with Paddle's own gradients. factors: what each run's weights are multiplied with."""
    only_first = q.shape[1] != k.shape[1]
    q, k, v = (rows.reshape([-1, heads, rows.shape[2] // heads]).transpose([1, 0, 2]) for rows in (q, k, v))
    results, q_start, start = [], 0, 0
    for run, factor in zip(runs, factors, strict=True):
        for text in range(run.texts):
            q_length = 1 if only_first else run.length
            own_q, rows = q[:, q_start : q_start + q_length], slice(start, start + run.length)
            weights = F.softmax(paddle.matmul(own_q, k[:, rows], transpose_y=True) / math.sqrt(q.shape[2]))
            results.append(paddle.matmul(weights * paddle.to_tensor(factor[text]), v[:, rows]))
            q_start, start = q_start + q_length, start + run.length
    return paddle.concat(results, axis=1).transpose([1, 0, 2]).flatten(start_axis=1).unsqueeze(0)


@pytest.mark.parametrize("only_first", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("are_small", [False, True])
def test_attention_and_its_gradient(
    only_first: bool, p: float, are_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the matrix products of long texts, which Paddle computes."""
    monkeypatch.setattr(packed_texts, "MAX_SMALL_PRODUCT", packed_texts.MAX_SMALL_PRODUCT if are_small else 0)
    heads, size, runs = 2, 4, [TextRun(2, 5), TextRun(1, 3), TextRun(3, 1)]
    tokens, texts = sum(run.texts * run.length for run in runs), sum(run.texts for run in runs)
    drawn = []
    real = packed_texts._dropout_factors
    monkeypatch.setattr(packed_texts, "_dropout_factors", lambda *given: drawn.append(real(*given)) or drawn[-1])
    random = np.random.default_rng(0)
    arrays = [
        random.standard_normal((1, rows, heads * size)).astype(np.float32)
        for rows in (texts if only_first else tokens, tokens, tokens)
    ]
    given = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    twins = [paddle.to_tensor(array, stop_gradient=False) for array in arrays]
    result = _PackedAttention.apply(*given, heads, runs, p)
    factors = drawn[0] if p else [np.ones((run.texts, heads, 1, 1), np.float32) for run in runs]
    expected = twin_attention(*twins, heads, runs, factors)
    np.testing.assert_allclose(result.numpy(), expected.numpy(), atol=1e-6)
    weights = paddle.to_tensor(random.standard_normal(result.shape).astype(np.float32))
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    for tensor, twin in zip(given, twins, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), twin.grad.numpy(), atol=1e-5)


def test_attention_drops_its_share_of_the_weights() -> None:
    factors = packed_texts._dropout_factors([np.ones((50, 4, 10, 10)), np.ones((1, 4, 7, 7))], 0.1)
    assert [factor.shape for factor in factors] == [(50, 4, 10, 10), (1, 4, 7, 7)]
    assert (factors[0] == 0).mean() == pytest.approx(0.1, abs=0.01)
    assert factors[0].max() == pytest.approx(1 / 0.9, rel=1e-4)


@pytest.mark.parametrize("chunk_texts", [None, 7])
def test_training_takes_the_same_steps(still_model_folder: Path, chunk_texts: int | None) -> None:
    """Also with the gradient cache, of which each chunk is packed."""
    pairs = [TextPair(*pair) for pair in all_pairs()[:48]]
    losses = []
    for has_padding in (True, False):
        model, tokenizer = new_model(still_model_folder, SemanticIndexBatchNeg, pooling="mean", dropout=0.0)
        prepare_model(model, "cpu", False, False)
        if has_padding:
            model.packing = None
        optimizer, scheduler = make_optimizer(
            model, learning_rate=1e-2, total_steps=6, warmup_proportion=0.0, weight_decay=0.0, max_grad_norm=5.0
        )
        batcher = PairBatcher(tokenizer, pairs, chunk_texts=chunk_texts, chunk_count=model.chunks_per_batch)
        backward = cached_backward if chunk_texts else direct_backward
        trainer = Trainer(
            model, batcher, optimizer, scheduler, rank=0, seed=0, margin=0.2, scale=20.0, backward=backward
        )
        planned = [PlannedStep(step, 1, [[np.arange(48)]]) for step in range(1, 7)]
        losses.append([trainer.step(step).loss for step in planned])
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_other_backbones_and_recomputed_layers_are_padded(tmp_path: Path, model_folder: Path) -> None:
    roberta = make_model_folder(tmp_path / "roberta", model_type="roberta", architectures=["RobertaModel"])
    assert pack_texts(fast_model(roberta)) is None
    model = fast_model(model_folder)
    model.ptm.encoder.layers[0].self_attn.__class__ = type("Own", (PackedMultiHeadAttention,), {})
    assert pack_texts(model) is None
    model = fast_model(model_folder)
    prepare_model(model, "cpu", use_recompute=True, unsupervised=False)
    assert model.packing is None
    model = fast_model(model_folder)
    prepare_model(model, "cpu", use_recompute=False, unsupervised=False)
    assert model.packing is not None


def test_the_layers_forget_the_texts_when_a_step_fails(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fast_model(model_folder)
    packing = pack_texts(model)
    assert packing

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(model.ptm.encoder, "forward", fail)
    with pytest.raises(MemoryError):
        pool_packed(model, packing, *padded_batch([3], 3))
    assert packing.runs == []
