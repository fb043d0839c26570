"""Rotary position embedding of a ragged batch."""

import mlx.core as mx


def rope(x: mx.array, positions: mx.array, freqs: mx.array, *, traditional: bool = False) -> mx.array:
    """Rotates the first `2 * len(freqs)` features of each head by its token's position (Su et al., 2021).

    Args:
        x: [T, H, D], floating point.
        positions: [T] int32, one for each token: tokens of several requests may stand side by side.
        freqs: [R / 2] float32, R <= D, as in `mx.fast.rope`: feature pair i turns by `position / freqs[i]`.
        traditional: pairs are features (2i, 2i + 1) instead of (i, i + R / 2).
    Returns:
        [T, H, D], the dtype of x; features from R on are unchanged.
    """
    half = freqs.size
    angles = positions.astype(mx.float32)[:, None, None] / freqs  # [T, 1, R / 2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    rotated, rest = x[..., : 2 * half].astype(mx.float32), x[..., 2 * half :]
    if traditional:
        a, b = rotated[..., ::2], rotated[..., 1::2]  # [T, H, R / 2]
        turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(rotated.shape)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    turned = turned.astype(x.dtype)
    return mx.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
