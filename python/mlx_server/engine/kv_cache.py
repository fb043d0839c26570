"""Which request owns which blocks of the KV pool. The arrays themselves are the runner's."""

from mlx_server.engine.request import Request
from mlx_server.ops.block_pool import BlockPool


class KVCacheManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` tokens.

    A request that has `n` computed tokens owns the ceil(n / block_size) blocks of its `block_table`, alone.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def capacity_tokens(self) -> int:
        return self._pool.num_blocks * self.block_size

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Make the request's table long enough for `num_tokens`; False, and nothing changed, if the pool is short."""
        num_new = -(-num_tokens // self.block_size) - len(request.block_table)
        blocks = self._pool.allocate(max(num_new, 0))
        if blocks is None:
            return False
        request.block_table += blocks
        return True

    def free(self, request: Request) -> None:
        """Give all blocks back; the request's tokens must be computed again to go on."""
        self._pool.release(request.block_table)
        request.block_table = []
        request.num_computed_tokens = 0

    def check_integrity(self) -> None:
        self._pool.check_integrity()
