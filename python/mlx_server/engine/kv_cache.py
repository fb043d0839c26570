"""Which request owns which blocks of the KV pool and which slot of recurrent states. The arrays are the runner's."""

from mlx_server.engine.request import Request
from mlx_server.ops.block_pool import BlockPool


class KVCacheManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` tokens, and one slot for each running request.

    Who owns what, for a request about to compute the positions [c, e), its attention looking back `window` tokens:

    | table entries of positions | owner |
    |---|---|
    | [0, c - window + 1) in whole blocks | anybody: freed, the entries are stale |
    | the rest, up to ceil(e / block_size) blocks | the request, alone |
    """

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, *, window: int | None = None) -> None:
        """`window`: no layer looks back further than so many tokens; None: some layer sees all."""
        self.block_size = block_size
        self._window = window
        self._pool = BlockPool(num_blocks)
        self._free_slots = list(range(num_slots))
        self._num_slots = num_slots

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def max_request_tokens(self, max_batch_tokens: int) -> int | None:
        """How long a request may become that has the whole pool for itself; None: as long as it likes."""
        capacity = self._pool.num_blocks * self.block_size
        if self._window is None or self._window + max_batch_tokens + 2 * self.block_size > capacity:
            return capacity
        return None

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Let the request compute up to `num_tokens` in all; False, and nothing changed, if blocks or slots are short.

        What its attention does not look back to any more is freed first.
        """
        self._free_behind_window(request)
        num_new = -(-num_tokens // self.block_size) - len(request.block_table)
        if request.slot is None and not self._free_slots:
            return False
        blocks = self._pool.allocate(max(num_new, 0))
        if blocks is None:
            return False
        request.block_table += blocks
        if request.slot is None:
            request.slot = self._free_slots.pop()
        return True

    def free(self, request: Request) -> None:
        """Take all blocks and the slot back; the request's tokens must be computed again to go on."""
        self._pool.release(request.block_table[request.num_freed_blocks :])
        request.block_table = []
        request.num_freed_blocks = 0
        request.num_computed_tokens = 0
        if request.slot is not None:
            self._free_slots.append(request.slot)
            request.slot = None

    def check_integrity(self) -> None:
        self._pool.check_integrity()
        assert len(set(self._free_slots)) == len(self._free_slots) <= self._num_slots

    def check_all_free(self) -> None:
        self.check_integrity()
        assert self._pool.num_free == self._pool.num_blocks
        assert len(self._free_slots) == self._num_slots

    def _free_behind_window(self, request: Request) -> None:
        if self._window is None:
            return
        num_blocks = max(request.num_computed_tokens - self._window + 1, 0) // self.block_size
        self._pool.release(request.block_table[request.num_freed_blocks : num_blocks])
        request.num_freed_blocks = max(num_blocks, request.num_freed_blocks)
