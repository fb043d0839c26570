"""Which request owns which blocks of the KV pool and which slot of recurrent states, and what of it others may use.
The arrays are the runner's."""

from typing import NamedTuple

from mlx_server.engine.request import BlockCopy, Request
from mlx_server.engine.state_snapshots import StateSnapshots
from mlx_server.ops.block_pool import BlockPool
from mlx_server.ops.prefix_tree import PrefixTree

MATCH_BLOCKS = 64  # looked up at a time, so that a prompt is read only as far as it is known


class StepCopies(NamedTuple):
    """What a step copies for a request, beside computing its tokens."""

    kv: BlockCopy | None
    restore_from: int | None  # the slot from which its recurrent states are restored first
    keep_to: int | None  # then that to which they are copied before the step
    save_to: int | None  # and that to which they are copied after it


class KVCacheManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` tokens, and one slot for each running request.

    Who owns what, for a request about to compute the positions [c, e), its attention looking back `window` tokens:

    | table entries of positions | owner | in the prefix tree |
    |---|---|---|
    | [0, c - window + 1) in whole blocks, less the last published one | anybody: the entries are stale | maybe |
    | the rest of the `num_published_blocks` | the request, and all others that share it | yes, or left it early |
    | the rest, up to ceil(e / block_size) blocks | the request, alone | the first one, as a tail, maybe |

    A block is published, for others to use, as soon as its tokens are known on the host and the step that writes its KV
    is about to be launched: steps run in order, and in a step each layer writes before it reads, so that even requests
    of one step share. Positions that are published are not written again.

    The end of a prompt or of an answer rarely fills its block. Such a tail is published too, when the prompt is
    computed and when the request leaves. A request whose next tokens are the first ones of a block, a tail or a full
    one, goes on in that block itself if nobody owns it and it holds nothing else, or else in a copy of that part, whose
    source it owns until the step that copies is launched. Recurrent states are of ends of blocks alone, so models that
    have them share full blocks only.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        *,
        window: int | None = None,
        num_snapshots: int | None = None,
    ) -> None:
        """`window`: no layer looks back further than so many tokens; None: some layer sees all. `num_snapshots`: how
        many slots beyond the running requests' keep recurrent states of the past; None: there are no such states."""
        self.block_size = block_size
        self._min_copied = max(block_size // 4, 1)  # tokens: a copy is an op more in each layer
        self._window = window
        self._pool = BlockPool(num_blocks)
        self._tree = PrefixTree(self._pool, block_size)
        self._free_slots = list(range(num_slots))
        self._num_slots = num_slots
        self._snapshots = None if num_snapshots is None else StateSnapshots(num_slots, num_snapshots, block_size)
        self._running: list[Request] = []  # have a slot

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had: nobody's, though they may be cached."""
        return self._pool.num_free + self._pool.num_idle

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def max_request_tokens(self, max_batch_tokens: int) -> int | None:
        """How long a request may become that has the whole pool for itself; None: as long as it likes."""
        capacity = self._pool.num_blocks * self.block_size
        if self._window is None or self._window + max_batch_tokens + 2 * self.block_size > capacity:
            return capacity
        return None

    def next_chunk(self, request: Request, max_tokens: int) -> int:
        """How many tokens, at most `max_tokens`, the request should compute next, once it has skipped those whose KV is
        already there. 0: it is not running, and should wait for what another request is computing."""
        if request.is_decoding:
            num_tokens = request.num_uncomputed_tokens
            return num_tokens if request.num_redone_tokens else min(num_tokens, max_tokens)
        self._settle(request)
        self._skip_cached(request)
        num_tokens = min(request.num_uncomputed_tokens, max_tokens)
        if self._snapshots is None:
            return num_tokens
        is_new = request.slot is None and not request.scores_prompt
        if is_new and any(self._snapshots.awaits(request, other) for other in self._running):
            self.free(request)
            return 0
        save_pos = self._snapshots.next_pos(request)
        return num_tokens if save_pos is None else min(num_tokens, save_pos - request.num_computed_tokens)

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Let the request compute `num_tokens` more; False if blocks or slots are short: one that runs is then as
        before, another one has nothing. A copy that it could begin with is given up for want of blocks.

        What its attention does not look back to any more is released first.
        """
        self._release_behind_window(request)
        end_pos = request.num_computed_tokens + num_tokens
        num_new = max(-(-end_pos // self.block_size) - len(request.block_table), 0)
        if num_new > self.num_free_blocks and request.copy is not None:
            self._drop_copy(request)  # its source may be the block that is missing
            return self.allocate(request, num_tokens)
        if num_new > self.num_free_blocks or (request.slot is None and not self._free_slots):
            if request.slot is None:
                self.free(request)
            return False
        self._drop_snapshots(self._tree.evict(max(num_new - self._pool.num_free, 0)))
        blocks = self._pool.allocate(num_new)
        assert blocks is not None
        request.block_table += blocks
        if request.slot is None:
            request.slot = self._free_slots.pop()
            self._running.append(request)
        return True

    def launch(self, request: Request, end_pos: int, num_drafts: int = 0) -> StepCopies:
        """The step in the works computes the request's positions before `end_pos`, so others may use them, and those
        of drafts behind them, which nobody may use before `judge`."""
        self._settle(request)
        self._publish(request, end_pos)
        if end_pos == len(request.prompt_token_ids):
            self._publish_tail(request, end_pos)
        copy, request.copy = request.copy, None
        request.copied_block = copy.source if copy else None
        restore_from, request.restore_from = request.restore_from, None
        keep_to = save_to = None
        if self._snapshots is not None:
            self._snapshots.let_go(request)
            if num_drafts:
                keep_to = self._snapshots.keep(request)
            else:
                save_to = self._snapshots.reserve(request, end_pos)
        request.num_computed_tokens = end_pos
        request.num_redone_tokens = 0
        return StepCopies(copy, restore_from, keep_to, save_to)

    def max_drafts(self, request: Request) -> int | None:
        """How many drafts the request's next step may have; None: any number."""
        return None if self._snapshots is None else self._snapshots.max_drafts(request)

    def judge(self, request: Request, start_pos: int, num_drafts: int, num_right: int) -> None:
        """The first `num_right` drafts of the step that began at `start_pos` were right. What follows them is computed
        anew over it; a recurrent state has taken in the wrong ones, so it goes back to `start_pos`."""
        request.num_computed_tokens += num_right
        if request.kept_slot is None or self._snapshots is None:
            return
        if num_right == num_drafts:
            self._snapshots.let_go(request)
            return
        request.restore_from = request.kept_slot
        request.num_redone_tokens = request.num_computed_tokens - start_pos
        request.num_computed_tokens = start_pos

    def free(self, request: Request) -> None:
        """Take all blocks and the slot back; the request's tokens must be computed or found again to go on."""
        self._settle(request)
        self._drop_copy(request)
        self._publish_tail(request, request.num_computed_tokens)
        self._release(request)

    def discard(self, request: Request) -> None:
        """Free a request whose KV and states may hold values that are no numbers: nobody may use them, nor anything
        that begins with the same block."""
        first_blocks = self._tree.match(request.cache_salt, None, request.known_tokens(0, self.block_size))
        if not request.num_freed_blocks:
            first_blocks += request.block_table[:1]  # which may be a tail
        for block in first_blocks:
            self._drop_snapshots(self._tree.remove(block))
        if self._snapshots is not None:
            self._snapshots.settle(request, None)
        self._release_copied(request)
        self._release(request)

    def clear(self) -> None:
        """All KV and states are lost. No request may be running."""
        assert not self._running
        self._tree.clear()
        if self._snapshots is not None:
            self._snapshots.clear()

    def check_integrity(self, *, thorough: bool = True) -> None:
        """`thorough`: also that each cached block can be found, which takes a millisecond for every thousand."""
        self._pool.check_integrity()
        if thorough:
            self._tree.check_integrity()
        assert len(set(self._free_slots)) == len(self._free_slots) == self._num_slots - len(self._running)
        if self._snapshots is not None:
            pending = [request.pending_snapshot for request in self._running]
            kept = [request.kept_slot for request in self._running if request.kept_slot is not None]
            self._snapshots.check_integrity([*kept, *(snapshot.slot for snapshot in pending if snapshot)])

    def check_all_free(self) -> None:
        """No request owns anything."""
        assert self.num_free_blocks == self._pool.num_blocks
        assert len(self._free_slots) == self._num_slots

    def _settle(self, request: Request) -> None:
        """Publish what the steps launched so far have computed."""
        self._release_copied(request)
        self._publish(request, request.num_computed_tokens)
        if request.pending_snapshot is not None and self._snapshots is not None:
            index = request.pending_snapshot.index
            published = index < request.num_published_blocks and self._pool.is_cached(request.block_table[index])
            self._snapshots.settle(request, request.block_table[index] if published else None)

    def _release(self, request: Request) -> None:
        # The first are evicted last.
        self._pool.release(request.block_table[request.num_freed_blocks :][::-1], request.client)
        request.block_table = []
        request.num_freed_blocks = 0
        request.num_published_blocks = 0
        request.num_computed_tokens = 0
        request.saved_pos = 0
        request.num_redone_tokens = 0
        request.restore_from = request.answer_snapshot = None
        if self._snapshots is not None:
            self._snapshots.let_go(request)
        if request.slot is not None:
            self._free_slots.append(request.slot)
            self._running.remove(request)
            request.slot = None

    def _publish(self, request: Request, end_pos: int) -> None:
        """Let others find the full blocks before `end_pos`."""
        table, size = request.block_table, self.block_size
        for i in range(request.num_published_blocks, min(end_pos, request.num_known_tokens) // size):
            token_ids = request.known_tokens(i * size, (i + 1) * size)
            block = self._tree.insert(request.cache_salt, table[i - 1] if i else None, token_ids, table[i])
            if block is not None and block != table[i]:
                if (i + 1) * size > request.num_computed_tokens:
                    return  # the coming step writes ours, and must not write to the other
                self._replace(request, i, [block])
            request.num_published_blocks = i + 1

    def _publish_tail(self, request: Request, end_pos: int) -> None:
        """Let others find what lies before `end_pos` behind the last full block."""
        first = request.num_published_blocks
        token_ids = request.known_tokens(first * self.block_size, end_pos)
        if self._snapshots is None and 0 < len(token_ids) < self.block_size:
            after = request.block_table[first - 1] if first else None
            self._tree.insert(request.cache_salt, after, token_ids, request.block_table[first])

    def _skip_cached(self, request: Request) -> None:
        """Go on from the end of what others have published. At least one token is left to compute."""
        if request.needs_every_state:
            return
        if self._snapshots is not None and request.slot is not None:
            return  # states are restored when a request starts
        first = request.num_published_blocks
        path = self._match(request, first, (request.num_tokens - 1) // self.block_size)
        num_usable = len(path)
        if self._snapshots is not None:
            num_usable = self._snapshots.num_usable(path)
            request.shared_pos = (first + len(path)) * self.block_size
        end_pos = (first + num_usable) * self.block_size
        if end_pos > request.num_computed_tokens:
            if self._snapshots is not None:
                request.restore_from = self._snapshots.use(path[num_usable - 1], request.client)
                request.saved_pos = end_pos
            self._replace(request, first, path[:num_usable])
            request.num_published_blocks = first + num_usable
            request.num_computed_tokens = end_pos
        if self._snapshots is None:
            self._skip_part(request)

    def _skip_part(self, request: Request) -> None:
        """Go on from the middle of a block of others that begins as the request's next one does."""
        first = request.num_published_blocks
        start_pos = first * self.block_size
        token_ids = request.known_tokens(start_pos, min(start_pos + self.block_size, request.num_tokens - 1))
        after = request.block_table[first - 1] if first else None
        part = self._tree.match_part(request.cache_salt, after, token_ids)
        if part is None:
            return
        block, num_tokens, is_whole = part
        num_gained = start_pos + num_tokens - request.num_computed_tokens
        if num_gained <= 0:
            return
        if is_whole and not self._pool.ref_count(block):
            self._replace(request, first, [block])
        elif num_gained >= self._min_copied:
            self._pool.retain([block])
            request.copy = BlockCopy(block, first, num_tokens, request.num_computed_tokens)
        else:
            return
        request.num_computed_tokens = start_pos + num_tokens

    def _release_copied(self, request: Request) -> None:
        """The step that copies is launched: whoever gets the source next writes later."""
        if request.copied_block is not None:
            self._pool.release([request.copied_block], request.client)
            request.copied_block = None

    def _drop_copy(self, request: Request) -> None:
        """What was to be copied is not."""
        if request.copy is not None:
            self._pool.release([request.copy.source], request.client)
            request.num_computed_tokens = request.copy.resumes_from
            request.copy = None

    def _match(self, request: Request, first: int, end: int) -> list[int]:
        """Blocks of others that hold the request's blocks [first, end), as many in a row as there are."""
        after = request.block_table[first - 1] if first else None
        path: list[int] = []
        while first < end:
            stop = min(first + MATCH_BLOCKS, end)
            token_ids = request.known_tokens(first * self.block_size, stop * self.block_size)
            found = self._tree.match(request.cache_salt, after, token_ids)
            path += found
            if len(found) < stop - first:
                break
            first, after = stop, found[-1]
        return path

    def _replace(self, request: Request, index: int, blocks: list[int]) -> None:
        """Own these blocks of the tree from `index` of the table on, instead of those that are there."""
        self._pool.retain(blocks)
        self._pool.release(request.block_table[index : index + len(blocks)], request.client)
        request.block_table[index : index + len(blocks)] = blocks

    def _release_behind_window(self, request: Request) -> None:
        if self._window is None:
            return
        num_behind = max(request.num_computed_tokens - self._window + 1, 0) // self.block_size
        # The last published block stays: what follows is published as its child.
        num_freed = min(num_behind, max(request.num_published_blocks - 1, 0))
        self._pool.release(request.block_table[request.num_freed_blocks : num_freed], request.client)
        request.num_freed_blocks = max(num_freed, request.num_freed_blocks)

    def _drop_snapshots(self, blocks: list[int]) -> None:
        if self._snapshots is not None:
            self._snapshots.drop(blocks)
