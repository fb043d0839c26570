"""Linear layers, on quantized weights and on plain ones."""

import mlx.core as mx

from mlx_server import _ext


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """`x @ weight.T`

    On the CPU each row of the result is the same to the last bit whatever the number of rows.

    Args:
        x: [..., K], floating point.
        weight: [N, K], floating point. The CPU has a kernel of ours for float32 and a K that is a multiple of 32.
    Returns:
        [..., N], the dtype of x.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.linear(x, weight)


def quantized_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """`x @ dequantize(weight).T` for MLX's quantized formats.

    On the CPU each row of the result is the same to the last bit whatever the number of rows.

    Args:
        x: [..., K], floating point.
        weight: [N, K * bits / 32] uint32, packed as `mx.quantize` does.
        scales: [N, K / group_size], floating point in the mode affine, else uint8. For affine the CPU has fast kernels
            for float32 and groups of 32, 64 and 128; for mxfp4, mxfp8 and nvfp4 if K is a multiple of 32.
        biases: like scales; in the mode affine alone.
    Returns:
        [..., N], the dtype of x.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.quantized_linear(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
