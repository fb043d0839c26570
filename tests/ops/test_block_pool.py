"""The binding of `BlockPool`; its behaviour is tested in tests/cpp/block_pool_test.cpp."""

import pytest

from mlx_server.ops.block_pool import BlockPool


def test_counts_owners_and_frees_at_zero() -> None:
    pool = BlockPool(3)
    ids = pool.allocate(2)
    assert ids == [0, 1]
    assert pool.allocate(2) is None
    pool.retain(ids)
    pool.release(ids)
    assert (pool.num_free, pool.num_blocks, pool.ref_count(0)) == (1, 3, 1)
    pool.release(ids)
    assert (pool.num_free, pool.ref_count(0)) == (3, 0)
    pool.check_integrity()


def test_errors_are_the_types_that_python_knows() -> None:
    pool = BlockPool(3)
    with pytest.raises(ValueError, match=r"\[BlockPool\] num_blocks must be >= 0 but got -1"):
        BlockPool(-1)
    with pytest.raises(ValueError, match=r"n must be >= 0 but got -2"):
        pool.allocate(-2)
    with pytest.raises(IndexError, match=r"must be in \[0, 3\) but got 3"):
        pool.release([3])
    with pytest.raises(ValueError, match="block 1, which is free"):
        pool.retain([1])
    with pytest.raises(IndexError):
        pool.ref_count(-1)
    assert pool.num_free == 3
