"""Stand-ins for the parts that a test is not about."""

import numpy as np

from mlx_server.engine.batch import Batch, BatchArrays, StepResult

FAKE_VOCAB_SIZE = 1000


def fake_next_token(token_ids: list[int], seed: int) -> int:
    """A language model that fits on a line: any change of any earlier token changes the next one."""
    state = seed
    for pos, token_id in enumerate(token_ids):
        state = (state * 31 + (pos + 1) * (token_id + 7)) % 1_000_003
    return state % FAKE_VOCAB_SIZE


class FakeRunner:
    """The runner's contract on the fake model, with a KV pool that holds each token's id and position.

    What it computes it reads back through block tables, as the real one does: a wrong table, slot, position or a block
    with two owners gives other tokens.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.slots = np.full((num_blocks * block_size, 2), -1)
        self.block_size = block_size
        self.fail_at: set[int] = set()
        self.num_steps = 0
        self._in_flight: tuple[Batch, list[int]] | None = None

    @property
    def in_flight(self) -> Batch | None:
        return self._in_flight[0] if self._in_flight else None

    def reset(self) -> None:
        self._in_flight = None
        self.slots[:] = -1

    def run(self, batch: Batch) -> StepResult | None:
        self.num_steps += 1
        previous, self._in_flight = self._in_flight, None
        if self.num_steps in self.fail_at:
            raise RuntimeError("the device is on fire")
        if batch.rows:
            self._in_flight = (batch, self._compute(batch, *(previous or (None, []))))
        return StepResult(*previous) if previous else None

    def _compute(self, batch: Batch, previous: Batch | None, previous_tokens: list[int]) -> list[int]:
        arrays = BatchArrays.build(batch, previous, self.block_size)
        fed = np.concatenate([arrays.token_ids, np.array(previous_tokens, np.int32)])[arrays.token_sources]
        self.slots[arrays.slot_mapping] = np.stack([fed, arrays.positions], axis=1)
        drawn = []
        sampled_row = 0
        for i, row in enumerate(batch.rows):
            positions = np.arange(arrays.context_lens[i])
            slots = arrays.block_tables[i][positions // self.block_size] * self.block_size + positions % self.block_size
            context = self.slots[slots]
            assert (context[:, 1] == positions).all()
            if row.samples:
                drawn.append(fake_next_token(context[:, 0].tolist(), int(arrays.seed[sampled_row])))
                sampled_row += 1
        return drawn
