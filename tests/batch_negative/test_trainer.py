"""A training step: its gradient by every way to compute it, the optimizer, the learning rate, several ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.amp import grad_scaler

import train_batch_neg
from batch_negative.batches import PairBatcher, PlannedStep
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.resume import read_training_state
from batch_negative.trainer import NonFiniteLoss, Trainer, make_optimizer
from common.device import STRIDE_FLAG, set_device, set_seed
from data import TextPair
from helpers import all_pairs, assert_close, train_options
from modeling.checkpoint import create_model
from modeling.cpu_training_layers import speed_up_training

PAIRS = [
    TextPair(query, title, tuple(title for _, title in all_pairs()[row + 20 : row + 20 + row % 3]))
    for row, (query, title) in enumerate(all_pairs()[:11])
]
PAIRS += [TextPair(PAIRS[0].query, PAIRS[4].title), TextPair(PAIRS[3].query, PAIRS[3].title)]
ROWS = np.arange(len(PAIRS))


class GradientsOnly:
    """Stands in for the optimizer: keeps the gradients that it was to step on."""

    def __init__(self, model: SemanticIndexBatchNeg) -> None:
        self._model = model

    def get_lr(self) -> float:
        return 0.0

    def step(self) -> None:
        named = self._model.named_parameters()
        self.gradients = {name: None if value.grad is None else value.grad.numpy() for name, value in named}

    def clear_grad(self) -> None:
        self._model.clear_gradients()


def make_trainer(
    folder: Path,
    *,
    chunk_texts: int | None = None,
    recompute: bool = False,
    fast_layers: bool = False,
    dropout: float = 0.1,
    rank: int = 0,
    **options: object,
) -> Trainer:
    """Trains on PAIRS, with the same weights each time, which stay as they are."""
    set_seed(3)
    model, tokenizer = create_model(
        SemanticIndexBatchNeg,
        from_scratch=str(folder),
        pooling="mean",
        output_emb_size=16,
        max_seq_length=24,
        dropout=dropout,
    )
    if recompute:
        model.ptm.recompute_enable()
    if fast_layers:
        speed_up_training(model)
    _, scheduler = make_optimizer(
        model, learning_rate=0.1, total_steps=9, warmup_proportion=0.0, weight_decay=0.0, max_grad_norm=1.0
    )
    collate = PairBatcher(tokenizer, PAIRS, chunk_texts=chunk_texts)
    common = {"rank": rank, "seed": 5, "margin": 0.2, "scale": 30.0}
    return Trainer(model, collate, GradientsOnly(model), scheduler, **common, **options)


def gradients(folder: Path, batches: list[np.ndarray], **options: object) -> tuple[float, dict[str, np.ndarray | None]]:
    """The loss and the gradient of a step of `make_trainer`."""
    trainer = make_trainer(folder, **options)
    step = trainer.step(PlannedStep(1, 1, [[rows] for rows in batches]))
    return step.loss, trainer.optimizer.gradients


def assert_same(
    first: tuple[float, dict[str, np.ndarray | None]], second: tuple[float, dict[str, np.ndarray | None]]
) -> None:
    assert first[0] == pytest.approx(second[0])  # to 1e-6 of it
    assert first[1].keys() == second[1].keys()
    for name, value in first[1].items():
        if value is None:
            assert second[1][name] is None, name
        else:
            assert_close(value, second[1][name], name)


@pytest.mark.parametrize("chunk_texts", [1, 3, 7, 16, 1000])
def test_gradient_cache_changes_nothing(model_folder: Path, chunk_texts: int) -> None:
    """With dropout on, remainders, masks and hard negatives."""
    direct = gradients(model_folder, [ROWS], chunk_texts=chunk_texts, backward=direct_backward)
    cached = gradients(model_folder, [ROWS], chunk_texts=chunk_texts, backward=cached_backward)
    assert_same(cached, direct)
    assert max(np.abs(value).max() for value in direct[1].values() if value is not None) > 1e-2


def test_dropout_is_on_and_differs_between_batches(model_folder: Path, still_model_folder: Path) -> None:
    with_dropout = gradients(model_folder, [ROWS])
    assert with_dropout[0] != gradients(still_model_folder, [ROWS], dropout=0.0)[0]
    twice = gradients(model_folder, [ROWS, ROWS])  # two batches of the same rows
    assert twice[0] != pytest.approx(with_dropout[0], abs=1e-6)


def test_dropout_differs_between_steps(model_folder: Path) -> None:
    trainer = make_trainer(model_folder)  # its optimizer leaves the weights as they are
    first, again, second = (trainer.step(PlannedStep(number, 1, [[ROWS]])).loss for number in (1, 1, 2))
    assert first == again
    assert first != pytest.approx(second, abs=1e-6)


def test_dropout_differs_between_ranks(model_folder: Path) -> None:
    losses = []
    for rank in (0, 1):
        rows = [np.array([], np.int64)] * 2
        rows[rank] = ROWS
        trainer = make_trainer(model_folder, rank=rank, cross_device=False)
        losses.append(trainer.step(PlannedStep(1, 1, [rows])).loss)
    assert losses[0] != pytest.approx(losses[1], abs=1e-6)


def test_chunks_change_nothing_without_dropout(still_model_folder: Path) -> None:
    whole = gradients(still_model_folder, dropout=0.0, batches=[ROWS], chunk_texts=1000)
    assert_same(
        gradients(still_model_folder, dropout=0.0, batches=[ROWS], chunk_texts=4, backward=cached_backward), whole
    )
    assert_same(gradients(still_model_folder, dropout=0.0, batches=[ROWS]), whole)


@pytest.mark.parametrize("backward", [direct_backward, cached_backward])
def test_accumulated_batches_count_by_their_pairs(
    still_model_folder: Path, backward: Callable[..., paddle.Tensor]
) -> None:
    options = {"dropout": 0.0, "backward": backward}
    loss, accumulated = gradients(still_model_folder, batches=[ROWS[:9], ROWS[9:]], **options)
    parts = [gradients(still_model_folder, batches=[rows], **options) for rows in (ROWS[:9], ROWS[9:])]
    shares = 9 / 13, 4 / 13
    assert loss == pytest.approx(sum(share * part[0] for share, part in zip(shares, parts, strict=True)), abs=1e-6)
    for name, value in accumulated.items():
        if value is not None:
            expected = sum(share * part[1][name] for share, part in zip(shares, parts, strict=True))
            assert_close(value, expected, name)


@pytest.mark.parametrize("backward", [direct_backward, cached_backward])
def test_recomputation_changes_nothing(model_folder: Path, backward: Callable[..., paddle.Tensor]) -> None:
    plain = gradients(model_folder, [ROWS], chunk_texts=8, backward=backward)
    assert_same(gradients(model_folder, [ROWS], chunk_texts=8, backward=backward, recompute=True), plain)


def test_fast_layers_change_nothing(still_model_folder: Path) -> None:
    plain = gradients(still_model_folder, [ROWS], chunk_texts=8, dropout=0.0)
    assert_same(gradients(still_model_folder, [ROWS], chunk_texts=8, dropout=0.0, fast_layers=True), plain)


def test_fast_layers_repeat_their_dropout(model_folder: Path) -> None:
    """In a second pass and in recomputation, as Paddle's do."""
    plain = gradients(model_folder, [ROWS], chunk_texts=8, fast_layers=True)
    assert plain[0] != gradients(model_folder, [ROWS], chunk_texts=8)[0]
    options = {"chunk_texts": 8, "fast_layers": True}
    assert_same(gradients(model_folder, [ROWS], recompute=True, **options), plain)
    assert_same(gradients(model_folder, [ROWS], backward=cached_backward, **options), plain)


