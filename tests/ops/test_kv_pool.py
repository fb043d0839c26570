"""The memory of the KV cache: new, written in place, of 8 bits."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server import _ext
from mlx_server.ops.attention import (
    AttentionBatch,
    KVPool,
    copy_kv,
    new_kv_pool,
    paged_attention,
    pool_arrays,
    write_kv,
)


@pytest.mark.parametrize("op", [write_kv, _ext.write_kv_fallback], ids=["op", "fallback"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_eight_bits_are_the_nearest(op: Callable[..., KVPool], dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(2)
    k, v = (mx.array(x).astype(dtype) for x in rng.standard_normal((2, 8, 2, 64)).astype(np.float32))
    k[0] = 0.0
    k[1, 0, 0] = mx.nan
    pool = op(new_kv_pool((4, 2, 2, 64), dtype, bits=8), k, v, mx.arange(8)[::-1])
    assert pool.key_scales is not None and pool.value_scales is not None
    for x, integers, factors in [(k, pool.keys, pool.key_scales), (v, pool.values, pool.value_scales)]:
        expected = np.array(x.astype(mx.float32))[::-1]
        scales = np.array(factors).reshape(8, 2, 1)
        held = np.array(integers).reshape(8, 2, 64) * scales
        is_nan = np.isnan(expected).any(-1)
        assert np.isnan(held[is_nan]).all()
        expected, held, scales = expected[~is_nan], held[~is_nan], scales[~is_nan]
        np.testing.assert_allclose(scales[..., 0], np.abs(expected).max(-1) / 127, rtol=1e-6)
        assert (np.abs(held - expected) <= 0.501 * scales).all()


def test_write_kv_puts_tokens_into_their_slots() -> None:
    rng = np.random.default_rng(1)
    pool_shape, slots = (6, 4, 2, 8), [23, 0, 9, 10]
    keys, values = rng.standard_normal((2, *pool_shape)).astype(np.float32)
    k, v = rng.standard_normal((2, 4, 2, 8)).astype(np.float32)
    pool = KVPool(mx.array(keys), mx.array(values))
    written = write_kv(pool, mx.array(k), mx.array(v), mx.array(slots, dtype=mx.int32))
    keys.reshape(24, 2, 8)[slots] = k
    values.reshape(24, 2, 8)[slots] = v
    np.testing.assert_array_equal(np.array(written.keys), keys)
    np.testing.assert_array_equal(np.array(written.values), values)


@pytest.mark.parametrize("bits", [None, 8])
def test_copy_kv_copies_slots_of_all_arrays(bits: int | None) -> None:
    """In another block and in the same one; what was written just before, and what is written over by another copy."""
    pool = new_kv_pool((3, 4, 2, 8), mx.float32, bits=bits)
    k, v = (mx.array(x) for x in np.random.default_rng(3).standard_normal((2, 12, 2, 8)).astype(np.float32))
    pool = write_kv(pool, k, v, mx.arange(12))
    expected = [np.array(array).reshape(12, *array.shape[2:]) for array in pool_arrays(pool)]
    pool = copy_kv(pool, [0, 1, 4, 8], [4, 5, 3, 9])
    assert len(expected) == (4 if bits else 2)
    for array, rows in zip(pool_arrays(pool), expected, strict=True):
        rows[[4, 5, 3, 9]] = rows[[0, 1, 4, 8]]
        np.testing.assert_array_equal(np.array(array).reshape(rows.shape), rows)


def test_copy_kv_refuses_wrong_slots() -> None:
    pool = new_kv_pool((3, 4, 2, 8), mx.float32)
    with pytest.raises(ValueError, match="as many numbers"):
        copy_kv(pool, [0, 1], [4])
    with pytest.raises(ValueError, match="2 numbers, 1 distinct"):
        copy_kv(pool, [0, 1], [4, 4])
    with pytest.raises(IndexError, match=r"must be in \[0, 12\) but got 12"):
        copy_kv(pool, [0], [12])


@pytest.mark.parametrize("wait", [True, False], ids=["step by step", "pipelined"])
def test_write_kv_is_in_place(wait: bool) -> None:
    pool = KVPool(mx.zeros((4096, 16, 2, 64)), mx.zeros((4096, 16, 2, 64)))
    token, slot = mx.ones((1, 2, 64)), mx.array([5], dtype=mx.int32)
    batch = AttentionBatch(mx.zeros((1, 1), mx.int32), [1], [6])
    mx.eval(pool.keys, pool.values, token, slot)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(5):
        pool = write_kv(pool, token, token, slot)
        # reads the pool, and may still do so when the next step is launched
        token = paged_attention(token, pool, batch, scale=1.0)
        mx.async_eval(token, pool.keys, pool.values)
        if wait:
            mx.eval(token)
    mx.eval(token, pool.keys, pool.values)
    assert mx.get_peak_memory() - before < pool.keys.nbytes // 100


def test_write_kv_wrong_arguments() -> None:
    pool, token = new_kv_pool((4, 16, 2, 64), mx.float32), mx.zeros((3, 2, 64))
    slots = mx.zeros((3,), mx.int32)
    with pytest.raises(ValueError, match=r"\[write_kv\] k and v must have the shape \[T, 2, 64\] but got \(3,2,32\)"):
        write_kv(pool, token[..., :32], token, slots)
    with pytest.raises(ValueError, match=r"\[write_kv\] slot_mapping must be int32 \[3\] but got int32 \(2\)"):
        write_kv(pool, token, token, slots[:2])
    with pytest.raises(ValueError, match=r"\[write_kv\] keys and values of the pool must have one shape"):
        write_kv(KVPool(pool.keys, pool.values[:3]), token, token, slots)


def test_a_new_pool_has_the_shape_and_can_be_written() -> None:
    pool = new_kv_pool((4, 2, 1, 8), mx.float32)
    for array in (pool.keys, pool.values):
        assert (array.shape, array.dtype) == ((4, 2, 1, 8), mx.float32)
    ones = mx.ones((8, 1, 8))
    assert mx.array_equal(write_kv(pool, ones, ones, mx.arange(8)).keys.flatten(), ones.flatten())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_blocks_without_tokens_take_no_memory_on_the_cpu() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    with mx.stream(mx.cpu):
        pool = new_kv_pool((1024, 1024, 1, 64), mx.float32)
        mx.eval(pool.keys, pool.values)
    assert resident_bytes() - before < pool.keys.nbytes // 10


def test_new_pool_knows_eight_bits_only() -> None:
    with pytest.raises(ValueError, match="bits must be 8 or None but got 4"):
        new_kv_pool((4, 16, 2, 64), mx.float32, bits=4)


def test_new_pool_refuses_sizes_below_one() -> None:
    with pytest.raises(ValueError, match="new_kv_pool"):
        new_kv_pool((0, 16, 2, 64), mx.float32)
