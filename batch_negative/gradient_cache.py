"""Two ways to the same gradients of a batch: all chunks at once, or one chunk at a time in little memory.

Both take `encode`, which gives the vectors [n, D] of a chunk and must repeat them exactly, dropout included, and
`loss_of`, which gives a scalar for the vectors [T, D] of all chunks. They add the gradient of `factor * loss` to the
parameters' gradients and return the loss.
"""

from collections.abc import Callable

import paddle

Encode = Callable[[int], paddle.Tensor]
LossOf = Callable[[paddle.Tensor], paddle.Tensor]


def direct_backward(encode: Encode, chunks: int, loss_of: LossOf, factor: float) -> paddle.Tensor:
    """Keeps the activations of all chunks; arguments as above."""
    loss = loss_of(paddle.concat([encode(chunk) for chunk in range(chunks)]))
    (factor * loss).backward()
    return loss.detach()


def cached_backward(encode: Encode, chunks: int, loss_of: LossOf, factor: float) -> paddle.Tensor:
    """Keeps the activations of one chunk, and encodes each twice (Gao et al. 2021, https://arxiv.org/abs/2101.06983)."""
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
