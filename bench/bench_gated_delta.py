"""One layer of Qwen3-Next's linear attention: our op beside MLX's `gated_delta_update` and mlx-lm's.

Both peers get what a convolution in MLX's ops has made. mlx-lm's is a kernel on Metal and a loop over the tokens
elsewhere.
"""

import mlx.core as mx
import pytest

from mlx_server.ops.gated_delta import gated_delta

SHAPES = {"Qwen3-Next-80B": (16, 32, 128), "a quarter of it": (4, 8, 128)}  # Hk, Hv, Dk = Dv
BATCHES = {"decode": [1], "8 decodes": [1] * 8, "prefill of 512": [512], "prefill of 2048": [2048]}
TAPS = 4
# By the number of rows: the engine makes this array once a step, for all layers.
SLOTS = {n: mx.arange(n, dtype=mx.int32) for n in {len(rows) for rows in BATCHES.values()}}


def convolved(qkv, conv_weight, conv_state, rows, key_heads, key_dim, value_shape):
    """q, k, v [B, T, H, D] of rows of one length, and the new conv_state."""
    x = mx.concatenate([conv_state, qkv.reshape(rows, -1, qkv.shape[-1])], axis=1)
    mixed = mx.conv1d(x, conv_weight[..., None], groups=x.shape[-1])
    mixed = mixed * mx.sigmoid(mixed)
    keys = key_heads * key_dim
    q, k, v = mx.split(mixed, [keys, 2 * keys], axis=-1)
    q, k = (part.reshape(*part.shape[:2], key_heads, key_dim) for part in (q, k))
    scale = key_dim**-0.5
    q = scale**2 * mx.fast.rms_norm(q, None, 1e-6 * scale**2)
    k = scale * mx.fast.rms_norm(k, None, 1e-6 * scale**2)
    return q, k, v.reshape(*v.shape[:2], *value_shape), x[:, -(TAPS - 1) :]


def mlx_ops(qkv, conv_weight, a, b, a_log, dt_bias, conv_state, state, *, query_lens, num_key_heads, key_head_dim):
    rows = len(query_lens)  # each in the slot of its number
    q, k, v, conv_state = convolved(qkv, conv_weight, conv_state, rows, num_key_heads, key_head_dim, state.shape[1:3])
    gates = mx.exp(-mx.exp(a_log) * mx.logaddexp(a + dt_bias, 0.0)).reshape(rows, -1, a.shape[-1])
    y, state = mx.fast.gated_delta_update(q, k, v, gates, mx.sigmoid(b).reshape(gates.shape), state)
    return y.flatten(0, 1), conv_state, state


def mlx_lm(qkv, conv_weight, a, b, a_log, dt_bias, conv_state, state, *, query_lens, num_key_heads, key_head_dim):
    rows = len(query_lens)
    q, k, v, conv_state = convolved(qkv, conv_weight, conv_state, rows, num_key_heads, key_head_dim, state.shape[1:3])
    a, b = (part.reshape(rows, -1, part.shape[-1]) for part in (a, b))
    update = pytest.importorskip("mlx_lm.models.gated_delta").gated_delta_update
    y, state = update(q, k, v, a, b, a_log, dt_bias, state)
    return y.flatten(0, 1), conv_state, state


def make_inputs(shape, batch):
    key_heads, heads, dim = SHAPES[shape]
    tokens, slots, channels = sum(BATCHES[batch]), len(BATCHES[batch]), (2 * key_heads + heads) * dim
    shapes = [(tokens, channels), (channels, TAPS), (tokens, heads), (tokens, heads), (heads,), (heads,)]
    shapes += [(slots, TAPS - 1, channels), (slots, heads, dim, dim)]
    inputs = [mx.random.normal(s) * 0.5 for s in shapes]
    mx.eval(inputs)
    return inputs, {"query_lens": BATCHES[batch], "num_key_heads": key_heads, "key_head_dim": dim}


def ours(*inputs, query_lens, **heads):
    fresh = [False] * len(query_lens)
    return gated_delta(*inputs, slots=SLOTS[len(query_lens)], query_lens=query_lens, fresh=fresh, **heads)


@pytest.mark.parametrize("op", [ours, mlx_ops, mlx_lm], ids=["mlx-server", "MLX", "mlx-lm"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_gated_delta(benchmark, op, shape, batch):
    inputs, heads = make_inputs(shape, batch)

    def run():
        y, inputs[-2], inputs[-1] = op(*inputs, **heads)
        mx.eval(y, inputs[-2:])

    expected, expected_conv, expected_state = mlx_ops(*[x + 0 for x in inputs], **heads)
    y, conv_state, state = op(*[x + 0 for x in inputs], **heads)
    assert mx.abs(y - expected).max().item() < 1e-3
    assert mx.abs(conv_state - expected_conv).max().item() == 0
    assert mx.abs(state - expected_state).max().item() < 1e-3
    benchmark.group = f"gated_delta, one layer of {shape}: {batch}"
    rounds = 30 if op is ours or "decode" in batch else 3 if op is mlx_ops else 1
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=30 if op is ours else min(rounds, 3))
