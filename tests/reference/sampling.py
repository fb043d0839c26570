"""NumPy oracle of `ops.sampling`: sorts the vocabulary, counts tokens in dictionaries, computes in float64.

Logits, scaled logits and the uniform numbers are float32, as the op defines them."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

INVALID_TOKEN = 0xFFFFFFFF
MAX_DRY_LENGTH = 50


@dataclass(frozen=True)
class Params:
    """A row's parameters: those of ROW_DTYPE, and what lies in its ranges."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    bias: dict[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None
    history: tuple[int, ...] = ()
    num_output: int = 0  # the history's last tokens that were generated
    penalty_window: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 0
    breakers: tuple[int, ...] = ()
    num_logprobs: int = -1
    processed_logprobs: bool = False
    given_token: int = -1

    def but(self, **changes: Any) -> "Params":
        return replace(self, **changes)

    def newest(self, window: int) -> tuple[int, ...]:
        return self.history[-window:] if window else self.history

    def output(self) -> tuple[int, ...]:
        newest = self.newest(self.penalty_window)
        return newest[len(newest) - min(self.num_output, len(newest)) :]


@dataclass(frozen=True)
class Drawn:
    """A token, and how far the draw and the filters were from another result: rounding may turn those that are near."""

    token: int
    margin: float
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, as in Salmon et al. 2011, section 3.3."""
    key = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return counter


def uniforms(seed: int, position: int) -> tuple[float, float]:
    words = philox4x32([position, 0, 0, 0], [seed % (1 << 32), seed >> 32])
    return (words[0] >> 8) / (1 << 24), (words[1] >> 8) / (1 << 24)


def repetition_lengths(history: tuple[int, ...], breakers: tuple[int, ...]) -> dict[int, int]:
    """For each token that would make a repetition longer, the longest one's length."""
    lengths: dict[int, int] = {}
    for i in range(len(history) - 1):
        length = 0
        while length < min(i + 1, MAX_DRY_LENGTH):
            token = history[-1 - length]
            if history[i - length] != token or token in breakers:
                break
            length += 1
        if length and history[i + 1] not in breakers:
            lengths[history[i + 1]] = max(lengths.get(history[i + 1], 0), length)
    return lengths


def adjust(logits: NDArray[np.float32], params: Params) -> NDArray[np.float32]:
    x = logits.astype(np.float32).copy()
    f32 = np.float32
    for token, value in params.bias.items():
        x[token] += f32(value)
    if params.allowed is not None:
        x[[token for token in range(len(x)) if token not in params.allowed]] = -np.inf
    for token in set(params.newest(params.penalty_window)):
        x[token] = (
            x[token] / f32(params.repetition_penalty) if x[token] > 0 else x[token] * f32(params.repetition_penalty)
        )
    for token, count in Counter(params.output()).items():
        x[token] -= f32(params.frequency_penalty) * f32(count) + f32(params.presence_penalty)
    if params.dry_multiplier:
        for token, length in repetition_lengths(params.newest(params.dry_window), params.breakers).items():
            if length >= params.dry_allowed_length:
                penalty = f32(params.dry_multiplier)
                for _ in range(params.dry_allowed_length, length):
                    penalty *= f32(params.dry_base)
                x[token] -= penalty
    return x


