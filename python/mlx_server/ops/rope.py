"""Rotary position embedding of a ragged batch."""

import mlx.core as mx

from mlx_server import _ext


def qkv_rope(
    qkv: mx.array,
    positions: mx.array,
    freqs: mx.array,
    norms: mx.array | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float = 0.0,
    length_factor: float = 1.0,
    gated: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values out of one product; queries and keys are normalised, if there are `norms`, and their
    first `2 * len(freqs)` features are rotated by their token's position (Su et al., 2021).

    Letters: H query heads, Hk key-value heads, D features of each.

    Args:
        qkv: [T, (H + 2 * Hk) * D], floating point.
        positions: [T] int32, one for each token: tokens of several requests may stand side by side.
        freqs: [R / 2] float32, R <= D, as in `mx.fast.rope`: features (i, i + R / 2) turn by `position / freqs[i]`.
        norms: [2, D] float32: RMSNorm's weights for each query and for each key.
        eps: of the norms.
        length_factor: what turns becomes so many times as long (YaRN).
        gated: qkv is [T, (2 * H + 2 * Hk) * D], where each query is followed by a gate of its size; gates are left out.
    Returns:
        q [T, H, D], k and v [T, Hk, D], the dtype of qkv.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.qkv_rope(
        qkv,
        positions,
        freqs,
        norms,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        eps=eps,
        length_factor=length_factor,
        gated=gated,
    )
