"""Unit vectors in float16 and int8."""

import numpy as np
import pytest

from common.vector_dtypes import FLOAT16, INT8, VECTOR_DTYPES, to_dtype, to_float32
from helpers import unit_vectors


def test_float16_is_converted_as_numpy_does() -> None:
    """Each finite number, subnormal ones and both zeros, too."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    numbers = numbers[np.isfinite(numbers).all(axis=1)]
    assert len(numbers) == (1 << 10) - 2 * 16
    for stored in (numbers, numbers[:, ::3]):
        found, expected = to_float32(stored), stored.astype(np.float32)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("dim", [1, 3, 256])
def test_int8_is_the_nearest_direction_whose_largest_component_is_127(dim: int) -> None:
    vectors = unit_vectors(50, dim)
    stored = to_dtype(vectors, INT8)
    assert stored.dtype == np.int8 and np.abs(stored).max(axis=1).tolist() == [127] * 50
    for vector, codes, found in zip(vectors, stored, to_float32(stored), strict=True):
        largest = max(abs(float(value)) for value in vector)
        assert codes.tolist() == [round(127 * float(value) / largest) for value in vector]
        norm = sum(int(code) ** 2 for code in codes) ** 0.5
        np.testing.assert_allclose(found, [int(code) / norm for code in codes], atol=1e-7)
        assert float(found @ vector) > 0.9998


@pytest.mark.parametrize("dtype", VECTOR_DTYPES)
def test_stored_vectors_stay_the_same_if_they_are_stored_again(dtype: str) -> None:
    """Which happens whenever an index is saved."""
    stored = to_dtype(unit_vectors(1000, 31), dtype)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(to_dtype(to_float32(stored), dtype), stored)


@pytest.mark.parametrize(("dtype", "error"), [(FLOAT16, 3e-4), (INT8, 3e-3)])
def test_inner_products_change_little(dtype: str, error: float) -> None:
    vectors, queries = unit_vectors(500, 256), unit_vectors(20, 256, seed=1)
    changed = np.abs(queries @ to_float32(to_dtype(vectors, dtype)).T - queries @ vectors.T)
    assert 0 < changed.max() < error


def test_zeros_have_no_direction() -> None:
    """NaN, which every index refuses."""
    assert np.isnan(to_float32(np.zeros((1, 4), np.int8))).all()
