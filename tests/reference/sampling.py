"""NumPy oracle of `ops.sampling`: sorts the vocabulary and computes in float64.

Scaled logits and the uniform number are float32, as the op defines them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

INVALID_TOKEN = 0xFFFFFFFF


class Params(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


class Drawn(NamedTuple):
    """A token, and how far the draw and the filters were from another result: rounding may turn those that are near."""

    token: int
    margin: float


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, as in Salmon et al. 2011, section 3.3."""
    key = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return counter


def uniform(seed: int, position: int) -> float:
    return float(philox4x32([position, 0, 0, 0], [seed % (1 << 32), seed >> 32])[0] >> 8) / (1 << 24)


def _keep_until(weights: NDArray[np.float64], order: NDArray[np.intp], share: float) -> tuple[int, float]:
    """How many tokens reach the share, and the distance to the nearest other number."""
    sums = np.cumsum(weights[order]) / weights[order].sum()
    kept = min(int(np.searchsorted(sums, share)) + 1, len(order))
    return kept, float(np.abs(sums - share).min())


def sample(logits: NDArray[np.float32], params: Params) -> Drawn:
    """One row, [V]."""
    if not np.all(logits < np.inf) or logits.max() == -np.inf:
        return Drawn(INVALID_TOKEN, 1.0)
    if params.temperature == 0:
        return Drawn(int(logits.argmax()), 1.0)
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(params.temperature)
    weights = np.exp(scaled.astype(np.float64))
    order = np.argsort(-scaled, kind="stable")
    margin = 1.0
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        kept, margin = _keep_until(weights, order, float(np.float32(params.top_p)))
        order = order[:kept]
    if params.min_p > 0:
        distance = scaled[order] - np.log(np.float32(params.min_p))
        order = order[distance >= 0]
        margin = min(margin, float(np.abs(distance[distance != 0]).min(initial=1.0)))
    ids = np.sort(order)
    sums = np.cumsum(weights[ids]) / weights[ids].sum()
    u = uniform(params.seed, params.position)
    token = ids[min(int(np.searchsorted(sums, u, side="right")), len(ids) - 1)]
    margin = min(margin, float(np.abs(sums[:-1] - u).min(initial=1.0)))
    return Drawn(int(token), margin)
