"""The elementwise ops against NumPy oracles, with kernels and without, and against MLX's own ops."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.activation import gelu_mul, silu_mul
from mlx_server.ops.norm import rms_norm
from mlx_server.ops.rope import rope
from reference import elementwise as oracle

DTYPES = pytest.mark.parametrize("dtype, tolerance", [(mx.float32, 3e-6), (mx.float16, 4e-3), (mx.bfloat16, 3e-2)])


def make_x(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def make_positions(num_tokens: int) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, 3000, num_tokens, dtype=np.int32))


def make_freqs(half: int) -> mx.array:
    return mx.array(10000 ** (np.arange(half, dtype=np.float32) / max(half, 1)))


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def assert_close(y: mx.array, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    assert y.shape == expected.shape
    np.testing.assert_allclose(wide(y), expected, rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("shape", [(576,), (1, 64), (3, 5, 31), (300, 100), (0, 8)])
def test_rms_norm(shape: tuple[int, ...], dtype: mx.Dtype, tolerance: float) -> None:
    x, weight = make_x(*shape).astype(dtype), make_x(shape[-1], seed=1).astype(dtype)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert_close(y, oracle.rms_norm(wide(x), wide(weight), 1e-5), tolerance)
    if x.size:  # without rows MLX's own can't be launched on CUDA
        assert_close(y, wide(mx.fast.rms_norm(x, weight, 1e-5)), tolerance)


@DTYPES
@pytest.mark.parametrize("shape", [(576,), (1, 64), (3, 5, 31), (300, 100), (0, 8)])
def test_silu_mul(shape: tuple[int, ...], dtype: mx.Dtype, tolerance: float) -> None:
    gate, up = (4 * make_x(*shape)).astype(dtype), make_x(*shape, seed=1).astype(dtype)
    y = silu_mul(gate, up)
    assert y.dtype == dtype
    assert_close(y, oracle.silu_mul(wide(gate), wide(up)), tolerance)


@DTYPES
@pytest.mark.parametrize("shape", [(576,), (1, 64), (3, 5, 31), (300, 100), (0, 8)])
def test_gelu_mul(shape: tuple[int, ...], dtype: mx.Dtype, tolerance: float) -> None:
    gate, up = (4 * make_x(*shape)).astype(dtype), make_x(*shape, seed=1).astype(dtype)
    y = gelu_mul(gate, up)
    assert y.dtype == dtype
    assert_close(y, oracle.gelu_mul(wide(gate), wide(up)), tolerance)


@DTYPES
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    "num_tokens, num_heads, d, half", [(1, 3, 64, 32), (300, 2, 16, 8), (5, 2, 11, 3), (0, 2, 8, 4)]
)
def test_rope(num_tokens, num_heads, d, half, traditional, dtype, tolerance) -> None:
    x = make_x(num_tokens, num_heads, d).astype(dtype)
    positions, freqs = make_positions(num_tokens), make_freqs(half)
    y = rope(x, positions, freqs, traditional=traditional)
    assert y.dtype == dtype
    assert_close(y, oracle.rope(wide(x), np.array(positions), np.array(freqs), traditional=traditional), tolerance)


@pytest.mark.parametrize("traditional", [False, True])
def test_rope_means_what_mlx_means(traditional: bool) -> None:
    x, freqs = make_x(7, 3, 16), make_freqs(6)
    positions = mx.arange(40, 47, dtype=mx.int32)
    y = mx.fast.rope(x.swapaxes(0, 1)[None], 12, traditional=traditional, base=None, scale=1.0, offset=40, freqs=freqs)
    assert_close(rope(x, positions, freqs, traditional=traditional), np.array(y[0].swapaxes(0, 1)))


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, up, weight = make_x(300, 4, 50), make_x(300, 4, 50, seed=1), make_x(50)
    positions, freqs = make_positions(300), make_freqs(25)
    ops = [
        lambda t: rms_norm(x[t], weight, 1e-6),
        lambda t: silu_mul(x[t], up[t]),
        lambda t: gelu_mul(x[t], up[t]),
        lambda t: rope(x[t], positions[t], freqs),
    ]
    for op in ops:
        alone = mx.concatenate([op(slice(t, t + 1)) for t in range(300)])
        assert mx.array_equal(op(slice(None)), alone)


def test_arrays_with_gaps() -> None:
    both = make_x(6, 2, 40)
    parts = [both[:, 1], both[:, :, 3:17], both.T, both[::2], mx.broadcast_to(both[:1], (4, 2, 40)), both[::-1]]
    for part in parts:
        weight = make_x(2 * part.shape[-1])[::2]
        assert_close(rms_norm(part, weight, 1e-5), oracle.rms_norm(wide(part), wide(weight), 1e-5))
        assert_close(silu_mul(part, part), oracle.silu_mul(wide(part), wide(part)))
        if part.ndim == 3:
            positions, freqs = make_positions(2 * len(part))[::2], make_freqs(4)[::2]
            expected = oracle.rope(wide(part), np.array(positions), np.array(freqs))
            assert_close(rope(part, positions, freqs), expected)


def test_mistakes_are_named() -> None:
    x, positions, freqs = make_x(3, 2, 8), make_positions(3), make_freqs(4)
    mistakes = [
        (lambda: rms_norm(x, make_x(7), 1e-5), "[rms_norm] weight must be floating point [8] but got float32 (7)"),
        (lambda: rms_norm(positions, make_x(3), 1e-5), "[rms_norm] x must be floating point [..., D] but got int32"),
        (lambda: silu_mul(x, x[:2]), "[silu_mul] gate and up must have one shape and floating point dtype but got"),
        (lambda: gelu_mul(x, x[:2]), "[gelu_mul] gate and up must have one shape and floating point dtype but got"),
        (lambda: silu_mul(x, x.astype(mx.float16)), "[silu_mul] gate and up must have one shape and floating point"),
        (lambda: rope(x[0], positions, freqs), "[rope] x must be floating point [T, H, D] but got float32 (2,8)"),
        (lambda: rope(x, positions[:2], freqs), "[rope] positions must be int32 [3] but got int32 (2)"),
        (lambda: rope(x, positions, make_freqs(5)), "[rope] freqs must be float32 [R / 2] with R <= 8 but got float32"),
    ]
    for call, message in mistakes:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
