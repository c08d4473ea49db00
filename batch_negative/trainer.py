"""Training steps: which pairs each of them sees, and how it changes the model, on one rank or many."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import paddle
from paddlenlp.transformers import LinearDecayWithWarmup

from batch_negative.gradient_cache import direct_backward
from batch_negative.model import SemanticIndexBatchNeg, batch_loss
from checkpoint import TrainingState, optimizer_arrays, restore_optimizer
from data import PairCollator, TextPair, batched, epoch_batches
from distributed import all_reduce_gradients
from runtime import InputError


def make_optimizer(
    model: paddle.nn.Layer,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_proportion: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[paddle.optimizer.AdamW, paddle.optimizer.lr.LRScheduler]:
    """AdamW without weight decay on biases and norms, and its learning rate: a linear warm-up, then linear decay.

    max_grad_norm: 0 doesn't clip.
    """
    decayed = {
        parameter.name
        for name, parameter in model.named_parameters()
        if not any(part == "bias" or "norm" in part for part in name.split("."))
    }
    scheduler = LinearDecayWithWarmup(learning_rate, total_steps, warmup_proportion)
    optimizer = paddle.optimizer.AdamW(
        learning_rate=scheduler,
        parameters=model.parameters(),
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(max_grad_norm) if max_grad_norm else None,
    )
    return optimizer, scheduler


def check_batch_size(
    batch_size: int, world_size: int, pairs: Sequence[TextPair], train_set_file: str, *, cross_device: bool = True
) -> None:
    """Raises InputError where a step would need more pairs than there are, or would have no negatives."""
    if batch_size * world_size > len(pairs):
        remedy = f"{train_set_file} has {len(pairs)} pairs; use at most --batch_size {len(pairs) // world_size}"
        raise InputError(f"--batch_size {batch_size} on {world_size} process(es): {remedy}")
    scored = batch_size * (world_size if cross_device else 1)
    if scored == 1 and not any(pair.hard_negative for pair in pairs):
        raise InputError("--batch_size 1: leaves no other title as a negative; use 2 or more")


class PlannedStep(NamedTuple):
    """Where a step stands, and the rows of the training file that it trains on: `batches[batch][rank]`."""

    number: int  # from 1, over all epochs
    epoch: int  # from 1
    batches: list[list[np.ndarray]]


class Plan:
    """Which pairs each step trains on: it follows from these arguments alone.

    batch_size: pairs on each rank; accumulation: batches a step; max_steps: in place of epochs, which then go on until
    it is reached; lengths: tokens of the pairs, to group them by.
    """

    def __init__(
        self,
        pairs: int,
        batch_size: int,
        *,
        seed: int,
        epochs: int,
        max_steps: int | None = None,
        accumulation: int = 1,
        world_size: int = 1,
        lengths: np.ndarray | None = None,
    ) -> None:
        self._accumulation = accumulation
        self._epoch_batches = partial(
            epoch_batches, pairs, batch_size, seed=seed, world_size=world_size, lengths=lengths
        )
        self.steps_per_epoch = math.ceil(math.ceil(pairs / (batch_size * world_size)) / accumulation)
        self.total_steps = max_steps or epochs * self.steps_per_epoch

    def epoch(self, step: int) -> tuple[int, bool]:
        """(epoch of a step, whether the step ends it)."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        return epoch + 1, place == self.steps_per_epoch - 1

    def steps(self, first: int) -> Iterator[PlannedStep]:
        """The steps after `first`."""
        epoch_steps: list[list[list[np.ndarray]]] = []
        for number in range(first + 1, self.total_steps + 1):
            epoch, place = divmod(number - 1, self.steps_per_epoch)
            if place == 0 or not epoch_steps:
                epoch_steps = list(batched(self._epoch_batches(epoch=epoch + 1), self._accumulation))
            yield PlannedStep(number, epoch + 1, epoch_steps[place])


class Step(NamedTuple):
    """What is known after a training step."""

    number: int  # from 1, over all epochs
    epoch: int  # from 1
    loss: float  # mean over the pairs of all ranks
    learning_rate: float  # at which the step was taken
    pairs: int  # of all ranks
    stop: bool  # whether a rank was told to stop


