"""Normalisation layers."""

import mlx.core as mx

from mlx_server import _ext


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`x / sqrt(mean(x²) + eps) * weight` over the last axis (Zhang and Sennrich, 2019).

    Args:
        x: [..., D], floating point.
        weight: [D], floating point.
        eps: added to the mean square.
    Returns:
        [..., D], the dtype of x.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.rms_norm(x, weight, eps)
