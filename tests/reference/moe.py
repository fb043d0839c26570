"""NumPy oracle of `ops.moe`, float64."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Experts(NamedTuple):
    gate: Floats  # [E, N, D]
    up: Floats  # [E, N, D]
    down: Floats  # [E, D, N]


def route(
    logits: NDArray[np.float32], *, top_k: int, scoring: str, normalize: bool
) -> tuple[NDArray[np.int64], Floats]:
    """logits [T, E] -> experts [T, k], weights [T, k]"""
    x = logits.astype(np.float64)
    if scoring == "softmax":
        scores = np.exp(x - x.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-x))
    experts = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, experts, -1)
    return experts, weights / weights.sum(-1, keepdims=True) if normalize else weights


def moe_mlp(
    x: NDArray[np.float32],  # [T, D]
    experts: NDArray[np.int32],  # [T, k]
    weights: NDArray[np.float32],  # [T, k]
    matrices: Experts,
    shared: NDArray[np.float32] | None = None,  # [T, D]
) -> Floats:  # [T, D]
    y = np.zeros(x.shape) if shared is None else shared.astype(np.float64)
    for t, token in enumerate(x.astype(np.float64)):
        for expert, weight in zip(experts[t], weights[t], strict=True):
            gate = matrices.gate[expert] @ token  # [N]
            hidden = gate / (1 + np.exp(-gate)) * (matrices.up[expert] @ token)
            y[t] += weight * (matrices.down[expert] @ hidden)
    return y
