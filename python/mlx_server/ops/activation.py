"""Activations of gated feed-forward layers."""

import mlx.core as mx


def silu_mul(gate: mx.array, up: mx.array) -> mx.array:
    """`gate * sigmoid(gate) * up`, the gate of SwiGLU (Shazeer, 2020).

    Args:
        gate, up: same shape and floating point dtype.
    Returns:
        An array of that shape and dtype.
    """
    return gate * mx.sigmoid(gate) * up
