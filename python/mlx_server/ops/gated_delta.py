"""The linear attention of Qwen3-Next: a short causal convolution and the gated delta rule.

After Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks" (arXiv 2412.06464). T tokens of all rows, B rows, S
slots, Hk key heads of size Dk, Hv value heads of size Dv, K > 1 taps of convolution, C = 2 Hk Dk + Hv Dv channels.

The channels pass a causal depthwise convolution and SiLU and are then q, k [Hk, Dk] and v [Hv, Dv]; q and k are
brought to length 1 and q is scaled by Dk ** -0.5. Value head h, which uses key head h // (Hv / Hk), applies to its
state M [Dv, Dk], token by token, with beta = sigmoid(b) and g = -exp(a_log) * softplus(a + dt_bias):

    M = exp(g) * M;  M += beta * (v - M @ k) k^T;  y = M @ q
"""

import mlx.core as mx

from mlx_server import _ext


def gated_delta(
    qkv: mx.array,
    conv_weight: mx.array,
    a: mx.array,
    b: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    conv_state: mx.array,
    state: mx.array,
    *,
    slots: mx.array,
    query_lens: list[int],
    fresh: list[bool],
    num_key_heads: int,
    key_head_dim: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """One layer's linear attention for a ragged batch: prefill chunks and decodes in one call.

    Computed in float32. A row's result does not depend on the other rows.

    The returned states take over the memory of the given ones, which must not be used again, as in
    `y, self.conv, self.state = gated_delta(..., self.conv, self.state, ...)`. Slots of other rows keep their values.

    Args:
        qkv: [T, C], T = sum(query_lens), the rows one after the other: all heads' q, then all k, then all v.
        conv_weight: [C, K]; tap K - 1 meets the token itself, tap 0 the one K - 1 before it.
        a, b: [T, Hv], what gate and beta are made of.
        a_log, dt_bias: [Hv].
        conv_state: [S, K - 1, C], the newest inputs of the convolution, oldest first.
        state: [S, Hv, Dv, Dk] float32.
        slots: [B] int32, distinct, the slot of each row; its values are not checked.
        query_lens: B integers >= 1.
        fresh: B flags; a fresh row starts from zeros, whatever lies in its slot.
        num_key_heads: Hk, of which Hv is a multiple.
        key_head_dim: Dk.
    Returns:
        y [T, Hv, Dv] in qkv's dtype, conv_state, state.
    Raises:
        ValueError: shapes, dtypes or lengths don't fit.
    """
    return _ext.gated_delta(
        qkv,
        conv_weight,
        a,
        b,
        a_log,
        dt_bias,
        conv_state,
        state,
        slots=slots,
        query_lens=query_lens,
        fresh=fresh,
        num_key_heads=num_key_heads,
        key_head_dim=key_head_dim,
    )
