"""A training step: gradients of its batches, summed over the ranks, and the optimizer."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import paddle

from batch_negative.batches import PairBatcher, PlannedStep
from batch_negative.distillation import Distillation
from batch_negative.gradient_cache import direct_backward
from batch_negative.model import SemanticIndexBatchNeg, batch_loss
from batch_negative.resume import TrainingState, optimizer_arrays, restore_optimizer
from common.distributed import all_reduce_gradients
from common.errors import InputError


def make_optimizer(
    model: paddle.nn.Layer,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_proportion: float,
    weight_decay: float,
    max_grad_norm: float,
) -> tuple[paddle.optimizer.AdamW, paddle.optimizer.lr.LRScheduler]:
    """AdamW without weight decay on biases and norms, with linear warm-up and decay. max_grad_norm: 0 doesn't clip."""
    decayed = {
        parameter.name
        for name, parameter in model.named_parameters()
        if not any(part == "bias" or "norm" in part for part in name.split("."))
    }
    warmup_steps = int(warmup_proportion * total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    scheduler = paddle.optimizer.lr.LambdaDecay(learning_rate, factor)
    optimizer = paddle.optimizer.AdamW(
        learning_rate=scheduler,
        parameters=model.parameters(),
        weight_decay=weight_decay,
        apply_decay_param_fun=decayed.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(max_grad_norm) if max_grad_norm else None,
    )
    return optimizer, scheduler


class Step(NamedTuple):
    """The result of a training step."""

    number: int  # from 1, over all epochs
    epoch: int  # from 1
    loss: float  # mean over the step's pairs on all ranks
    learning_rate: float  # of this step
    pairs: int  # on all ranks
    stop: bool  # whether any rank was asked to stop


@dataclass
class Trainer:
    """Takes training steps.

    seed: of dropout; margin, scale: see `in_batch_negatives_loss`; distillation: see `batch_loss`; cross_device:
    whether queries are scored against the titles of all ranks; backward: `direct_backward` or `cached_backward`;
    use_amp: matrix products in amp_dtype; amp_loss_scale: the initial one, for float16. Raises InputError if the GPU
    lacks bfloat16.
    """

    model: SemanticIndexBatchNeg
    batcher: PairBatcher
    optimizer: paddle.optimizer.Optimizer
    scheduler: paddle.optimizer.lr.LRScheduler
    _: KW_ONLY
    rank: int
    seed: int
    margin: float
    scale: float
    distillation: Distillation | None = None
    cross_device: bool = True
    backward: Callable[..., paddle.Tensor] = direct_backward
    use_amp: bool = False
    amp_dtype: str = "float16"
    amp_loss_scale: float = 32768.0

    def __post_init__(self) -> None:
        if self.use_amp and self.amp_dtype == "bfloat16" and not paddle.amp.is_bfloat16_supported():
            raise InputError("--amp_dtype bfloat16: this GPU has no bfloat16; use --amp_dtype float16")
        is_enabled = self.use_amp and self.amp_dtype == "float16"
        self._scaler = paddle.amp.GradScaler(enable=is_enabled, init_loss_scaling=self.amp_loss_scale)

    @np.errstate(over="ignore", invalid="ignore")  # what overflows in a CPU layer is reported as the loss's NaN
    def step(self, planned: PlannedStep, stop: bool = False) -> Step:
        """Takes a step together with all ranks. stop: asks all of them to stop after it.

        Raises NonFiniteLoss, and leaves the weights as they are, if the loss is NaN or infinite.
        """
        pairs = sum(len(rows) for rank_rows in planned.batches for rows in rank_rows)
        own_loss = sum(
            self._add_gradients(rank_rows, pairs, (self.seed, self.rank, planned.number, batch_number))
            for batch_number, rank_rows in enumerate(planned.batches)
        )
        loss, stops = all_reduce_gradients(self.model.parameters(), [own_loss, float(stop)])
        if not math.isfinite(loss):
            rows = [] if math.isfinite(own_loss) else self._own_loss_rows(planned.batches)
            raise NonFiniteLoss(planned.number, loss, rows)
        learning_rate = self.optimizer.get_lr()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.clear_grad()
        self.scheduler.step()
        return Step(planned.number, planned.epoch, loss, learning_rate, pairs, stops > 0)

    def state(self, progress: dict[str, Any]) -> TrainingState:
        """`progress`, completed by what `restore` needs."""
        progress = {**progress, "loss_scaler": _as_json(self._scaler.state_dict())}
        return TrainingState(progress, optimizer_arrays(self.model, self.optimizer))

    def restore(self, state: TrainingState) -> None:
        """Restores optimizer, learning rate and loss scale of a state whose weights the model already has."""
        restore_optimizer(self.model, self.optimizer, state.optimizer)
        self.scheduler.step(state.progress["step"])
        if state.progress["loss_scaler"]:
            self._scaler.load_state_dict(_from_json(state.progress["loss_scaler"]))

    def _add_gradients(self, rank_rows: list[np.ndarray], step_pairs: int, seeds: tuple[int, ...]) -> float:
        """Adds this rank's part of a batch's gradient to the parameters', and returns its part of the step's loss.

        rank_rows: the batch's rows of each rank; step_pairs: pairs of the step in all batches on all ranks. Summed over
        batches and ranks, the parts are the gradient and the value of the mean loss of the step's pairs.
        """
        own_pairs = len(rank_rows[self.rank])
        if self.cross_device:
            batch = self.batcher(rank_rows, self.rank)
            share = sum(map(len, rank_rows)) / step_pairs
            loss_share = share / len(rank_rows)  # each rank computes the loss of all, but only its part of the gradient
        else:
            if not own_pairs:
                return 0.0
            batch = self.batcher([rank_rows[self.rank]])
            share = loss_share = own_pairs / step_pairs

        def encode(chunk: int) -> paddle.Tensor:
            # Dropout depends only on seed, rank, step, batch and chunk: a second pass and a resumed run repeat it.
            paddle.seed(int(np.random.SeedSequence([*seeds, chunk]).generate_state(1)[0]))
            with self._auto_cast():
                return self.model.encode_chunk(batch.chunks[chunk])

        loss_of = partial(batch_loss, batch=batch, margin=self.margin, scale=self.scale, distillation=self.distillation)
        if own_pairs:
            with self._auto_cast():  # GradScaler disables itself for good if it scales outside of auto_cast
                factor = float(self._scaler.scale(paddle.full([], share)))
            loss = self.backward(encode, len(batch.chunks), loss_of, factor)
        else:  # the other ranks wait for this one to gather vectors, even if it has none
            loss = loss_of(paddle.zeros([0, self.model.embedding_size]))
        return loss_share * float(loss)

    def _auto_cast(self) -> AbstractContextManager[None]:
        return paddle.amp.auto_cast(self.use_amp, dtype=self.amp_dtype)

    def _own_loss_rows(self, batches: list[list[np.ndarray]]) -> list[int]:
        """Rows of the pairs in this rank's loss."""
        scored = [rank_rows if self.cross_device else [rank_rows[self.rank]] for rank_rows in batches]
        return [int(row) for rank_rows in scored for rows in rank_rows for row in rows]


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in state.items()}


def _from_json(state: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(value, "float32") if isinstance(value, list) else value for name, value in state.items()}


class NonFiniteLoss(ArithmeticError):
    """The loss of a step is NaN or infinite. rows: of the pairs in this rank's loss; empty if that is finite."""

    def __init__(self, step: int, loss: float, rows: list[int]) -> None:
        super().__init__(f"the loss of step {step} is {loss}")
        self.rows = rows
