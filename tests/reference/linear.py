"""NumPy oracle of `ops.linear`, float64."""

import numpy as np
from numpy.typing import NDArray


def dequantize(
    weight: NDArray[np.uint32],  # [N, K * bits / 32]
    scales: NDArray[np.float32],  # [N, K / group_size]
    biases: NDArray[np.float32],
    *,
    group_size: int,
    bits: int,
) -> NDArray[np.float64]:  # [N, K]
    stream = np.unpackbits(weight.view(np.uint8), axis=-1, bitorder="little")  # lowest bits first
    digits = stream.reshape(len(weight), -1, bits)
    q = digits @ (1 << np.arange(bits))  # [N, K]
    return q * np.repeat(scales.astype(np.float64), group_size, -1) + np.repeat(biases, group_size, -1)


def quantized_linear(
    x: NDArray[np.float32],  # [..., K]
    weight: NDArray[np.uint32],
    scales: NDArray[np.float32],
    biases: NDArray[np.float32],
    *,
    group_size: int,
    bits: int,
) -> NDArray[np.float64]:  # [..., N]
    return x.astype(np.float64) @ dequantize(weight, scales, biases, group_size=group_size, bits=bits).T
