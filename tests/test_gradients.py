"""The ways to the gradient of a batch: gradient cache, accumulation, recomputation, the CPU's own linear layer."""

from pathlib import Path

import numpy as np
import paddle
import pytest

from batch_negative.batches import PairBatcher, PlannedStep
from batch_negative.gradient_cache import cached_backward, direct_backward
from batch_negative.model import SemanticIndexBatchNeg
from batch_negative.trainer import NonFiniteLoss, Trainer, make_optimizer
from common.device import STRIDE_FLAG, set_device, set_seed
from data import TextPair
from helpers import all_pairs, assert_close
from modeling.checkpoint import create_model
from modeling.cpu_training_layers import speed_up_training

PAIRS = [
    TextPair(query, title, all_pairs()[row + 20][1] if row % 3 == 0 else None)
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
    return step.loss, trainer._optimizer.gradients


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
def test_the_gradient_cache_changes_nothing(model_folder: Path, chunk_texts: int) -> None:
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
def test_accumulated_batches_weigh_by_their_pairs(still_model_folder: Path, backward: object) -> None:
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
def test_recomputation_changes_nothing(model_folder: Path, backward: object) -> None:
    plain = gradients(model_folder, [ROWS], chunk_texts=8, backward=backward)
    assert_same(gradients(model_folder, [ROWS], chunk_texts=8, backward=backward, recompute=True), plain)


def test_fast_layers_change_nothing(still_model_folder: Path) -> None:
    plain = gradients(still_model_folder, [ROWS], chunk_texts=8, dropout=0.0)
    assert_same(gradients(still_model_folder, [ROWS], chunk_texts=8, dropout=0.0, fast_layers=True), plain)


def test_fast_layers_drop_the_same_elements_again(model_folder: Path) -> None:
    """In a second pass and in recomputation, as Paddle's do."""
    plain = gradients(model_folder, [ROWS], chunk_texts=8, fast_layers=True)
    assert plain[0] != gradients(model_folder, [ROWS], chunk_texts=8)[0]
    options = {"chunk_texts": 8, "fast_layers": True}
    assert_same(gradients(model_folder, [ROWS], recompute=True, **options), plain)
    assert_same(gradients(model_folder, [ROWS], backward=cached_backward, **options), plain)


def test_transpositions_that_copy_change_nothing(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRIDE_FLAG, raising=False)
    paddle.set_flags({STRIDE_FLAG: True})
    plain = gradients(model_folder, [ROWS])
    set_device("cpu")
    assert not paddle.get_flags(STRIDE_FLAG)[STRIDE_FLAG]
    copying = gradients(model_folder, [ROWS])
    assert copying[0] == plain[0]
    for name, value in plain[1].items():
        np.testing.assert_array_equal(copying[1][name], value, err_msg=name)


def test_the_users_own_setting_of_transpositions_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRIDE_FLAG, "1")
    paddle.set_flags({STRIDE_FLAG: True})
    set_device("cpu")
    assert paddle.get_flags(STRIDE_FLAG)[STRIDE_FLAG]


def test_a_loss_that_is_no_number_names_the_rows_of_all_batches(model_folder: Path) -> None:
    trainer = make_trainer(model_folder)
    trainer._model.emb_reduce_linear.bias.set_value(paddle.full([16], np.nan))
    with pytest.raises(NonFiniteLoss) as error:
        trainer.step(PlannedStep(1, 1, [[ROWS[:4]], [ROWS[4:9]]]))
    assert error.value.rows == list(range(9))
