"""Mixture of experts: choosing the experts of each token, and computing them.

After Shazeer et al. 2017, "Outrageously large neural networks: the sparsely-gated mixture-of-experts layer". Letters:
T tokens, D features, E experts, N features inside an expert, k experts for each token.
"""

from typing import Literal

import mlx.core as mx

from mlx_server import _ext
from mlx_server._ext import ExpertMatrix

__all__ = ["ExpertMatrix", "moe_mlp", "route"]

_SCORING = {"softmax": _ext.Scoring.SOFTMAX, "sigmoid": _ext.Scoring.SIGMOID}


def route(
    logits: mx.array, *, top_k: int, scoring: Literal["softmax", "sigmoid"] = "softmax", normalize: bool
) -> tuple[mx.array, mx.array]:
    """The best `top_k` experts of each token and their weights, computed in float32.

    Scores of all experts first (softmax over E, or the sigmoid of each), then the best of them, then, if `normalize`,
    division by their sum. A token's result does not depend on the other tokens.

    Args:
        logits: [T, E], floating point.
        top_k: 1 <= top_k <= E.
        normalize: let each token's weights sum to 1 (`norm_topk_prob` of transformers).
    Returns:
        experts [T, top_k] int32, best first, lower ids first among equals; weights [T, top_k] float32. A token whose
        scores are NaN gets the first experts and NaN.
    Raises:
        ValueError: shape or dtype don't fit, top_k is out of range, or scoring is unknown.
    """
    if scoring not in _SCORING:
        raise ValueError(f"[route] scoring must be softmax or sigmoid but got {scoring}.")
    return _ext.route(logits, top_k=top_k, scoring=_SCORING[scoring], normalize=normalize)


def moe_mlp(
    x: mx.array,
    experts: mx.array,
    weights: mx.array,
    *,
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    shared: mx.array | None = None,
) -> mx.array:
    """The weighted sum of each token's SwiGLU experts, `down(silu(gate(x)) * up(x))`, plus `shared`.

    Args:
        x: [T, D], floating point.
        experts: [T, k] int32 in [0, E), as `route` gives them; the values are not checked.
        weights: [T, k] float32.
        gate, up: matrices [E, N, D].
        down: matrices [E, D, N].
        shared: [T, D] with the dtype of x: the shared expert's output.
    Returns:
        [T, D], the dtype of x. On the CPU a token's result is the same to the last bit whatever the other tokens.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.moe_mlp(x, experts, weights, gate=gate, up=up, down=down, shared=shared)
