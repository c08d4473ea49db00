"""Two ways from a batch's chunks to the same gradients: all at once, and one chunk at a time in little memory.

Both are given `encode`, which makes the vectors [n, D] of a chunk and the same ones each time it is called, dropout
included, and `loss_of`, which makes a scalar of the vectors [T, D] of all chunks. They add the gradient of
`factor * loss` to that of the parameters and return the loss.
"""

from collections.abc import Callable

import paddle

Encode = Callable[[int], paddle.Tensor]
LossOf = Callable[[paddle.Tensor], paddle.Tensor]


def direct_backward(encode: Encode, chunks: int, loss_of: LossOf, factor: float) -> paddle.Tensor:
    """Keeps the activations of all chunks."""
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
