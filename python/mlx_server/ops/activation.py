"""Activations of gated feed-forward layers."""

import mlx.core as mx

from mlx_server import _ext


def silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    """`gate * sigmoid(gate) * up`, the gate of SwiGLU (Shazeer, 2020).

    Args:
        gate, up: same shape and floating point dtype.
    Returns:
        An array of that shape and dtype.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.silu_mul(gate, up)


def gelu_mul(gate: mx.array, up: mx.array) -> mx.array:
    """`gelu(gate) * up`, the gate of GeGLU (Shazeer, 2020), with GELU's approximation by tanh
    (https://arxiv.org/abs/1606.08415).

    Args:
        gate, up: same shape and floating point dtype.
    Returns:
        An array of that shape and dtype.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.gelu_mul(gate, up)
