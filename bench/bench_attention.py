"""Attention over the paged KV cache, beside what MLX offers: gather each row's blocks, then its fused attention."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.attention import AttentionBatch, KVPool, new_kv_pool, paged_attention, pool_arrays, write_kv

HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # H, Hk, D
BLOCK_SIZE = 16
# (query_len, context_len) of each row
BATCHES = {
    "decode at 512": [(1, 512)],
    "decode at 4k": [(1, 4096)],
    "decode at 32k": [(1, 32768)],
    "8 decodes at 512": [(1, 512)] * 8,
    "8 decodes at 4k": [(1, 4096)] * 8,
    "prefill of 512": [(512, 512)],
    "prefill of 2048": [(2048, 2048)],
    "4 decodes and a chunk": [(1, 500)] * 4 + [(256, 768)],
}
LAYERS = 8  # of one launch: what a step's layers share is made once


def gather_and_sdpa(q, pool, tables, lens, scale):
    """Row by row, as MLX's own attention wants it."""
    outputs, begin = [], 0
    for table, (query_len, context_len) in zip(tables, lens, strict=True):
        rows = q[begin : begin + query_len].swapaxes(0, 1)[None]  # [1, H, query_len, D]
        k, v = (x[table].flatten(0, 1)[:context_len].swapaxes(0, 1)[None] for x in (pool.keys, pool.values))
        mask = "causal" if query_len > 1 else None
        outputs.append(mx.fast.scaled_dot_product_attention(rows, k, v, scale=scale, mask=mask)[0].swapaxes(0, 1))
        begin += query_len
    return mx.concatenate(outputs)


def in_eight_bits(pool):
    keys, values = pool.keys.flatten(0, 1), pool.values.flatten(0, 1)  # [N * block_size, Hk, D]
    return write_kv(new_kv_pool(pool.keys.shape, pool.keys.dtype, bits=8), keys, values, mx.arange(len(keys)))


@pytest.mark.parametrize("form", ["mlx-server", "mlx-server, 8 bits", "gather and SDPA"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
def bench_attention(benchmark, batch, heads, form):
    num_heads, num_kv_heads, head_dim = HEADS[heads]
    dtype = mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16
    lens = BATCHES[batch]
    row_blocks = max(context_len for _, context_len in lens) // BLOCK_SIZE
    blocks = np.random.default_rng(0).permutation(row_blocks * len(lens)).astype(np.int32)
    tables = mx.array(blocks.reshape(len(lens), row_blocks))
    shape = (tables.size, BLOCK_SIZE, num_kv_heads, head_dim)
    pool = KVPool(mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype))
    q = mx.random.normal((sum(query_len for query_len, _ in lens), num_heads, head_dim)).astype(dtype)
    if form == "mlx-server, 8 bits":
        pool = in_eight_bits(pool)
    mx.eval(q, pool_arrays(pool), tables)

    def run():
        x = q
        rows = AttentionBatch(tables, *(list(lengths) for lengths in zip(*lens, strict=True)))
        for _ in range(LAYERS):
            if form == "gather and SDPA":
                x = gather_and_sdpa(x, pool, tables, lens, head_dim**-0.5)
            else:
                x = paged_attention(x, pool, rows, scale=head_dim**-0.5)
        mx.eval(x)

    mx.reset_peak_memory()
    benchmark.group = f"attention, {LAYERS} layers of {heads}: {batch}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() / 1e6


@pytest.mark.parametrize("num_blocks", [256, 16384])
def bench_write_kv(benchmark, num_blocks):
    """One token into a pool: the time must not depend on the pool's size."""
    benchmark.group = "write_kv of one token"
    pools = [new_kv_pool((num_blocks, BLOCK_SIZE, 3, 64), mx.float32)]
    token, slot = mx.ones((1, 3, 64)), mx.array([num_blocks * BLOCK_SIZE - 1], dtype=mx.int32)
    mx.eval(pools[0].keys, pools[0].values, token, slot)

    def write():
        pools[0] = write_kv(pools[0], token, token, slot)
        mx.eval(pools[0].keys, pools[0].values)

    benchmark.pedantic(write, rounds=20, iterations=10, warmup_rounds=1)
