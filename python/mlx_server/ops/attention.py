"""Attention over a paged KV cache.

After Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention". Letters:
T tokens of all rows, B rows, H heads, Hk key/value heads, D head size, N blocks of the pool.
"""

import mlx.core as mx

from mlx_server import _ext


def new_kv_pool(shape: tuple[int, int, int, int], dtype: mx.Dtype) -> mx.array:
    """A pool for keys or values, [N, block_size, Hk, D], with undefined contents.

    On the CPU, blocks that no token was ever written to take no memory.

    Raises:
        ValueError: a size is less than 1.
    """
    return _ext.new_kv_pool(shape, dtype)


def write_kv(
    k_pool: mx.array, v_pool: mx.array, k: mx.array, v: mx.array, slot_mapping: mx.array
) -> tuple[mx.array, mx.array]:
    """Store the keys and values of new tokens in their blocks.

    The new pools take over the memory of the old ones, which must not be used again, as in
    `self.k, self.v = write_kv(self.k, self.v, ...)`. That holds also while steps that read other slots are in flight.

    Args:
        k_pool, v_pool: [N, block_size, Hk, D].
        k, v: [T, Hk, D], cast to the pools' dtype.
        slot_mapping: [T] int32, `block * block_size + offset` of each token, distinct; its values are not checked.
    Returns:
        The pools with the tokens written.
    Raises:
        ValueError: shapes or dtypes don't fit.
    """
    return _ext.write_kv(k_pool, v_pool, k, v, slot_mapping)


def paged_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    *,
    block_tables: mx.array,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    window: int | None = None,
) -> mx.array:
    """Causal attention of a ragged batch: prefill chunks and decodes in one call, no padding, no masks.

    Row b's queries are the last `query_lens[b]` of its `context_lens[b]` tokens; the step's own keys and values are in
    the pools already (`write_kv`). A row's result does not depend on the other rows.

    Args:
        q: [T, H, D], T = sum(query_lens), the rows one after the other; H is a multiple of Hk (grouped queries).
        k_pool, v_pool: [N, block_size, Hk, D].
        block_tables: [B, M] int32, the blocks of each row in order. Entries behind the context are not read; the values
            of the others are not checked.
        query_lens, context_lens: B integers, 1 <= query_len <= context_len <= M * block_size.
        scale: factor of the scores before softmax, usually D ** -0.5.
        window: a query sees only the newest `window` tokens, its own included; None: all. Table entries of blocks that
            no query of the row sees are not read either.
    Returns:
        [T, H, D], the dtype of q.
    Raises:
        ValueError: shapes, dtypes or lengths don't fit.
    """
    return _ext.paged_attention(
        q,
        k_pool,
        v_pool,
        block_tables=block_tables,
        query_lens=query_lens,
        context_lens=context_lens,
        scale=scale,
        window=window,
    )
