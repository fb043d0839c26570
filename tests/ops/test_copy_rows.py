"""Rows copied in place."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.copy_rows import copy_rows


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.int32])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 5, 3)])
def test_copies_rows_as_numpy_does(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    pool = mx.random.randint(0, 1000, shape).astype(dtype)
    expected = np.array(pool)
    expected[[4, 0, 1]] = expected[[1, 1, 0]]
    np.testing.assert_array_equal(np.array(copy_rows(pool, [1, 1, 0], [4, 0, 1])), expected)


def test_copies_follow_one_another() -> None:
    pool = mx.arange(12).reshape(4, 3)
    pool = copy_rows(copy_rows(pool, [0], [1]), [1], [2])
    assert pool[:, 0].tolist() == [0, 0, 0, 9]


def test_a_large_pool_is_not_copied() -> None:
    pool = mx.zeros((64, 1 << 16))
    mx.eval(pool)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    pool = copy_rows(pool, [3], [4])
    mx.eval(pool)
    assert mx.get_peak_memory() - before < 4 << 18  # less than four rows


def test_nothing_to_copy() -> None:
    assert copy_rows(mx.arange(3), [], []).tolist() == [0, 1, 2]


def test_wrong_calls_are_refused() -> None:
    pool = mx.zeros((3, 2))
    with pytest.raises(ValueError, match=r"\[copy_rows\] .* got \(3,2\), 2 and 1 numbers, 1 distinct"):
        copy_rows(pool, [0, 1], [2])
    with pytest.raises(ValueError, match="distinct"):
        copy_rows(pool, [0, 1], [2, 2])
    with pytest.raises(ValueError, match="must have rows"):
        copy_rows(mx.array(1.0), [], [])
    for rows in ([3], [-1]):
        with pytest.raises(IndexError, match=r"\[copy_rows\] rows must be in \[0, 3\)"):
            copy_rows(pool, rows, [0])
        with pytest.raises(IndexError):
            copy_rows(pool, [0], rows)
