"""Unit vectors in less room than float32: float16 takes half of it, int8 a quarter. Imports no Paddle."""

import numpy as np

FLOAT32, FLOAT16, INT8 = "float32", "float16", "int8"
VECTOR_DTYPES = (FLOAT32, FLOAT16, INT8)  # the most exact first
INT8_MAX = 127
# A float16 whose bits are moved by 13 is a float32 with the same sign and fraction, whose exponent is too small by the
# difference of both biases, 127 - 15.
FRACTION_SHIFT, EXPONENT_SCALE = 13, np.float32(2.0 ** (127 - 15))
SIGN_EXTENSION = np.int32(0x70000000)  # the bits in which shifting has copied the sign


def to_dtype(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Unit vectors [N, D] in one of VECTOR_DTYPES, as they are stored.

    int8: a row is scaled so that its largest component is 127 or -127, and rounded. The scale isn't kept, because a
    unit vector follows from its direction. What `to_float32` made of stored vectors becomes the same again.
    """
    if dtype == INT8:
        return np.rint(vectors * (INT8_MAX / np.abs(vectors).max(axis=1, keepdims=True))).astype(np.int8)
    return np.asarray(vectors, dtype)


def to_float32(stored: np.ndarray) -> np.ndarray:
    """The unit vectors, float32 [N, D], of what `to_dtype` gave; other numbers as they are.

    A row of zeros in int8 gives NaN.
    """
    if stored.dtype == np.float16:
        return _float16_to_float32(stored)
    vectors = np.asarray(stored, np.float32)
    if stored.dtype == np.int8:
        with np.errstate(divide="ignore", invalid="ignore"):
            vectors *= 1 / np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return vectors


def _float16_to_float32(stored: np.ndarray) -> np.ndarray:
    """`stored.astype(np.float32)` for finite numbers, in a fifth of the time: NumPy's wheels convert one by one.

    Infinity and NaN become numbers of 65,536 and more.
    """
    bits = np.asarray(stored).view(np.int16).astype(np.int32)
    bits <<= FRACTION_SHIFT
    bits &= ~SIGN_EXTENSION
    vectors = bits.view(np.float32)
    vectors *= EXPONENT_SCALE
    return vectors
