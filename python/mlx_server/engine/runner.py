"""Batches on the device: the model, what it keeps of each request, and the sampler."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_server.engine.batch import Batch, BatchArrays, StepResult
from mlx_server.engine.memory import MemoryPlan
from mlx_server.engine.step_context import EngineStepContext, KVPools, RecurrentStates
from mlx_server.models.base import Model
from mlx_server.ops.sampling import sample


@dataclass(frozen=True, slots=True)
class _Step:
    batch: Batch
    token_ids: mx.array  # [R] uint32; R may be 0


class ModelRunner:
    """Runs one batch after the other; the newest may be in flight."""

    def __init__(self, model: Model, plan: MemoryPlan) -> None:
        self._model = model
        self._plan = plan
        self._in_flight: _Step | None = None
        self._allocate()

    @property
    def in_flight(self) -> Batch | None:
        return self._in_flight.batch if self._in_flight else None

    def run(self, batch: Batch) -> StepResult | None:
        previous = self._in_flight
        self._in_flight = self._launch(batch, previous) if batch.rows else None
        if previous is None:
            return None
        return StepResult(previous.batch, previous.token_ids.tolist())  # type: ignore[arg-type]

    def reset(self) -> None:
        self._in_flight = None
        self._allocate()

    def _allocate(self) -> None:
        self._pools = KVPools(self._model.kv_spec, self._plan.num_blocks, self._plan.block_size)
        self._states = RecurrentStates(self._model.state_spec, self._plan.max_running + self._plan.num_snapshots)

    def _launch(self, batch: Batch, previous: _Step | None) -> _Step:
        arrays = BatchArrays.build(batch, previous.batch if previous else None, self._plan.block_size)
        token_ids = mx.array(arrays.token_ids)  # [T]
        if previous is not None and arrays.awaits_previous:
            # An invalid token (its request fails when it is read back) must still be a row of the embedding.
            drawn = mx.minimum(previous.token_ids, self._model.vocab_size - 1).astype(mx.int32)
            token_ids = mx.concatenate([token_ids, drawn])[mx.array(arrays.token_sources)]
        self._states.copy(arrays.restored)
        hidden = self._model(token_ids, EngineStepContext(self._pools, self._states, arrays))  # [T, hidden]
        self._states.copy(arrays.saved)
        if arrays.sampled.size:
            drawn = self._sample(hidden, arrays)
        else:
            drawn = mx.zeros(0, mx.uint32)
        mx.async_eval(drawn, self._pools.arrays, self._states.conv, self._states.state)
        return _Step(batch, drawn)

    def _sample(self, hidden: mx.array, arrays: BatchArrays) -> mx.array:
        logits = self._model.logits(hidden[mx.array(arrays.sampled)])  # [R, V]
        return sample(
            logits,
            temperature=mx.array(arrays.temperature),
            top_k=mx.array(arrays.top_k),
            top_p=mx.array(arrays.top_p),
            min_p=mx.array(arrays.min_p),
            seed=mx.array(arrays.seed),
            position=mx.array(arrays.sample_positions),
        )  # [R]