def test_copying_transpositions_change_nothing(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRIDE_FLAG, raising=False)
    paddle.set_flags({STRIDE_FLAG: True})
    plain = gradients(model_folder, [ROWS])
    set_device("cpu")
    assert not paddle.get_flags(STRIDE_FLAG)[STRIDE_FLAG]
    copying = gradients(model_folder, [ROWS])
    assert copying[0] == plain[0]
    for name, value in plain[1].items():
        np.testing.assert_array_equal(copying[1][name], value, err_msg=name)


def test_nan_loss_names_the_rows_of_all_batches(model_folder: Path) -> None:
    trainer = make_trainer(model_folder)
    trainer.model.emb_reduce_linear.bias.set_value(paddle.full([16], np.nan))
    with pytest.raises(NonFiniteLoss) as error:
        trainer.step(PlannedStep(1, 1, [[ROWS[:4]], [ROWS[4:9]]]))
    assert error.value.rows == list(range(9))


def test_biases_and_norms_do_not_decay(model_folder: Path) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    before = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    optimizer, _ = make_optimizer(
        model, learning_rate=0.1, total_steps=10, warmup_proportion=0.0, weight_decay=0.5, max_grad_norm=1.0
    )
    for parameter in model.parameters():
        parameter.grad = paddle.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decays = name.endswith(".weight") and "norm" not in name
        np.testing.assert_allclose(parameter.numpy(), before[name] * (0.95 if decays else 1.0), rtol=1e-5, err_msg=name)