class Kept:
    """The tokens that filters leave, likeliest first, and how near they were to leave others."""

    def __init__(self, x: NDArray[np.float32], temperature: float) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.scaled = (x - x.max()) / np.float32(temperature)
        self.weights = np.exp(self.scaled.astype(np.float64))
        order = np.argsort(-self.scaled, kind="stable")
        self.order = order[self.scaled[order] > -np.inf]
        self.margin = 1.0

    def total(self) -> float:
        return float(self.weights[self.order].sum())

    def _near(self, distances: NDArray[np.float64]) -> None:
        self.margin = min(self.margin, float(np.abs(distances).min(initial=1.0)))

    def top_n_sigma(self, x: NDArray[np.float32], n: float, temperature: float) -> None:
        deviation = float(x[x > -np.inf].astype(np.float64).std())
        distance = np.float32(n) * deviation / np.float32(temperature) + self.scaled[self.order].astype(np.float64)
        self._near(distance / max(n * deviation / temperature, 1e-30))
        self.order = self.order[distance >= 0]

    def share(self, order: NDArray[np.intp], share: float) -> NDArray[np.intp]:
        """As few of `order` as reach the share."""
        sums = np.cumsum(self.weights[order]) / self.weights[order].sum()
        self._near(sums - share)
        return order[: int(np.searchsorted(sums, share)) + 1]

    def typical(self, p: float) -> None:
        probabilities = self.weights[self.order] / self.total()
        information = -self.scaled[self.order].astype(np.float64)  # up to a constant
        mean = float((probabilities * information)[probabilities > 0].sum())
        distances = np.abs(information - mean)
        by_id = np.argsort(self.order)
        closest = by_id[np.argsort(distances[by_id], kind="stable")]
        self._near(np.diff(distances[closest][probabilities[closest] > 0]) / 4)  # float32 may order them otherwise
        chosen = self.share(self.order[closest], p)
        self.order = self.order[np.isin(self.order, chosen)]

    def min_p(self, p: float) -> None:
        distance = self.scaled[self.order] - self.scaled[self.order[0]] - np.log(np.float32(p))
        self._near(distance[distance != 0])
        self.order = self.order[distance >= 0]

    def exclude_top_choices(self, threshold: float) -> None:
        distance = self.weights[self.order] / self.total() - threshold
        self._near(distance)
        choices = self.order[(distance >= 0) & (self.weights[self.order] > 1e-38)]
        self.order = self.order[max(len(choices) - 1, 0) :]

    def draw(self, u: float) -> int:
        ids = np.sort(self.order)
        sums = np.cumsum(self.weights[ids]) / self.total()
        self._near(sums[:-1] - u)
        return int(ids[min(int(np.searchsorted(sums, u, side="right")), len(ids) - 1)])


def filtered(x: NDArray[np.float32], params: Params, xtc_u: float) -> Kept:
    kept = Kept(x, params.temperature)
    if params.top_n_sigma:
        kept.top_n_sigma(x, params.top_n_sigma, params.temperature)
    if params.top_k:
        kept.order = kept.order[: params.top_k]
    if params.typical_p < 1:
        kept.typical(float(np.float32(params.typical_p)))
    if params.top_p < 1:
        kept.order = kept.share(kept.order, float(np.float32(params.top_p)))
    if params.min_p:
        kept.min_p(params.min_p)
    if xtc_u < np.float32(params.xtc_probability):
        kept.exclude_top_choices(float(np.float32(params.xtc_threshold)))
    return kept


def sample(logits: NDArray[np.float32], params: Params) -> Drawn:
    """One row, [V]."""
    if not np.all(logits < np.inf) or logits.max() == -np.inf:
        return Drawn(INVALID_TOKEN, 1.0)
    x = adjust(logits, params)
    if x.max() == -np.inf:
        return Drawn(INVALID_TOKEN, 1.0)
    u, xtc_u = uniforms(params.seed, params.position)
    if params.temperature == 0:
        kept = Kept(x, 1.0)
        token = int(x.argmax())
    else:
        kept = filtered(x, params, xtc_u)
        token = kept.draw(u)
    token = token if params.given_token < 0 else params.given_token
    if params.num_logprobs < 0:
        return Drawn(token, kept.margin)
    scored = kept if params.processed_logprobs else Kept(logits, 1.0)
    log_total = np.log(scored.total())
    logprobs = {int(i): float(scored.scaled[i] - log_total) for i in scored.order}
    top = tuple((int(i), logprobs[int(i)]) for i in scored.order[: params.num_logprobs])
    return Drawn(token, kept.margin, logprobs.get(token, -np.inf), top)
