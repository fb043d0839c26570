"""Activations of gated feed-forward layers."""

import mlx.core as mx

from mlx_server import _ext


def silu_mul(x: mx.array, up: mx.array | None = None) -> mx.array:
    """`gate * sigmoid(gate) * up`, the gate of SwiGLU (Shazeer, 2020).

    Args:
        x: the gate [..., N], floating point; without `up`, gate and up side by side [..., 2 * N].
        up: like the gate.
    Returns:
        [..., N], the dtype of x.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.silu_mul(x, up)


def gelu_mul(x: mx.array, up: mx.array | None = None) -> mx.array:
    """`gelu(gate) * up`, the gate of GeGLU (Shazeer, 2020), with GELU's approximation by tanh
    (https://arxiv.org/abs/1606.08415).

    Args, returns and errors are those of `silu_mul`.
    """
    return _ext.gelu_mul(x, up)
