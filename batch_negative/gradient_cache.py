"""Two ways to compute a batch's gradients: all chunks at once, or one chunk at a time in little memory.

encode: returns the vectors [n, D] of a chunk, given its number, and must return the same ones when called again,
dropout included. chunks: number of chunks. loss_of: returns the loss, a scalar, for the vectors [T, D] of all chunks.
Both functions add the gradient of `factor * loss` to the parameters' gradients and return the loss.
"""

from collections.abc import Callable

import paddle

Encode = Callable[[int], paddle.Tensor]
LossOf = Callable[[paddle.Tensor], paddle.Tensor]


def direct_backward(encode: Encode, chunks: int, loss_of: LossOf, factor: float) -> paddle.Tensor:
    """Keeps the activations of all chunks in memory. The module's docstring describes the arguments."""
    loss = loss_of(paddle.concat([encode(chunk) for chunk in range(chunks)]))
    (factor * loss).backward()
    return loss.detach()


def cached_backward(encode: Encode, chunks: int, loss_of: LossOf, factor: float) -> paddle.Tensor:
    """Gradient cache: keeps one chunk's activations, encodes each chunk twice (Gao et al. 2021, arXiv:2101.06983)."""
    with paddle.no_grad():
        chunk_vectors = [encode(chunk) for chunk in range(chunks)]
    vectors = paddle.concat(chunk_vectors)
    vectors.stop_gradient = False
    loss = loss_of(vectors)
    (factor * loss).backward()
    gradients = paddle.split(vectors.grad, [len(rows) for rows in chunk_vectors])
    for chunk, gradient in enumerate(gradients):
        paddle.autograd.backward([encode(chunk)], [gradient])
    return loss.detach()
