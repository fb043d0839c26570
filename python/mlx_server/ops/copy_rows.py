"""Copies inside an array that outlives steps, such as the slots of recurrent states."""

import mlx.core as mx

from mlx_server import _ext


def copy_rows(pool: mx.array, from_rows: list[int], to_rows: list[int]) -> mx.array:
    """`pool` [N, ...] with `pool[to_rows[i]] = pool[from_rows[i]]`, all read before any is written.

    The result takes over the pool's memory, which must not be used again except through it.

    Raises:
        ValueError: the lists differ in length, or `to_rows` names a row twice.
        IndexError: a row is outside the pool.
    """
    return _ext.copy_rows(pool, from_rows, to_rows)
