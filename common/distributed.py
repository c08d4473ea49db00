"""Collectives and barriers for the ranks under `paddle.distributed.launch`; no-ops on one process."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.base import core

from common.errors import InputError
from common.logs import log
from common.signals import Stopped

SECONDS_BETWEEN_POLLS = 0.02  # while a rank waits for the others
_barriers = itertools.count()  # the same number on all ranks at the same barrier
_RANK_0_ARRIVED = "semantic_index/rank_0_arrived"
_EXITED = "semantic_index/exited"


def init_ranks() -> tuple[int, int]:
    """Joins the other processes, over gloo on the CPU and NCCL on GPUs. Returns (rank, number of ranks).

    Raises InputError if they can't connect.
    """
    if dist.get_world_size() > 1 and not dist.is_initialized():
        if paddle.get_device() == "cpu":  # otherwise Paddle takes NCCL, and the GPU, if the launcher saw one
            os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        if not _has_launcher():
            count = os.environ["PADDLE_TRAINERS_NUM"]
            remedy = "if nothing starts them, end this and unset PADDLE_TRAINERS_NUM"
            log(f"PADDLE_TRAINERS_NUM={count}: waiting for the other processes; {remedy}")
        try:
            dist.init_parallel_env()
        except Exception as error:  # Paddle raises anything from ValueError to SystemError
            reason = str(error).strip().splitlines()[0]
            remedy = "if it is about this machine's name, add that to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
            raise InputError(f"the processes of the launcher can't connect ({reason}); {remedy}") from None
    return dist.get_rank(), dist.get_world_size()


def _has_launcher() -> bool:
    """Whether Paddle's launcher has started this process; without /proc, whether it may have."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return True
    return b"paddle.distributed" in command or b"fleetrun" in command


def barrier() -> None:
    """Waits until all ranks have arrived. Raises Stopped if one of them has called `announce_exit` instead.

    The ranks poll the launcher's store, because a collective would time out after 30 minutes and ignore signals.
    """
    if dist.get_world_size() == 1:
        return
    name = f"semantic_index/barrier/{next(_barriers)}"
    _store_add(name, 1)
    while _store_add(name, 0) < dist.get_world_size():
        if _store_add(_EXITED, 0):
            raise Stopped
        time.sleep(SECONDS_BETWEEN_POLLS)
    # Rank 0 hosts the store and may end right after this, so it waits until the others have seen that all arrived.
    if dist.get_rank():
        _store_add(name, 1)
    while dist.get_rank() == 0 and _store_add(name, 0) < 2 * dist.get_world_size() - 1:
        time.sleep(SECONDS_BETWEEN_POLLS)


def announce_exit() -> None:
    """Tells the ranks that wait in `barrier` that this one won't arrive."""
    if dist.get_world_size() > 1:
        _store_add(_EXITED, 1)


def _store_add(key: str, amount: int) -> int:
    """Adds to a counter in the store and returns the sum. Blocks signals meanwhile: they would break the connection."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return core.create_or_get_global_tcp_store().add(key, amount)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def wait_for_rank_0(seconds: float) -> None:
    """Waits until rank 0 has called this too, but at most `seconds`; rank 0 itself doesn't wait."""
    if dist.get_world_size() == 1:
        return
    end = time.monotonic() + seconds
    if dist.get_rank() == 0:
        _store_add(_RANK_0_ARRIVED, 1)
        return
    with contextlib.suppress(RuntimeError, ValueError):  # rank 0, which hosts the store, has ended already
        while time.monotonic() < end and not _store_add(_RANK_0_ARRIVED, 0):
            time.sleep(SECONDS_BETWEEN_POLLS)


def broadcast_parameters(model: paddle.nn.Layer) -> None:
    """Copies the weights of rank 0 to all ranks."""
    if dist.get_world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter, src=0)


def all_reduce_gradients(parameters: Iterable[paddle.Tensor], numbers: Sequence[float]) -> list[float]:
    """Replaces each gradient by its sum over the ranks, and returns the sums of `numbers`, in one collective.

    A parameter that has a gradient on no rank, such as the pooler's with mean pooling, stays without one.
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
    sums = summed[:start].tolist()
    for parameter, ranks_with_gradient in zip(parameters, sums[len(numbers) :], strict=True):
        if ranks_with_gradient:
            parameter.grad = summed[start : start + parameter.size].reshape(parameter.shape)
        start += parameter.size
    return sums[: len(numbers)]


def gather_rows(own: paddle.Tensor, counts: Sequence[int], own_rank: int) -> list[paddle.Tensor]:
    """The rows of all ranks: a tensor [counts[rank], D] of each. Gradients flow only into `own` [counts[own_rank], D].

    With one rank the result is `[own]`.
    """
    if len(counts) == 1:
        return [own]
    # The collective needs tensors of the same shape.
    padding = paddle.zeros([max(counts) - counts[own_rank], own.shape[1]], own.dtype)
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, paddle.concat([own.detach(), padding]))
    return [own if rank == own_rank else rows[: counts[rank]] for rank, rows in enumerate(gathered)]


def all_gather_arrays(own: np.ndarray) -> list[np.ndarray]:
    """The arrays of all ranks, on every rank; they must have the same shape and dtype."""
    if dist.get_world_size() == 1:
        return [own]
    barrier()
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, paddle.to_tensor(own))
    return [array.numpy() for array in gathered]


def broadcast_object(own: Any) -> Any:
    """Rank 0's object, on every rank; it must be picklable."""
    if dist.get_world_size() == 1:
        return own
    barrier()
    objects = [own]
    dist.broadcast_object_list(objects, src=0)
    return objects[0]


def encode_on_all_ranks(count: int, width: int, encode: Callable[[slice], np.ndarray]) -> np.ndarray:
    """Divides `count` rows among the ranks to encode them; every rank gets all vectors, float32 [count, width].

    encode: returns the vectors, float32 [n, width], of a slice of the rows. A rank's slice takes every world_size-th
    row, because neighbouring lines of a file often have similar lengths.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = encode(slice(rank, None, world_size))
    if world_size == 1 or not count:
        return own
    # The collective needs arrays of the same shape, and some ranks have one row less.
    padded = np.zeros((-(-count // world_size), width), dtype=np.float32)
    padded[: len(own)] = own
    return np.stack(all_gather_arrays(padded), axis=1).reshape(-1, width)[:count]
