"""Rotary position embedding of a ragged batch."""

import mlx.core as mx

from mlx_server import _ext


def rope(x: mx.array, positions: mx.array, freqs: mx.array, *, traditional: bool = False) -> mx.array:
    """Rotates the first `2 * len(freqs)` features of each head by its token's position (Su et al., 2021).

    Args:
        x: [T, H, D], floating point.
        positions: [T] int32, one for each token: tokens of several requests may stand side by side.
        freqs: [R / 2] float32, R <= D, as in `mx.fast.rope`: feature pair i turns by `position / freqs[i]`.
        traditional: pairs are features (2i, 2i + 1) instead of (i, i + R / 2).
    Returns:
        [T, H, D], the dtype of x; features from R on are unchanged.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.rope(x, positions, freqs, traditional=traditional)
