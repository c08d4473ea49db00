"""What the ranks under `paddle.distributed.launch` say to each other; with one process all of it is the identity."""

from collections.abc import Callable, Iterable

import numpy as np
import paddle
import paddle.distributed as dist

from data import split_evenly

GATHERED_ROWS = 65536  # vectors sent to rank 0 at a time: 64 MiB of 256 floats


def init_ranks() -> tuple[int, int]:
    """Joins the other processes, over gloo on the CPU and NCCL on GPUs. Returns (rank, number of ranks)."""
    if dist.get_world_size() > 1 and not dist.is_initialized():
        dist.init_parallel_env()
    return dist.get_rank(), dist.get_world_size()


def broadcast_parameters(model: paddle.nn.Layer) -> None:
    """Gives all ranks the weights of rank 0."""
    if dist.get_world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter, src=0)


def average_gradients(parameters: Iterable[paddle.Tensor], loss: float, rows: int) -> tuple[float, int]:
    """Replaces each gradient by the mean over the ranks, weighted by their rows; one reduction for all of them.

    A parameter without a gradient on any rank, such as the pooler's under mean pooling, is left without.
    loss: this rank's mean loss; rows: the rows that it is the mean of, 0 for a rank without any.
    Returns the loss averaged in the same way and the number of rows of all ranks.
    """
    if dist.get_world_size() == 1:
        return loss, rows
    parameters = [parameter for parameter in parameters if not parameter.stop_gradient]
    has_gradient = [float(parameter.grad is not None) for parameter in parameters]
    flat = [paddle.to_tensor([rows, rows * loss if rows else 0.0, *has_gradient], dtype="float32")]
    for parameter, used in zip(parameters, has_gradient, strict=True):
        flat.append((parameter.grad * rows).flatten() if used else paddle.zeros([parameter.size], parameter.dtype))
    summed = paddle.concat(flat)
    dist.all_reduce(summed)
    start = 2 + len(parameters)
    all_rows, all_loss, *ranks_with_gradient = summed[:start].tolist()
    for parameter, used in zip(parameters, ranks_with_gradient, strict=True):
        if used:
            parameter.grad = (summed[start : start + parameter.size] / all_rows).reshape(parameter.shape)
        start += parameter.size
    return all_loss / all_rows, int(all_rows)


def encode_share(count: int, width: int, encode: Callable[[slice], np.ndarray]) -> np.ndarray | None:
    """Has each rank encode its contiguous share of `count` rows and gathers all of them on rank 0.

    encode: gives the float32 [n, width] vectors of a slice of rows. Returns [count, width] on rank 0, else None.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = encode(split_evenly(count, world_size, rank))
    if world_size == 1:
        return share
    everything = np.empty((count, width), dtype=np.float32) if rank == 0 else None
    longest = -(-count // world_size)
    for start in range(0, longest, GATHERED_ROWS):
        block = np.zeros((min(GATHERED_ROWS, longest - start), width), dtype=np.float32)
        rows = share[start : start + len(block)]
        block[: len(rows)] = rows
        blocks: list[paddle.Tensor] = []
        dist.all_gather(blocks, paddle.to_tensor(block))
        if everything is None:
            continue
        for sender, received in enumerate(blocks):
            theirs = split_evenly(count, world_size, sender)
            first = theirs.start + start
            last = min(first + len(block), theirs.stop)
            if first < last:
                everything[first:last] = received.numpy()[: last - first]
    return everything
