"""Attention over the paged KV cache: our kernel beside its fallback, which gathers the blocks for MLX's attention."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_server import _ext
from mlx_server.ops.attention import paged_attention, write_kv

HEADS = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}  # H, Hk, D
BLOCK_SIZE = 16
# (query_len, context_len) of each row
BATCHES = {
    "decode at 512": [(1, 512)],
    "decode at 4096": [(1, 4096)],
    "8 decodes at 512": [(1, 512)] * 8,
    "prefill of 512": [(512, 512)],
    "4 decodes and a chunk": [(1, 500)] * 4 + [(256, 768)],
}


@pytest.mark.parametrize("op", [paged_attention, _ext.paged_attention_fallback], ids=["mlx-server", "gather and SDPA"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("batch", BATCHES)
def bench_attention(benchmark, op, heads, batch):
    num_heads, num_kv_heads, head_dim = HEADS[heads]
    query_lens, context_lens = zip(*BATCHES[batch], strict=True)
    row_blocks = max(context_lens) // BLOCK_SIZE
    rng = np.random.default_rng(0)
    tables = rng.permutation(row_blocks * len(query_lens)).reshape(len(query_lens), row_blocks).astype(np.int32)
    pool = mx.random.normal((tables.size, BLOCK_SIZE, num_kv_heads, head_dim))
    q = mx.random.normal((sum(query_lens), num_heads, head_dim))
    arguments = {
        "block_tables": mx.array(tables),
        "query_lens": list(query_lens),
        "context_lens": list(context_lens),
        "scale": head_dim**-0.5,
    }
    mx.eval(op(q, pool, pool, **arguments))
    mx.reset_peak_memory()
    benchmark.group = f"attention, one layer of {heads}: {batch}"
    benchmark.pedantic(lambda: mx.eval(op(q, pool, pool, **arguments)), rounds=5, warmup_rounds=1)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() / 1e6


@pytest.mark.parametrize("num_blocks", [256, 16384])
def bench_write_kv(benchmark, num_blocks):
    """One token into a pool: the time must not depend on the pool's size."""
    benchmark.group = "write_kv of one token"
    pools = [mx.zeros((num_blocks, BLOCK_SIZE, 3, 64)) for _ in range(2)]
    token, slot = mx.ones((1, 3, 64)), mx.array([num_blocks * BLOCK_SIZE - 1], dtype=mx.int32)
    mx.eval(pools, token, slot)

    def write():
        pools[:] = write_kv(*pools, token, token, slot)
        mx.eval(pools)

    benchmark.pedantic(write, rounds=20, iterations=10, warmup_rounds=1)
