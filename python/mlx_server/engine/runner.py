"""Batches on the device: the model, what it keeps of each request, and the sampler."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_server.engine.batch import Batch, BatchArrays, StepResult
from mlx_server.engine.grammar import Grammars, constrain
from mlx_server.engine.memory import MemoryPlan
from mlx_server.engine.pooling import pooled_range
from mlx_server.engine.request import Request
from mlx_server.engine.step_context import EngineStepContext, KVPools, RecurrentStates
from mlx_server.models.base import Model
from mlx_server.ops.sampling import Sampled, SampleTables, make_rows, sample
from mlx_server.wire import TokenLogprobs

# Prompt tokens scored at once: a step's logits of all of them may be larger than the model.
_SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Step:
    batch: Batch
    num_scored: list[int]  # B
    sampled: Sampled | None  # of R draws; None if R is 0
    scores: Sampled | None  # of P prompt tokens; None if P is 0
    pooled: dict[Request, mx.array]  # [hidden] float32

    def result(self) -> StepResult:
        """Waits for the device."""
        rows = self.batch.sampling_rows
        wanted = [row.request.sampling.logprobs for row in rows for _ in range(row.num_draws)]
        wanted_scores = [
            row.request.num_prompt_logprobs
            for row, count in zip(self.batch.rows, self.num_scored, strict=True)
            for _ in range(count)
        ]
        scores = iter(_logprobs(self.scores, wanted_scores))
        token_ids: Iterator[int] = iter(self.sampled.token_ids.tolist() if self.sampled else [])  # type: ignore[arg-type]
        logprobs = iter(_logprobs(self.sampled, wanted))
        return StepResult(
            self.batch,
            [list(islice(token_ids, row.num_draws)) for row in rows],
            [[entry for entry in islice(logprobs, row.num_draws) if entry] or None for row in rows],
            [[score for score in islice(scores, count) if score] for count in self.num_scored],
            {request: np.array(states) for request, states in self.pooled.items()},
        )


class ModelRunner:
    """Runs one batch after the other; the newest may be in flight."""

    def __init__(self, model: Model, plan: MemoryPlan, grammars: Grammars | None = None) -> None:
        """Without `grammars` no request may have one."""
        self._model = model
        self._plan = plan
        self._grammars = grammars
        self._in_flight: _Step | None = None
        self._allocate()

    @property
    def in_flight(self) -> Batch | None:
        return self._in_flight.batch if self._in_flight else None

    def run(self, batch: Batch) -> StepResult | None:
        previous, result = self._in_flight, None
        if batch.rows:
            self._in_flight, result = self._launch(batch, previous)
        else:
            self._in_flight = None
        return result or (previous.result() if previous else None)

    def reset(self) -> None:
        self._in_flight = None
        del self._pools, self._states  # before new ones are made: memory may be what failed
        mx.clear_cache()
        self._allocate()

    def _allocate(self) -> None:
        self._pools = KVPools(self._model.kv_spec, self._plan.num_blocks, self._plan.block_size, self._plan.kv_bits)
        self._states = RecurrentStates(self._model.state_spec, self._plan.max_running + self._plan.num_snapshots)

    def _launch(self, batch: Batch, previous: _Step | None) -> tuple[_Step, StepResult | None]:
        """The new step, and what the one before has given, if that was needed."""
        arrays = BatchArrays.build(batch, previous.batch if previous else None, self._plan.block_size)
        drawn = mx.zeros(0, mx.int32)
        if previous is not None and previous.sampled is not None and arrays.awaits_previous:
            # An invalid token (its request fails when it is read back) must still be a row of the embedding.
            drawn = mx.minimum(previous.sampled.token_ids, self._model.vocab_size - 1).astype(mx.int32)
        hidden = self._forward(arrays, drawn)  # [T, hidden]
        result, masks = None, None
        if self._grammars is not None and any(row.request.grammar for row in batch.sampling_rows):
            # The device computes the model while the host reads the tokens before and says which ones may follow.
            mx.async_eval(hidden, self._pools.arrays, self._states.conv, self._states.state)
            result = previous.result() if previous else None
            masks = self._grammars.masks(constrain(batch, result, arrays.sampling.rows))
        sampled = self._sample(hidden, arrays, drawn, masks)
        step = _Step(batch, arrays.num_scored, sampled, self._score(hidden, batch, arrays), _pool(hidden, batch))
        pooled = list(step.pooled.values())
        mx.async_eval(step.sampled, step.scores, pooled, self._pools.arrays, self._states.conv, self._states.state)
        return step, result

    def _forward(self, arrays: BatchArrays, drawn: mx.array) -> mx.array:
        """The model's hidden states. `drawn`: the tokens of the step before."""
        token_ids = mx.array(arrays.token_ids)  # [T]
        if arrays.awaits_previous:
            token_ids = mx.concatenate([token_ids, drawn])[mx.array(arrays.token_sources)]
        self._states.copy(arrays.restored)
        self._states.copy(arrays.kept)
        hidden = self._model(token_ids, EngineStepContext(self._pools, self._states, arrays))
        self._states.copy(arrays.saved)
        return hidden

    def _sample(
        self, hidden: mx.array, arrays: BatchArrays, drawn: mx.array, masks: npt.NDArray[np.uint32] | None
    ) -> Sampled | None:
        """A token for each of the R draws. `masks` [M, ceil(V / 32)]: what some may choose from."""
        if not arrays.sampled.size:
            return None
        sampling = arrays.sampling
        history = mx.array(sampling.history)
        if sampling.history_holes.size:
            history[mx.array(sampling.history_holes)] = drawn[mx.array(sampling.hole_sources)]
        tables = SampleTables(
            masks=None if masks is None else mx.array(masks),
            bias_ids=mx.array(sampling.bias_ids),
            bias_values=mx.array(sampling.bias_values),
            history=history,
            breakers=mx.array(sampling.breakers),
        )
        logits = self._model.logits(hidden[mx.array(arrays.sampled)])  # [R, V]
        return sample(logits, sampling.rows, tables)

    def _score(self, hidden: mx.array, batch: Batch, arrays: BatchArrays) -> Sampled | None:
        """Log-probabilities of the P prompt tokens that are scored."""
        if not arrays.scored.size:
            return None
        wanted = np.repeat([row.request.num_prompt_logprobs or 0 for row in batch.rows], arrays.num_scored)
        rows = make_rows(arrays.scored.size, given_token=arrays.scored_ids, num_logprobs=wanted)
        parts = []
        for begin in range(0, arrays.scored.size, _SCORED_ROWS):
            part = slice(begin, begin + _SCORED_ROWS)
            logits = self._model.logits(hidden[mx.array(arrays.scored[part])])
            parts.append(sample(logits, rows[part]))
        return Sampled(*(mx.concatenate(list(columns)) for columns in zip(*parts, strict=True)))


