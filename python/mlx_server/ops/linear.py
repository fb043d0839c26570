"""Linear layers on quantized weights."""

import mlx.core as mx

from mlx_server import _ext


def quantized_linear(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, *, group_size: int, bits: int
) -> mx.array:
    """`x @ dequantize(weight).T` for MLX's affine quantization.

    On the CPU each row of the result is the same to the last bit whatever the number of rows.

    Args:
        x: [..., K], floating point.
        weight: [N, K * bits / 32] uint32, packed as `mx.quantize` does.
        scales, biases: [N, K / group_size], floating point. The CPU has fast kernels for float32 and groups of 32, 64
            and 128.
    Returns:
        [..., N], the dtype of x.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.quantized_linear(x, weight, scales, biases, group_size=group_size, bits=bits)
