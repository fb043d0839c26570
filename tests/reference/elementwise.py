"""NumPy oracles of `ops.norm`, `ops.activation` and `ops.rope`, float64."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def rms_norm(x: Floats, weight: Floats, eps: float) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight


def silu_mul(gate: Floats, up: Floats) -> NDArray[np.float64]:
    wide = gate.astype(np.float64)
    return wide / (1 + np.exp(-wide)) * up


def gelu_mul(gate: Floats, up: Floats) -> NDArray[np.float64]:
    wide = gate.astype(np.float64)
    return 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))) * up


def rope(
    x: Floats,  # [T, H, D]
    positions: NDArray[np.int32],  # [T]
    freqs: Floats,  # [R / 2]
    *,
    traditional: bool = False,
) -> NDArray[np.float64]:
    half = len(freqs)
    first = 2 * np.arange(half) if traditional else np.arange(half)
    second = first + 1 if traditional else first + half
    # A pair is a complex number, turned by its angle; the angle is rounded as it is in float32.
    angles = (positions.astype(np.float32)[:, None] / freqs).astype(np.float64)  # [T, R / 2]
    pairs = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, None]  # [T, H, R / 2]
    y = x.astype(np.float64)
    y[..., first], y[..., second] = pairs.real, pairs.imag
    return y