class Trainer:
    """Takes training steps.

    backward: `direct_backward` or `cached_backward`; cross_device: score against the titles of all ranks; amp_dtype:
    of matrix products, None for float32; loss_scale: at the start, for float16.
    """

    def __init__(
        self,
        model: SemanticIndexBatchNeg,
        collate: PairCollator,
        optimizer: paddle.optimizer.Optimizer,
        scheduler: paddle.optimizer.lr.LRScheduler,
        *,
        rank: int,
        seed: int,
        margin: float,
        scale: float,
        cross_device: bool = True,
        backward: Callable[..., paddle.Tensor] = direct_backward,
        amp_dtype: str | None = None,
        loss_scale: float = 32768.0,
    ) -> None:
        self._model, self._collate = model, collate
        self._optimizer, self._scheduler = optimizer, scheduler
        self._rank, self._seed = rank, seed
        self._margin, self._scale = margin, scale
        self._cross_device, self._backward = cross_device, backward
        self._amp_dtype = amp_dtype
        self._scaler = paddle.amp.GradScaler(enable=amp_dtype == "float16", init_loss_scaling=loss_scale)

    def step(self, planned: PlannedStep, stop: bool = False) -> Step:
        """Takes a step together with all ranks; `stop` asks all of them to stop after it.

        Raises NonFiniteLoss instead of taking a step on a loss that is no number.
        """
        pairs = sum(len(rows) for rank_rows in planned.batches for rows in rank_rows)
        own_loss = sum(
            self._add_gradients(rank_rows, pairs, (self._seed, self._rank, planned.number, place))
            for place, rank_rows in enumerate(planned.batches)
        )
        loss, stops = all_reduce_gradients(self._model.parameters(), [own_loss, float(stop)])
        if not math.isfinite(loss):
            raise NonFiniteLoss(planned.number, loss, [] if math.isfinite(own_loss) else self._scored(planned.batches))
        learning_rate = self._optimizer.get_lr()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.clear_grad()
        self._scheduler.step()
        return Step(planned.number, planned.epoch, loss, learning_rate, pairs, stops > 0)

    def state(self, progress: dict[str, Any]) -> TrainingState:
        """What `restore` needs, with whatever else `progress` holds."""
        return TrainingState(
            {**progress, "loss_scaler": _as_json(self._scaler.state_dict())},
            optimizer_arrays(self._model, self._optimizer),
        )

    def restore(self, state: TrainingState) -> None:
        """Goes on after the step `state.progress["step"]`; the model has that step's weights already."""
        restore_optimizer(self._model, self._optimizer, state.optimizer)
        self._scheduler.step(state.progress["step"])
        if state.progress["loss_scaler"]:
            self._scaler.load_state_dict(_from_json(state.progress["loss_scaler"]))

    def _add_gradients(self, rank_rows: list[np.ndarray], step_pairs: int, seeds: tuple[int, ...]) -> float:
        """Adds this rank's part of a batch's gradient and returns its part of the step's loss.

        rank_rows: the batch's rows for every rank; step_pairs: pairs of the step over all batches and ranks. The parts
        of all batches and ranks add up to the gradient and the mean loss over the step's pairs.
        """
        own_pairs = len(rank_rows[self._rank])
        if self._cross_device:
            batch = self._collate(rank_rows, self._rank)
            share = sum(map(len, rank_rows)) / step_pairs
            loss_share = share / len(rank_rows)  # every rank has the loss of all
        else:
            if not own_pairs:
                return 0.0
            batch = self._collate([rank_rows[self._rank]])
            share = loss_share = own_pairs / step_pairs

        def encode(chunk: int) -> paddle.Tensor:
            # Dropout is a function of the step and the chunk: a second pass and a resumed run repeat it.
            paddle.seed(int(np.random.SeedSequence([*seeds, chunk]).generate_state(1)[0]))
            with self._auto_cast():
                return self._model.encode_chunk(batch.chunks[chunk])

        loss_of = partial(batch_loss, batch=batch, margin=self._margin, scale=self._scale)
        if own_pairs:
            with self._auto_cast():  # outside of one in float16, GradScaler turns itself off for good
                factor = float(self._scaler.scale(paddle.full([], share)))
            loss = self._backward(encode, len(batch.chunks), loss_of, factor)
        else:  # it has no texts, yet the other ranks wait for it in the gather
            loss = loss_of(paddle.zeros([0, self._model.embedding_size]))
        return loss_share * float(loss)

    def _auto_cast(self) -> AbstractContextManager[None]:
        return paddle.amp.auto_cast(self._amp_dtype is not None, dtype=self._amp_dtype or "float16")

    def _scored(self, batches: list[list[np.ndarray]]) -> list[int]:
        """Rows that this rank's loss is made of."""
        shares = [rank_rows if self._cross_device else [rank_rows[self._rank]] for rank_rows in batches]
        return [int(row) for rank_rows in shares for rows in rank_rows for row in rows]


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in state.items()}


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(value, "float32") if isinstance(value, list) else value for name, value in state.items()}


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is NaN or infinite; `rows` are the pairs that this rank's is made of, if it is to blame."""

    def __init__(self, step: int, loss: float, rows: list[int]) -> None:
        super().__init__(f"the loss of step {step} is {loss}")
        self.rows = rows
