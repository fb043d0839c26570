"""`linear` and `quantized_linear` against NumPy and against MLX's `quantized_matmul`."""

import re
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.linear import linear, quantized_linear
from reference.linear import quantized_linear as oracle

# On a GPU the products are MLX's; CUDA lacks some forms.
ON_GPU = mx.default_device() == mx.Device(mx.gpu)
BITS = [4, 8] if ON_GPU else [2, 3, 4, 5, 6, 8]
GROUP_SIZES = [32, 64] if ON_GPU else [32, 64, 128]


class Weight(NamedTuple):
    """[N, K], quantized; `arrays` are the packed weight, its scales and its biases."""

    arrays: tuple[mx.array, mx.array, mx.array]
    group_size: int
    bits: int

    def linear(self, x: mx.array) -> mx.array:
        return quantized_linear(x, *self.arrays, group_size=self.group_size, bits=self.bits)

    def fallback(self, x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, *self.arrays, group_size=self.group_size, bits=self.bits)

    def oracle(self, x: mx.array) -> np.ndarray:
        weight, scales, biases = (np.array(a) for a in self.arrays)
        return oracle(np.array(x), weight, scales, biases, group_size=self.group_size, bits=self.bits)


def make_weight(n: int, k: int, group_size: int = 32, bits: int = 4) -> Weight:
    rng = np.random.default_rng(n + k)
    dense = mx.array(rng.standard_normal((n, k), dtype=np.float32))
    return Weight(mx.quantize(dense, group_size, bits), group_size, bits)


def make_x(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(1).standard_normal(shape, dtype=np.float32))