def test_learning_rate_rises_and_falls_linearly(model_folder: Path) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    optimizer, scheduler = make_optimizer(
        model, learning_rate=1.0, total_steps=10, warmup_proportion=0.2, weight_decay=0.0, max_grad_norm=1.0
    )
    rates = []
    for _ in range(10):
        rates.append(optimizer.get_lr())
        scheduler.step()
    np.testing.assert_allclose(rates, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


@pytest.mark.parametrize("warmup_proportion", [0.0, 0.1, 0.37, 0.999])
@pytest.mark.parametrize("total_steps", [1, 7, 1000])
def test_learning_rate_equals_paddlenlps(total_steps: int, warmup_proportion: float) -> None:
    """In every bit: version 1 used PaddleNLP's class, and its trainings are resumed."""
    from paddlenlp.transformers import LinearDecayWithWarmup  # after modeling.backbone, which imports it in order

    original = LinearDecayWithWarmup(2e-3, total_steps, warmup_proportion)
    options = {"learning_rate": 2e-3, "total_steps": total_steps, "warmup_proportion": warmup_proportion}
    optimizer, scheduler = make_optimizer(paddle.nn.Linear(1, 1), weight_decay=0.0, max_grad_norm=1.0, **options)
    for step in range(total_steps + 3):
        assert optimizer.get_lr() == original.get_lr()
        resumed_optimizer, resumed = make_optimizer(
            paddle.nn.Linear(1, 1), weight_decay=0.0, max_grad_norm=1.0, **options
        )
        resumed.step(step)  # as Trainer.restore does
        assert resumed_optimizer.get_lr() == original.get_lr()
        scheduler.step()
        original.step()


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_gradients_are_clipped_unless_the_norm_is_0(model_folder: Path, norm: float) -> None:
    model, _ = create_model(SemanticIndexBatchNeg, from_scratch=str(model_folder))
    before = model.emb_reduce_linear.bias.numpy()
    optimizer, _ = make_optimizer(
        model, learning_rate=0.1, total_steps=10, warmup_proportion=0.0, weight_decay=0.0, max_grad_norm=norm
    )
    model.emb_reduce_linear.bias.grad = paddle.full_like(model.emb_reduce_linear.bias, 100.0)
    optimizer.step()
    moment = next(value for name, value in optimizer.state_dict().items() if name.endswith("moment1_0"))
    assert not np.array_equal(model.emb_reduce_linear.bias.numpy(), before)
    assert bool((moment.numpy() > 1).all()) == (norm == 0.0)


def test_loss_scaling_stays_on(
    model_folder: Path, recall_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GradScaler is told that there is a GPU; it counts the steps whose gradients are finite."""
    on_a_gpu = SimpleNamespace(is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False)
    monkeypatch.setattr(grad_scaler, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=on_a_gpu))
    monkeypatch.setattr(train_batch_neg, "check_options", lambda *_: None)
    options = train_options(
        model_folder, recall_data, tmp_path, "--use_amp", "--amp_loss_scale", "1024", "--save_steps"
    )
    assert train_batch_neg.main([*options, "1", "--max_steps", "2"]) == 0
    scaler = read_training_state(tmp_path / "model_2").progress["loss_scaler"]
    assert (scaler["scale"], scaler["incr_count"]) == ([1024.0], 2)
    shutil.rmtree(tmp_path / "model_2")
    assert train_batch_neg.main([*options, "1", "--max_steps", "2", "--resume_from", "latest"]) == 0
    assert read_training_state(tmp_path / "model_2").progress["loss_scaler"] == scaler