def _pool(hidden: mx.array, batch: Batch) -> dict[Request, mx.array]:
    """Sums of the hidden states [T, hidden] that embeddings are made of."""
    sums: dict[Request, mx.array] = {}
    offset = 0  # of the row's tokens on T
    for row in batch.rows:
        if row.request.pooled is not None:
            first_pos, end_pos = pooled_range(row.request.pooled.pooling, row.start_pos, row.end_pos)
            states = hidden[offset + first_pos - row.start_pos : offset + end_pos - row.start_pos]
            sums[row.request] = states.astype(mx.float32).sum(axis=0)
        offset += row.num_tokens
    return sums


def _logprobs(sampled: Sampled | None, wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Of each row; `wanted`: how many alternatives, or None for no log-probabilities."""
    if sampled is None or all(count is None for count in wanted):
        return [None] * len(wanted)
    rows = zip(wanted, *map(np.array, (sampled.logprobs, sampled.top_ids, sampled.top_logprobs)), strict=True)
    return [None if count is None else _token_logprobs(*columns) for count, *columns in rows]


def _token_logprobs(logprob: float, top_ids: npt.NDArray[Any], top_logprobs: npt.NDArray[Any]) -> TokenLogprobs:
    exists = top_logprobs > -np.inf
    return TokenLogprobs(float(logprob), top_ids[exists].tolist(), top_logprobs[exists].tolist())
