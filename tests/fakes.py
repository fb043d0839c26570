"""Stand-ins for the parts that a test is not about."""

from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from mlx_server.engine.batch import Batch, BatchArrays, SlotCopies, StepResult
from mlx_server.ops.sampling import INVALID_TOKEN

FAKE_VOCAB_SIZE = 1000


def fake_state(token_ids: list[int], start_pos: int = 0, state: int = 0) -> int:
    """The recurrence of a language model that fits on a line."""
    for pos, token_id in enumerate(token_ids, start_pos):
        state = (state * 31 + (pos + 1) * (token_id + 7)) % 1_000_003
    return state


def fake_next_token(token_ids: list[int], seed: int, window: int | None = None, *, recurrent: bool = False) -> int:
    """Any change of any earlier token in the attention's window changes the next one; of a recurrent model, any change
    of any earlier token."""
    start_pos = 0 if window is None else max(len(token_ids) - window, 0)
    seen = fake_state(token_ids[start_pos:], start_pos)
    return ((fake_state(token_ids) if recurrent else 0) + seed + 7 * seen) % FAKE_VOCAB_SIZE


class FakeRunner:
    """The runner's contract on the fake model: a KV pool that holds each token's id and position, and recurrent states.

    What it computes it reads back through block tables and slots, as the real one does: a wrong table, slot, position
    or a block with two owners gives other tokens.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_slots: int, window: int | None = None, *, recurrent: bool = False
    ) -> None:
        self.pool = np.full((num_blocks * block_size, 2), -1)
        self.states = [-1] * num_slots
        self.recurrent = recurrent
        self.block_size = block_size
        self.window = window
        self.fail_at: set[int] = set()  # steps that fail
        self.poison: set[str] = set()  # requests that let each step fail that they take part in
        self.fails_when_read = (
            False  # as on a GPU: such a step fails when it is read, and the next one is launched then
        )
        self.invalid: set[str] = set()  # requests for which no token can be drawn
        self.num_steps = 0
        self._in_flight: tuple[Batch, list[list[int]]] | None = None

    @property
    def in_flight(self) -> Batch | None:
        return self._in_flight[0] if self._in_flight else None

    def reset(self) -> None:
        self._in_flight = None
        self.pool[:] = -1
        self.states = [-1] * len(self.states)

    def run(self, batch: Batch) -> StepResult | None:
        self.num_steps += 1
        previous, self._in_flight = self._in_flight, None
        if not self.fails_when_read and (self.num_steps in self.fail_at or self._is_poisoned(batch)):
            raise RuntimeError("the device is on fire")
        if batch.rows:
            self._in_flight = (batch, self._compute(batch, *(previous or (None, []))))
        if previous is None:
            return None
        if self.fails_when_read and (self.num_steps in self.fail_at or self._is_poisoned(previous[0])):
            raise RuntimeError("the device is on fire")
        done, token_ids = previous
        return StepResult(done, token_ids, [None] * len(token_ids), [[] for _ in done.rows])

    def _is_poisoned(self, batch: Batch) -> bool:
        return bool(self.poison & {row.request.request_id for row in batch.rows})

    def _compute(self, batch: Batch, previous: Batch | None, previous_tokens: list[list[int]]) -> list[list[int]]:
        arrays = BatchArrays.build(batch, previous, self.block_size)
        previous_ids = np.minimum(np.array(list(chain(*previous_tokens)), np.int64), FAKE_VOCAB_SIZE - 1)
        fed = np.concatenate([arrays.token_ids, previous_ids])[arrays.token_sources]
        self.pool[arrays.slot_mapping] = np.stack([fed, arrays.positions], axis=1)
        self.pool[arrays.copied.targets] = self.pool[arrays.copied.sources]
        self._copy_states(arrays.restored)
        self._copy_states(arrays.kept)
        starts = np.cumsum(arrays.query_lens) - arrays.query_lens
        seeds = arrays.sampling.rows["seed"].tolist()
        drawn: list[int] = []
        for i, row in enumerate(batch.rows):
            state = 0 if arrays.fresh[i] else self.states[arrays.slots[i]]
            for index in range(starts[i], starts[i] + row.num_tokens):
                position = int(arrays.positions[index])
                state = fake_state([int(fed[index])], position, state)
                if index in arrays.sampled:
                    token_id = self._next_token(arrays.block_tables[i], position + 1, state, seeds[len(drawn)])
                    drawn.append(INVALID_TOKEN if row.request.request_id in self.invalid else token_id)
            self.states[arrays.slots[i]] = state
        self._copy_states(arrays.saved)
        tokens = iter(drawn)
        return [list(islice(tokens, row.num_draws)) for row in batch.sampling_rows]

    def _copy_states(self, slots: SlotCopies) -> None:
        for target, state in zip(slots.targets, [self.states[slot] for slot in slots.sources], strict=True):
            self.states[target] = state

    def _next_token(self, block_table: npt.NDArray[np.int32], end_pos: int, state: int, seed: int) -> int:
        """`fake_next_token` of what the pool holds before end_pos, and of a state."""
        start_pos = 0 if self.window is None else max(end_pos - self.window, 0)
        positions = np.arange(start_pos, end_pos)
        blocks = block_table[positions // self.block_size]
        seen = self.pool[blocks * self.block_size + positions % self.block_size]
        assert (seen[:, 1] == positions).all()
        recurrent = state if self.recurrent else 0
        return int((recurrent + seed + 7 * fake_state(seen[:, 0].tolist(), start_pos)) % FAKE_VOCAB_SIZE)