def assert_close(y: mx.array, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert y.shape == expected.shape
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(np.array(y.astype(mx.float32)), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_agrees_with_the_oracle_and_the_fallback(rows: int, group_size: int, bits: int) -> None:
    weight, x = make_weight(75, 3 * group_size, group_size, bits), make_x(rows, 3 * group_size)
    y = weight.linear(x)
    assert_close(y, weight.oracle(x))
    assert_close(y, np.array(weight.fallback(x)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("n, k", [(70, 576), (33, 1536)])
def test_a_row_does_not_depend_on_the_rows_beside_it(n: int, k: int, bits: int) -> None:
    with mx.stream(mx.cpu):
        weight, x = make_weight(n, k, bits=bits), make_x(200, k)
        alone = mx.concatenate([weight.linear(x[i : i + 1]) for i in range(200)])
        for rows in (1, 2, 3, 5, 8, 33, 200):
            assert mx.array_equal(weight.linear(x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (0, 64), (4, 0, 64)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    weight, x = make_weight(9, 64), make_x(*shape)
    assert_close(weight.linear(x), weight.oracle(x))


def test_arrays_with_gaps() -> None:
    weight, x = make_weight(40, 128), make_x(128, 6, 5)
    views = [x.transpose(1, 2, 0), x.T, make_x(7, 256)[::2, ::2], mx.broadcast_to(make_x(128), (3, 128))]
    for view in views:
        assert_close(weight.linear(view), weight.oracle(view))
    rows = Weight((weight.arrays[0][1::2], weight.arrays[1][1::2], weight.arrays[2][1::2]), 32, 4)
    assert_close(rows.linear(make_x(2, 128)), rows.oracle(make_x(2, 128)))


def test_arrays_not_yet_computed() -> None:
    weight = make_weight(64, 64)
    x = make_x(3, 64)
    for _ in range(20):  # enough for MLX to cut the graph into several tasks
        x = weight.linear(x.T.T) / 64
        weight = Weight((weight.arrays[0] + 0, weight.arrays[1] * 1, weight.arrays[2] * 1), 32, 4)
    again = make_x(3, 64)
    for _ in range(20):
        again = weight.linear(again) / 64
        mx.eval(again)
    assert mx.array_equal(x, again)


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 2e-3), (mx.bfloat16, 1e-2)])
def test_half_precision(dtype: mx.Dtype, tolerance: float) -> None:
    weight, x = make_weight(24, 64), make_x(5, 64).astype(dtype)
    y = weight.linear(x)
    assert y.dtype == dtype
    assert_close(y, weight.oracle(x.astype(mx.float32)), tolerance)
    scales, biases = (a.astype(dtype) for a in weight.arrays[1:])
    assert Weight((weight.arrays[0], scales, biases), 32, 4).linear(make_x(5, 64)).dtype == mx.float32


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 130])
def test_everything_in_half_precision(rows: int, bits: int) -> None:
    """As models compute on GPUs, where the number of rows chooses the kernel."""
    weight = make_weight(75, 192, 64, bits)
    scales, biases = (a.astype(mx.float16) for a in weight.arrays[1:])
    weight = Weight((weight.arrays[0], scales, biases), 64, bits)
    x = make_x(rows, 192).astype(mx.float16)
    assert_close(weight.linear(x), weight.oracle(x), 1e-2)


@pytest.mark.skipif(not ON_GPU, reason="the CPU's kernels promise it for all rows, see above")
def test_few_rows_do_not_depend_on_each_other_on_a_gpu() -> None:
    weight, x = make_weight(70, 2112, 64), make_x(16, 2112).astype(mx.bfloat16)
    arrays = weight.arrays[0], *(a.astype(mx.bfloat16) for a in weight.arrays[1:])
    together = quantized_linear(x, *arrays, group_size=64, bits=4)
    for row in range(16):
        assert mx.array_equal(quantized_linear(x[row : row + 1], *arrays, group_size=64, bits=4)[0], together[row])


FLOAT_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


@pytest.fixture(params=FLOAT_MODES)
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A floating point form, as the arguments of MLX's functions and ours."""
    group_size, bits = FLOAT_MODES[request.param]
    return {"group_size": group_size, "bits": bits, "mode": request.param}


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_floating_point_forms(rows: int, how: dict[str, Any]) -> None:
    with mx.stream(mx.cpu):
        weight, scales = mx.quantize(make_x(75, 96), **how)[:2]
        dense = mx.dequantize(weight, scales, **how, dtype=mx.float32)
        x = make_x(rows, 96)
        assert_close(quantized_linear(x, weight, scales, **how), np.array(x, np.float64) @ np.array(dense).T)


def test_every_code_of_a_floating_point_form(how: dict[str, Any]) -> None:
    """Bit for bit what MLX dequantizes; rows of the identity pick out the weights. NaN's codes are nobody's."""
    with mx.stream(mx.cpu):
        rng = np.random.default_rng(0)
        weight = mx.array(rng.integers(0, 256, (256, 32 * how["bits"] // 8), np.uint8)).view(mx.uint32)
        weight = mx.where(how["bits"] == 8, weight & 0xBFBFBFBF, weight)
        codes = mx.arange(256, dtype=mx.uint8)  # e4m3 has NaN at 127 and 255, e8m0 at 255
        codes = mx.where((codes & 127) == 127, 0, codes) if how["group_size"] == 16 else mx.minimum(codes, 200)
        scales = mx.broadcast_to(codes[:, None], (256, 32 // how["group_size"]))
        dense = mx.dequantize(weight, scales, **how, dtype=mx.float32)
        for x in (mx.eye(32)[:1], mx.eye(32)):
            assert mx.array_equal(quantized_linear(x, weight, scales, **how), (dense.T)[: len(x)])


def test_a_row_of_a_floating_point_form_does_not_depend_on_the_rows_beside_it(how: dict[str, Any]) -> None:
    with mx.stream(mx.cpu):
        arrays, x = mx.quantize(make_x(70, 576), **how), make_x(50, 576)
        alone = mx.concatenate([quantized_linear(x[i : i + 1], *arrays, **how) for i in range(50)])
        for rows in (1, 2, 3, 5, 8, 33, 50):
            assert mx.array_equal(quantized_linear(x[:rows], *arrays, **how), alone[:rows]), rows


@pytest.mark.parametrize("n, k", [(70, 576), (33, 64), (9, 50), (1, 32)])
def test_plain_weights(n: int, k: int) -> None:
    weight, x = make_x(n, k), make_x(3, 4, k)
    assert_close(linear(x, weight), np.array(x, np.float64) @ np.array(weight).T)
    assert_close(linear(x[:, :, ::-1], weight[:, ::-1]), np.array(x, np.float64) @ np.array(weight).T)
    assert linear(x[:0], weight).shape == (0, 4, n)
    half = linear(x.astype(mx.float16), weight.astype(mx.float16))
    assert half.dtype == mx.float16
    assert_close(half, np.array(x, np.float64) @ np.array(weight).T, 1e-2)


def test_a_row_of_plain_weights_does_not_depend_on_the_rows_beside_it() -> None:
    with mx.stream(mx.cpu):
        weight, x = make_x(70, 576), make_x(200, 576)
        alone = mx.concatenate([linear(x[i : i + 1], weight) for i in range(200)])
        for rows in (1, 2, 3, 5, 8, 33, 200):
            assert mx.array_equal(linear(x[:rows], weight), alone[:rows]), rows


def test_mistakes_are_named() -> None:
    weight, scales, biases = make_weight(8, 64).arrays
    x = make_x(2, 64)
    both = x, weight, scales, biases

    def fails(message: str, *arrays: mx.array, group_size: int = 32, bits: int = 4, mode: str = "affine") -> None:
        with pytest.raises(ValueError, match=re.escape("[quantized_linear] " + message)):
            quantized_linear(*arrays, group_size=group_size, bits=bits, mode=mode)

    fails("x must be floating point [..., K] but got int32 (2,64)", x.astype(mx.int32), weight, scales, biases)
    fails("x must have the 64 columns of a 4-bit weight (8,8) but got (2,32)", x[:, :32], weight, scales, biases)
    fails("weight must be uint32 [N, K * bits / 32] but got float32 (8,2)", x, scales, scales, biases)
    fails("group_size must be positive and bits in 1..8 but got 0 and 4", x, weight, scales, biases, group_size=0)
    fails("scales and biases must have the shape (8,1)", x, weight, scales, biases, group_size=64)
    fails("scales and biases must have one floating point dtype", x, weight, scales, biases.astype(mx.float16))
    fails("there must be biases in the mode affine and no other but got the mode mxfp4", *both, mode="mxfp4")
    fails("there must be biases in the mode affine and no other but got the mode affine", x, weight, scales)
    fails("scales of the mode mxfp4 must be uint8 but got float32", x, weight, scales, mode="mxfp4")
    for message, arrays in {
        "weight must be floating point [N, K] but got uint32 (8,8)": (x, weight),
        "x must be floating point [..., 2] but got float32 (2,64)": (x, scales),
    }.items():
        with pytest.raises(ValueError, match=re.escape("[linear] " + message)):
            linear(*arrays)
