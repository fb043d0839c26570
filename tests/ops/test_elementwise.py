"""The elementwise ops against NumPy oracles, with kernels and without, and against MLX's own ops."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.activation import gelu_mul, silu_mul
from mlx_server.ops.norm import rms_norm
from mlx_server.ops.rope import qkv_rope
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
@pytest.mark.parametrize("op", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("shape", [(1, 64), (300, 200), (2, 3, 22), (0, 8)])
def test_gate_and_up_in_one(shape, op, dtype, tolerance) -> None:
    both = (2 * make_x(*shape)).astype(dtype)
    y = {"silu_mul": silu_mul, "gelu_mul": gelu_mul}[op](both)
    gate, up = np.split(wide(both), 2, axis=-1)
    assert (y.dtype, y.shape) == (dtype, gate.shape)
    assert_close(y, getattr(oracle, op)(gate, up), tolerance)


@DTYPES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize(
    "shape, length_factor",  # tokens, heads, key-value heads, D, R / 2
    [
        ((1, 9, 3, 64, 32), 1.0),
        ((300, 2, 1, 16, 8), 1.25),
        ((5, 2, 2, 11, 3), 1.0),
        ((3, 4, 2, 8, 0), 2.0),
        ((0, 2, 1, 8, 4), 1.0),
    ],
)
def test_qkv_rope(shape, length_factor, eps, gated, dtype, tolerance) -> None:
    """eps: of norms, None for none."""
    num_tokens, num_heads, num_kv_heads, d, half = shape
    qkv = make_x(num_tokens, (num_heads * (2 if gated else 1) + 2 * num_kv_heads) * d).astype(dtype)
    positions, freqs, norms = make_positions(num_tokens), make_freqs(half), None if eps is None else make_x(2, d)
    options = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": eps or 0.0, "length_factor": length_factor}
    outputs = qkv_rope(qkv, positions, freqs, norms, **options, gated=gated)
    arrays = (np.array(x) if x is not None else None for x in (positions, freqs, norms))
    for y, expected in zip(outputs, oracle.qkv_rope(wide(qkv), *arrays, **options, gated=gated), strict=True):
        assert (y.dtype, y.shape) == (dtype, expected.shape)
        assert_close(y, expected, tolerance)


def test_rotation_means_what_mlx_means() -> None:
    x, freqs = make_x(7, 3, 16), make_freqs(6)
    positions = mx.arange(40, 47, dtype=mx.int32)
    expected = mx.fast.rope(
        x.swapaxes(0, 1)[None], 12, traditional=False, base=None, scale=1.0, offset=40, freqs=freqs
    )[0].swapaxes(0, 1)
    q, k, v = qkv_rope(x.flatten(-2), positions, freqs, num_heads=1, num_kv_heads=1)
    assert_close(mx.concatenate([q, k], axis=1), np.array(expected[:, :2]))
    assert mx.array_equal(v, x[:, 2:])


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, up, weight = make_x(300, 4, 50), make_x(300, 4, 50, seed=1), make_x(50)
    positions, freqs = make_positions(300), make_freqs(25)
    qkv, norms = make_x(300, 4 * 50), make_x(2, 50, seed=1)
    ops = [
        lambda t: rms_norm(x[t], weight, 1e-6),
        lambda t: silu_mul(x[t], up[t]),
        lambda t: gelu_mul(x[t], up[t]),
        lambda t: silu_mul(x[t]),
        *(
            lambda t, i=i: qkv_rope(qkv[t], positions[t], freqs, norms, num_heads=2, num_kv_heads=1, eps=1e-6)[i]
            for i in range(3)
        ),
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
        if part.shape[-1] % 4 == 0:
            assert_close(gelu_mul(part), oracle.gelu_mul(*np.split(wide(part), 2, axis=-1)))
        if part.ndim == 2 and part.shape[-1] % 4 == 0:
            positions, freqs = make_positions(2 * len(part))[::2], make_freqs(2)[::2]
            norms = make_x(2, part.shape[-1] // 2)[:, ::2]
            options = {"num_heads": 2, "num_kv_heads": 1, "eps": 1e-5}
            outputs = qkv_rope(part, positions, freqs, norms, **options)
            arrays = (np.array(x) for x in (positions, freqs, norms))
            for y, expected in zip(outputs, oracle.qkv_rope(wide(part), *arrays, **options), strict=True):
                assert_close(y, expected)


def test_mistakes_are_named() -> None:
    x, qkv, positions, freqs = make_x(3, 2, 8), make_x(3, 32), make_positions(3), make_freqs(4)

    def heads(qkv, positions=positions, freqs=freqs, norms=None, num_heads=2):
        return qkv_rope(qkv, positions, freqs, norms, num_heads=num_heads, num_kv_heads=1)

    mistakes = [
        (lambda: rms_norm(x, make_x(7), 1e-5), "[rms_norm] weight must be floating point [8] but got float32 (7)"),
        (lambda: rms_norm(positions, make_x(3), 1e-5), "[rms_norm] x must be floating point [..., D] but got int32"),
        (lambda: silu_mul(x, x[:2]), "[silu_mul] gate and up must have one shape and floating point dtype but got"),
        (lambda: gelu_mul(x, x[:2]), "[gelu_mul] gate and up must have one shape and floating point dtype but got"),
        (lambda: silu_mul(x, x.astype(mx.float16)), "[silu_mul] gate and up must have one shape and floating point"),
        (lambda: silu_mul(make_x(3, 7)), "[silu_mul] gate and up in one must be floating point [..., 2 N] but got"),
        (lambda: heads(x), "[qkv_rope] qkv must be floating point [T, 4 * D] but got float32 (3,2,8)"),
        (lambda: heads(make_x(3, 10)), "[qkv_rope] qkv must be floating point [T, 4 * D] but got float32 (3,10)"),
        (lambda: heads(qkv, num_heads=0), "[qkv_rope] there must be heads but got 0 and 1"),
        (lambda: heads(qkv, positions=positions[:2]), "[qkv_rope] positions must be int32 [3] but got int32 (2)"),
        (lambda: heads(qkv, freqs=make_freqs(5)), "[qkv_rope] freqs must be float32 [R / 2] with R <= 8 but got float"),
        (lambda: heads(qkv, norms=make_x(8)), "[qkv_rope] norms must be float32 [2, 8] but got float32 (8)"),
    ]
    for call, message in mistakes:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
