"""Recurrent states of the past, kept so that a request can go on from a prefix that another one has computed.

KV of a prefix is the KV of its tokens; a recurrent state is the state after one certain token. So a model with
recurrent layers can go on only from where a state was saved: at ends of blocks, chosen so that they are of use.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass

from mlx_server.engine.request import PendingSnapshot, Request

MIN_GAIN_BLOCKS = 4  # a state must save more than that: steps end where states are saved, and a step has its price
PROMPT_INTERVAL = 2048  # tokens of a long prompt between states: where another prompt may part from it
ANSWER_INTERVAL = 64  # tokens of an answer between states, of which the newest is kept: the next turn goes on from it


@dataclass(frozen=True, slots=True)
class _Snapshot:
    slot: int
    client: str  # that used it last


class StateSnapshots:
    """The slots [first_slot, first_slot + num_slots), each free or the state after one block of the prefix tree.

    When they run out, the client with the most gives up the one that it used longest ago. A state that a step reads may
    be overwritten by the same step at the earliest, and steps read before they write.
    """

    def __init__(self, first_slot: int, num_slots: int, block_size: int) -> None:
        self._slots = range(first_slot, first_slot + num_slots)
        self._block_size = block_size
        self._min_gain = MIN_GAIN_BLOCKS * block_size
        self._answer_interval = max(ANSWER_INTERVAL // block_size, 1) * block_size
        self._free = list(self._slots)
        self._by_block: OrderedDict[int, _Snapshot] = OrderedDict()  # used longest ago first

    def num_usable(self, path: list[int]) -> int:
        """How many of the first blocks of a path end where a state is kept."""
        return next((n for n in range(len(path), 0, -1) if path[n - 1] in self._by_block), 0)

    def use(self, block: int, client: str) -> int:
        """The slot of the state after `block`, which there is."""
        slot = self._by_block.pop(block).slot
        self._by_block[block] = _Snapshot(slot, client)
        return slot

    def next_pos(self, request: Request) -> int | None:
        """Where, while its prompt is computed, the request's state should be saved next: at the end of what it shares
        with another, then so that the same prompt, or one that goes on from it, finds it; if that saves enough."""
        if not self._slots:
            return None
        start_pos = max(request.num_computed_tokens, request.saved_pos + self._min_gain - 1)
        last_pos = (len(request.prompt_token_ids) - 1) // self._block_size * self._block_size
        interval = max(PROMPT_INTERVAL // self._block_size, 1) * self._block_size
        regular_pos = (start_pos // interval + 1) * interval
        positions = [request.shared_pos, last_pos, min(regular_pos, last_pos)]
        return min((pos for pos in positions if pos > start_pos), default=None)

    def reserve(self, request: Request, end_pos: int) -> int | None:
        """The slot that is to hold the request's state after the positions before `end_pos`, if it should be saved."""
        in_answer = end_pos > len(request.prompt_token_ids) and end_pos % self._answer_interval == 0
        if not (in_answer or end_pos == self.next_pos(request)) or not (self._free or self._by_block):
            return None
        slot = self._take()
        request.pending_snapshot = PendingSnapshot(slot, end_pos // self._block_size - 1)
        request.saved_pos = end_pos
        return slot

    def max_drafts(self, request: Request) -> int:
        """How many drafts the request may have, so that a step that saves its state is never one with drafts."""
        if not (self._free or self._by_block):
            return 0
        interval = self._answer_interval
        return max((interval - request.num_tokens) % interval - 1, 0)

    def keep(self, request: Request) -> int:
        """The slot that is to hold the request's state while its drafts are computed."""
        request.kept_slot = self._take()
        return request.kept_slot

    def let_go(self, request: Request) -> None:
        """The state before the request's drafts is not wanted any more, after the coming step at the latest."""
        if request.kept_slot is not None:
            self._free.append(request.kept_slot)
            request.kept_slot = None

    def settle(self, request: Request, block: int | None) -> None:
        """The state that the request's last step has saved, if it has, is the one after `block`, for others to find;
        None: nobody can."""
        pending, request.pending_snapshot = request.pending_snapshot, None
        if pending is None:
            return
        if block is None or block in self._by_block:
            self._free.append(pending.slot)
            return
        if (pending.index + 1) * self._block_size > len(request.prompt_token_ids):
            if request.answer_snapshot is not None:
                self.drop([request.answer_snapshot])
            request.answer_snapshot = block
        self._by_block[block] = _Snapshot(pending.slot, request.client)

    def awaits(self, request: Request, other: Request) -> bool:
        """Whether `other` is about to save a state that the request could go on from."""
        positions = [self.next_pos(other)] if not other.is_decoding else []
        if other.pending_snapshot is not None:
            positions.append((other.pending_snapshot.index + 1) * self._block_size)
        return request.cache_salt == other.cache_salt and any(
            pos is not None
            and request.num_computed_tokens + self._min_gain <= pos < request.num_tokens
            and request.known_tokens(0, pos) == other.known_tokens(0, pos)
            for pos in positions
        )

    def drop(self, blocks: list[int]) -> None:
        """These blocks have left the tree, or their states are not wanted any more."""
        for block in blocks:
            snapshot = self._by_block.pop(block, None)
            if snapshot is not None:
                self._free.append(snapshot.slot)

    def clear(self) -> None:
        """All states are lost; none is being saved."""
        self._by_block.clear()
        self._free = list(self._slots)

    def _take(self) -> int:
        if not self._free:
            self._make_room()
        return self._free.pop()

    def check_integrity(self, pending: list[int]) -> None:
        """`pending`: slots of states that are being saved, or kept during drafts."""
        kept = [snapshot.slot for snapshot in self._by_block.values()]
        assert sorted([*self._free, *kept, *pending]) == list(self._slots)

    def _make_room(self) -> None:
        [(greatest, _)] = Counter(snapshot.client for snapshot in self._by_block.values()).most_common(1)
        self.drop([next(block for block, snapshot in self._by_block.items() if snapshot.client == greatest)])
