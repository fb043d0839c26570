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


def qkv_rope(
    qkv: Floats,  # [T, (H + 2 * Hk) * D], or with a gate after each query
    positions: NDArray[np.int32],  # [T]
    freqs: Floats,  # [R / 2]
    norms: Floats | None = None,  # [2, D]
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 0.0,
    length_factor: float = 1.0,
    gated: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    sizes = num_heads * (2 if gated else 1), num_kv_heads, num_kv_heads
    heads = qkv.astype(np.float64).reshape(len(qkv), sum(sizes), qkv.shape[1] // sum(sizes))  # [T, heads, D]
    q, k, v = np.split(heads, np.cumsum(sizes)[:-1], axis=1)
    q = q[:, ::2] if gated else q
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    return _turned(q, positions, freqs, length_factor), _turned(k, positions, freqs, length_factor), v


def _turned(
    x: NDArray[np.float64], positions: NDArray[np.int32], freqs: Floats, length_factor: float
) -> NDArray[np.float64]:
    half = len(freqs)
    # A pair is a complex number, turned by its angle; the angle is rounded as it is in float32.
    angles = (positions.astype(np.float32)[:, None] / freqs).astype(np.float64)  # [T, R / 2]
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)[:, None]  # [T, H, R / 2]
    y = x.copy()
    y[..., :half], y[..., half : 2 * half] = length_factor * pairs.real, length_factor * pairs.imag
    return y
