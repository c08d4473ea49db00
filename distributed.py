"""What the ranks under `paddle.distributed.launch` say to each other; with one process all of it is the identity."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.base import core

from runtime import Stopped

SECONDS_BETWEEN_LOOKS = 0.02  # while a rank waits for the others
_barriers = itertools.count()
_RANK_0_IS_THERE = "semantic_index/rank_0_is_there"
_LEFT = "semantic_index/left"


def init_ranks() -> tuple[int, int]:
    """Joins the other processes, over gloo on the CPU and NCCL on GPUs. Returns (rank, number of ranks)."""
    if dist.get_world_size() > 1 and not dist.is_initialized():
        if paddle.get_device() == "cpu":  # else Paddle takes NCCL, and the GPU, wherever the launcher saw one
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size()


def barrier() -> None:
    """Returns when all ranks have come here. Raises Stopped if one won't, as `leave` says.

    They wait at the launcher's store and not in a collective, which would end after 30 minutes and is deaf to signals.
    """
    if dist.get_world_size() == 1:
        return
    name = f"semantic_index/barrier/{next(_barriers)}"
    _add(name, 1)
    while _add(name, 0) < dist.get_world_size():
        if _add(_LEFT, 0):
            raise Stopped
        time.sleep(SECONDS_BETWEEN_LOOKS)
    # Rank 0 keeps the store, and may end right after this: it lets the others see first that all are here.
    if dist.get_rank():
        _add(name, 1)
    while dist.get_rank() == 0 and _add(name, 0) < 2 * dist.get_world_size() - 1:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def leave() -> None:
    """Tells the ranks that wait for this one in `barrier` that it won't come any more."""
    if dist.get_world_size() > 1:
        _add(_LEFT, 1)


def _add(key: str, amount: int) -> int:
    """Adds to a number in the store and returns the sum; a signal, which would break the connection off, waits."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return core.create_or_get_global_tcp_store().add(key, amount)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def wait_for_rank_0(seconds: float) -> None:
    """Returns when rank 0 has come here too, or after `seconds`; rank 0 itself doesn't wait."""
    if dist.get_world_size() == 1:
        return
    end = time.monotonic() + seconds
    if dist.get_rank() == 0:
        _add(_RANK_0_IS_THERE, 1)
        return
    with contextlib.suppress(RuntimeError, ValueError):  # rank 0, which keeps the store, has left already
        while time.monotonic() < end and not _add(_RANK_0_IS_THERE, 0):
            time.sleep(SECONDS_BETWEEN_LOOKS)


def broadcast_parameters(model: paddle.nn.Layer) -> None:
    """Gives all ranks the weights of rank 0."""
    if dist.get_world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter, src=0)


def all_reduce_gradients(parameters: Iterable[paddle.Tensor], numbers: Sequence[float]) -> list[float]:
    """Replaces each gradient by its sum over the ranks, and sums `numbers` along; one reduction for all of them.

    A parameter without a gradient on any rank, such as the pooler's under mean pooling, is left without.
    """
    if dist.get_world_size() == 1:
        return list(numbers)
    parameters = [parameter for parameter in parameters if not parameter.stop_gradient]
    has_gradient = [float(parameter.grad is not None) for parameter in parameters]
    flat = [paddle.to_tensor([*numbers, *has_gradient], dtype="float32")]
    for parameter, used in zip(parameters, has_gradient, strict=True):
        flat.append(parameter.grad.flatten() if used else paddle.zeros([parameter.size], parameter.dtype))
    summed = paddle.concat(flat)
    dist.all_reduce(summed)
    start = len(numbers) + len(parameters)
    first_numbers = summed[:start].tolist()
    for parameter, used in zip(parameters, first_numbers[len(numbers) :], strict=True):
        if used:
            parameter.grad = summed[start : start + parameter.size].reshape(parameter.shape)
        start += parameter.size
    return first_numbers[: len(numbers)]


def gather_rows(own: paddle.Tensor, counts: Sequence[int], place: int) -> list[paddle.Tensor]:
    """The rows of every rank, [counts[rank], D] each; gradients flow into `own` [counts[place], D] alone.

    Ranks whose rows are fewer pad them for the one collective. With one count it is `[own]`.
    """
    if len(counts) == 1:
        return [own]
    padding = paddle.zeros([max(counts) - counts[place], own.shape[1]], own.dtype)
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, paddle.concat([own.detach(), padding]))
    return [own if rank == place else rows[: counts[rank]] for rank, rows in enumerate(gathered)]


def all_gather_arrays(own: np.ndarray) -> list[np.ndarray]:
    """The array of every rank, all of one shape and type, on every rank."""
    if dist.get_world_size() == 1:
        return [own]
    barrier()
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, paddle.to_tensor(own))
    return [array.numpy() for array in gathered]


def broadcast_array(own: np.ndarray) -> np.ndarray:
    """Rank 0's array, on every rank; the others give one of the same shape and type."""
    if dist.get_world_size() == 1:
        return own
    barrier()
    tensor = paddle.to_tensor(own)
    dist.broadcast(tensor, src=0)
    return tensor.numpy()


def encode_share(count: int, width: int, encode: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Has each rank encode its share of `count` rows and gives all of them to every rank.

    The ranks take rows in turns, since neighbours in a file are often alike in length.
    encode: gives the float32 [n, width] vectors of a slice of rows. Returns [count, width].
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = encode(slice(rank, None, world_size))
    if world_size == 1 or not count:
        return share
    # A collective needs arrays of one shape: shares that are a row shorter are padded for it, and so end last.
    padded = np.zeros((-(-count // world_size), width), dtype=np.float32)
    padded[: len(share)] = share
    return np.stack(all_gather_arrays(padded), axis=1).reshape(-1, width)[:count]
