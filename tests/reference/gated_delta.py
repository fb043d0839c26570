"""NumPy oracle of `ops.gated_delta`: one token and head at a time, float64."""

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def unit(x: F64) -> F64:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def gated_delta(
    qkv: F32,  # [T, C]
    conv_weight: F32,  # [C, K]
    a: F32,  # [T, Hv]
    b: F32,
    a_log: F32,  # [Hv]
    dt_bias: F32,
    conv_state: F32,  # [S, K - 1, C]
    state: F32,  # [S, Hv, Dv, Dk]
    *,
    slots: NDArray[np.int32],  # [B]
    query_lens: list[int],
    fresh: list[bool],
    num_key_heads: int,
    key_head_dim: int,
) -> tuple[F64, F64, F64]:  # [T, Hv, Dv], conv_state, state
    _, heads, value_dim, _ = state.shape
    key_channels, group = num_key_heads * key_head_dim, heads // num_key_heads
    new_conv, new_state = conv_state.astype(np.float64), state.astype(np.float64)
    y = np.empty((len(qkv), heads, value_dim))
    row_of_token = np.repeat(np.arange(len(slots)), query_lens)
    for row, slot in enumerate(slots.tolist()):
        if fresh[row]:
            new_conv[slot], new_state[slot] = 0, 0
    for t, row in enumerate(row_of_token.tolist()):
        slot = slots[row]
        window = np.concatenate([new_conv[slot], qkv[t : t + 1].astype(np.float64)])  # [K, C]
        new_conv[slot] = window[1:]
        mixed = (window * conv_weight.T).sum(0)
        mixed = mixed / (1 + np.exp(-mixed))
        q, k = unit(mixed[: 2 * key_channels].reshape(2, num_key_heads, key_head_dim))
        v = mixed[2 * key_channels :].reshape(heads, value_dim)
        beta = 1 / (1 + np.exp(-b[t].astype(np.float64)))
        decay = np.exp(-np.exp(a_log.astype(np.float64)) * np.logaddexp(a[t].astype(np.float64) + dt_bias, 0))
        for head in range(heads):
            s, key = new_state[slot, head], k[head // group]  # [Dv, Dk], [Dk]
            s *= decay[head]
            s += np.outer(beta[head] * (v[head] - s @ key), key)
            y[t, head] = s @ q[head // group] * key_head_dim**-0.5
    return y, new_conv, new_state
