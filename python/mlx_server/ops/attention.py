"""Attention over a paged KV cache.

After Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention". Letters:
T tokens of all rows, B rows, M blocks of the longest row's table, H heads, Hk key/value heads, D head size, N blocks of
the pool.
"""

import mlx.core as mx

from mlx_server import _ext
from mlx_server._ext import AttentionBatch, KVPool

__all__ = ["AttentionBatch", "KVPool", "copy_kv", "new_kv_pool", "paged_attention", "pool_arrays", "write_kv"]


def new_kv_pool(shape: tuple[int, int, int, int], dtype: mx.Dtype, *, bits: int | None = None) -> KVPool:
    """A pool for one layer's keys and values, [N, block_size, Hk, D] each, with undefined contents.

    With bits, which must be 8, of integers and one scale for each token and head instead of `dtype`. On the CPU, blocks
    that no token was ever written to take no memory.

    Raises:
        ValueError: a size is less than 1, or bits is neither 8 nor None.
    """
    return _ext.new_kv_pool(shape, dtype, bits=bits)


def pool_arrays(pool: KVPool) -> list[mx.array]:
    """The arrays of which a pool consists, for `mx.eval`."""
    arrays = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    return [array for array in arrays if array is not None]


def write_kv(pool: KVPool, k: mx.array, v: mx.array, slot_mapping: mx.array) -> KVPool:
    """Store the keys and values of new tokens in their blocks.

    The new pool takes over the memory of the old one, which must not be used again, as in
    `self.pool = write_kv(self.pool, ...)`. That holds also while steps that read other slots are in flight.

    Args:
        k, v: [T, Hk, D], cast to the pool's dtype, or rounded to integers of -127 to 127 times a scale for each head.
        slot_mapping: [T] int32, `block * block_size + offset` of each token, distinct; its values are not checked.
    Returns:
        The pool with the tokens written.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.write_kv(pool, k, v, slot_mapping)


def copy_kv(pool: KVPool, from_slots: list[int], to_slots: list[int]) -> KVPool:
    """The pool with what the slots `from_slots[i]` hold in the slots `to_slots[i]` too, all read before any is written.

    The new pool takes over the memory of the old one, as in `write_kv`.

    Raises:
        ValueError: the lists differ in length, or `to_slots` names a slot twice.
        IndexError: a slot is outside the pool.
    """
    return _ext.copy_kv(pool, from_slots, to_slots)


def paged_attention(
    q: mx.array,
    pool: KVPool,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Causal attention of a ragged batch: prefill chunks and decodes in one call, no padding, no masks.

    The step's own keys and values are in the pool already (`write_kv`). A row's result does not depend on the other
    rows.

    Args:
        q: [T, H, D], T = sum(query_lens), the rows one after the other; H is a multiple of Hk (grouped queries).
        scale: factor of the scores before softmax, usually D ** -0.5; not negative.
        window: a query sees only the newest `window` tokens, its own included; None: all. Table entries of blocks that
            no query of the row sees are not read either.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2, https://arxiv.org/abs/2408.00118).
        sinks: [H], a score more in each head's softmax, that of a value which is zero
            (gpt-oss, https://arxiv.org/abs/2508.10925).
    Returns:
        [T, H, D], the dtype of q.
    Raises:
        ValueError: shapes, dtypes or lengths don't fit.
    """
    return _ext.paged_attention(q, pool, batch, scale=scale, window=window, softcap=softcap, sinks=sinks)
