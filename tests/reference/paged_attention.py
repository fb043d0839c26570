"""NumPy oracle of `ops.attention`: one query at a time, float64."""

import numpy as np
from numpy.typing import NDArray


def paged_attention(
    q: NDArray[np.float32],  # [T, H, D]
    k_pool: NDArray[np.float32],  # [N, block_size, Hk, D]
    v_pool: NDArray[np.float32],
    *,
    block_tables: NDArray[np.int32],  # [B, M]
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: NDArray[np.float32] | None = None,  # [H]
) -> NDArray[np.float64]:  # [T, H, D]
    block_size, group = k_pool.shape[1], q.shape[1] // k_pool.shape[2]
    out = np.empty(q.shape)
    token = 0
    for table, query_len, context_len in zip(block_tables, query_lens, context_lens, strict=True):
        for position in range(context_len - query_len, context_len):
            seen = np.arange(0 if window is None else max(0, position + 1 - window), position + 1)
            blocks, offsets = table[seen // block_size], seen % block_size
            for head in range(q.shape[1]):
                keys = k_pool[blocks, offsets, head // group].astype(np.float64)  # [seen, D]
                values = v_pool[blocks, offsets, head // group].astype(np.float64)
                scores = keys @ q[token, head].astype(np.float64) * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                if sinks is not None:  # a token more, whose value is zero
                    scores, values = np.append(scores, sinks[head]), np.vstack([values, np.zeros(q.shape[2])])
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ values / weights.sum()
            token += 1
    return out
