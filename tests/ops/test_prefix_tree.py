"""The binding of `PrefixTree`; its behaviour is tested in tests/cpp/test_prefix_tree.cpp."""

import pytest

from mlx_server.ops.block_pool import BlockPool
from mlx_server.ops.prefix_tree import PrefixTree


def test_finds_what_was_inserted_until_it_is_evicted() -> None:
    pool = BlockPool(4)
    tree = PrefixTree(pool, 2)
    blocks = pool.allocate(3)
    assert blocks == [0, 1, 2]
    assert tree.insert("salt", None, [1, 2], 0) == 0
    assert tree.insert("salt", 0, [3, 4], 1) == 1
    assert tree.insert("salt", 0, [3, 4], 2) == 1
    assert tree.insert("salt", 2, [3, 4], 2) is None
    assert tree.match("salt", None, [1, 2, 3, 4, 5]) == [0, 1]
    assert tree.match("salt", 0, [3, 4]) == [1]
    assert tree.match_part("salt", 0, [3, 9]) == (1, 1, False)
    assert tree.match_part("salt", 0, [9]) is None
    assert tree.match("", None, [1, 2]) == []
    pool.release([2, 1, 0])
    assert (pool.num_free, pool.num_idle, tree.num_blocks) == (2, 2, 2)
    assert (pool.is_cached(1), pool.is_cached(2)) == (True, False)
    assert tree.evict(1) == [1]
    assert tree.remove(0) == [0]
    tree.clear()
    tree.check_integrity()
    assert pool.num_free == 4


def test_errors_are_the_types_that_python_knows() -> None:
    pool = BlockPool(2)
    tree = PrefixTree(pool, 2)
    with pytest.raises(ValueError, match=r"\[PrefixTree\] block_size must be >= 1 but got 0"):
        PrefixTree(pool, 0)
    with pytest.raises(ValueError, match=r"insert must get 1 to 2 tokens but got 3"):
        tree.insert("", None, [1, 2, 3], 0)
    with pytest.raises(ValueError, match="block 0, which is not held"):
        tree.insert("", None, [1, 2], 0)
    with pytest.raises(IndexError, match=r"must be in \[0, 2\) but got 2"):
        tree.match("", 2, [1, 2])


def test_the_pool_lives_as_long_as_its_tree() -> None:
    tree = PrefixTree(BlockPool(2), 2)
    assert tree.match("", None, [1, 2]) == []
