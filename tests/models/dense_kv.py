"""A KV cache and recurrent states of plain arrays: what models are tested with."""

import mlx.core as mx
import numpy as np

from reference.gated_delta import gated_delta


class DenseKV:
    """Keys, values and states of several requests, each request's in arrays of its own."""

    def __init__(self) -> None:
        self.lengths: dict[str, int] = {}
        self.arrays: dict[tuple[str, int], tuple[mx.array, mx.array]] = {}
        self.states: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}  # [K - 1, C] and [Hv, Dv, Dk]


class DenseContext:
    """`StepContext` of one step, in which each request of `num_tokens` has so many tokens."""

    def __init__(self, kv: DenseKV, num_tokens: dict[str, int]) -> None:
        starts = {name: kv.lengths.get(name, 0) for name in num_tokens}
        positions = [np.arange(starts[name], starts[name] + count) for name, count in num_tokens.items()]
        self.positions = mx.array(np.concatenate(positions).astype(np.int32))
        self._kv, self._num_tokens = kv, num_tokens
        kv.lengths |= {name: starts[name] + count for name, count in num_tokens.items()}

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, **options) -> mx.array:
        """`options` are those of `StepContext.attend`."""
        ends = np.cumsum(list(self._num_tokens.values()))[:-1].tolist()
        parts = zip(self._num_tokens, mx.split(q, ends), mx.split(k, ends), mx.split(v, ends), strict=True)
        return mx.concatenate([self._attend_one((name, layer), q, k, v, options) for name, q, k, v in parts])

    def _attend_one(self, key: tuple[str, int], q: mx.array, k: mx.array, v: mx.array, options) -> mx.array:
        if key in self._kv.arrays:
            old_k, old_v = self._kv.arrays[key]
            k, v = mx.concatenate([old_k, k]), mx.concatenate([old_v, v])
        self._kv.arrays[key] = k, v
        return mx.array(attention(*map(_float32, (q, k, v)), **options), q.dtype)

    def gated_delta(self, layer, qkv, conv_weight, a, b, a_log, dt_bias, *, num_key_heads, key_head_dim) -> mx.array:
        conv_weight, a_log, dt_bias = map(_float32, (conv_weight, a_log, dt_bias))
        (channels, kernel), num_heads = conv_weight.shape, a.shape[1]
        value_head_dim = (channels - 2 * num_key_heads * key_head_dim) // num_heads
        zeros = np.zeros((kernel - 1, channels)), np.zeros((num_heads, value_head_dim, key_head_dim))
        ends = np.cumsum(list(self._num_tokens.values()))[:-1].tolist()
        parts = zip(self._num_tokens, *(np.split(_float32(x), ends) for x in (qkv, a, b)), strict=True)
        outputs = []
        for name, qkv_part, a_part, b_part in parts:
            conv_state, state = self._kv.states.get((name, layer), zeros)
            y, conv_state, state = gated_delta(
                qkv_part,
                conv_weight,
                a_part,
                b_part,
                a_log,
                dt_bias,
                conv_state[None],
                state[None],
                slots=np.zeros(1, np.int32),
                query_lens=[len(qkv_part)],
                fresh=[False],
                num_key_heads=num_key_heads,
                key_head_dim=key_head_dim,
            )
            self._kv.states[name, layer] = conv_state[0], state[0]
            outputs.append(y)
        return mx.array(np.concatenate(outputs), qkv.dtype)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """The last queries [T, H, D] of a request attend causally to its keys and values [S, Hk, D]: [T, H, D]

    In NumPy: on a GPU MLX prepares its own attention anew for each S.
    """
    (num_queries, num_heads, _), (num_keys, num_kv_heads, head_dim) = q.shape, k.shape
    q = q.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = np.einsum("thgd,shd->hgts", q, k, optimize=True) * np.float64(scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    distance = np.arange(num_keys - num_queries, num_keys)[:, None] - np.arange(num_keys)  # [T, S]
    scores[..., (distance < 0) | (distance >= (window or num_keys))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hgts,shd->thgd", weights / weights.sum(-1, keepdims=True), v, optimize=True)
    return y.reshape(num_queries, num_heads, head_dim)


def _float32(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def step(model, kv: DenseKV, tokens: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Run the next tokens of each request in one batch; the logits [T, V] of each."""
    token_ids = mx.array([token_id for ids in tokens.values() for token_id in ids], mx.int32)
    ctx = DenseContext(kv, {name: len(ids) for name, ids in tokens.items()})
    logits = np.array(model.logits(model(token_ids, ctx)))
    ends = np.cumsum([len(ids) for ids in tokens.values()])[:-1]
    return dict(zip(tokens, np.split(logits, ends), strict=True))


def prompt_logits(model, token_ids: list[int]) -> np.ndarray:
    """Logits [T, V] of one prompt in one piece."""
    return step(model, DenseKV(), {"": token_ids})[""]


def greedy(model, prompt: list[int], count: int, end_token_ids: tuple[int, ...] = ()) -> list[int]:
    """The next `count` most likely tokens, or fewer if an end token (not returned) comes first."""
    kv, tokens, output = DenseKV(), list(prompt), list[int]()
    while len(output) < count:
        best = int(step(model, kv, {"": tokens})[""][-1].argmax())
        if best in end_token_ids:
            break
        output.append(best)
        tokens = [best]
    return output
