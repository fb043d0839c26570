"""The step loop's body."""

import math
import time
from collections.abc import Callable
from typing import Protocol

from mlx_server import wire
from mlx_server.engine.batch import Batch, StepResult
from mlx_server.engine.grammar import Grammars
from mlx_server.engine.pacing import PrefillPacer
from mlx_server.engine.pooling import PooledStates
from mlx_server.engine.queue import Refusal
from mlx_server.engine.request import Request
from mlx_server.engine.scheduler import Outputs, Scheduler
from mlx_server.engine.speculation import Speculator
from mlx_server.engine.stats import EngineStats, Gauges
from mlx_server.sampling_params import MAX_TOP_LOGPROBS, SamplingParams

_REFUSALS: dict[Refusal, str] = {
    "queue_full": "The server has more requests than it can queue; try again soon.",
    "client_queue_full": "Too many requests of this client are waiting; try again when some have ended.",
}


class Runner(Protocol):
    """Computes batches. One batch may be in flight: launched, its tokens not read back yet."""

    @property
    def in_flight(self) -> Batch | None: ...

    def run(self, batch: Batch) -> StepResult | None:
        """Launch `batch` (nothing, if it is empty), then wait for the step launched before and return its tokens."""

    def reset(self) -> None:
        """Forget the step in flight and all KV, after a failure."""


class EngineCore:
    """All requests of all connections, one step at a time.

    Pipelined: a step is launched from the tokens of the step before while those are still on the device, so the host
    reads and handles one step's tokens while the device computes the next.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        info: wire.EngineInfo,
        grammars: Grammars | None = None,
        pacer: PrefillPacer | None = None,
        speculator: Speculator | None = None,
        stats: EngineStats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`scheduler` has the same `pacer`, `speculator` and `stats`, `runner` the same `grammars`."""
        self._scheduler = scheduler
        self._runner = runner
        self._grammars = grammars
        self._pacer = pacer
        self._speculator = speculator
        self._stats = stats or EngineStats()
        self._clock = clock
        self._at_risk: list[Batch] = []  # what a failure of this step loses, oldest first
        self.slowest_step_s = 0.0  # of all so far, the warm-up's too
        self._device_free_s = 0.0  # when the step in flight could begin
        self.info = info

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.num_running or self._scheduler.num_waiting or self._runner.in_flight)

    @property
    def awaits_grammars(self) -> bool:
        """All work there is waits until its grammars are compiled."""
        return not self._runner.in_flight and self._scheduler.awaits_grammars

    def step(self) -> Outputs:
        start_s = self._clock()
        # A step may fail when it is read, and then is in flight no more.
        self._at_risk = [self._runner.in_flight] if self._runner.in_flight else []
        batch = self._scheduler.schedule(start_s)
        self._at_risk.append(batch)
        previous = self._runner.run(batch)
        end_s = self._clock()
        self.slowest_step_s = max(self.slowest_step_s, end_s - start_s)
        self._observe(previous, batch, start_s, end_s)
        return self._scheduler.update(previous, end_s)

    def fail_step(self, *, out_of_memory: bool = False) -> Outputs:
        """After `step` has raised: its requests are tried again alone, or end; the others are kept. From then on steps
        are smaller if memory was short."""
        self._runner.reset()
        self._stats.on_failed_step()
        if out_of_memory:
            self._scheduler.shrink_steps()
        message = "The engine failed to compute a step of this request."
        return self._scheduler.fail(self._at_risk, "engine_error", message, self._clock())

    def submit(self, connection: bytes, message: wire.Submit | wire.Embed) -> wire.Failed | None:
        """Queue a request, or say why not."""
        now_s = self._clock()
        try:
            if isinstance(message, wire.Submit):
                request = _to_request(connection, message, now_s)
            else:
                request = _to_pooled_request(connection, message, now_s)
        except (OverflowError, ValueError):
            return wire.Failed(message.request_id, "invalid_request", "a parameter of sampling is out of range")
        grammar = message.grammar if isinstance(message, wire.Submit) else None
        fault = self._fault(request)
        if grammar is not None and self._grammars is None:
            fault = "this engine has no tokenizer, so it can't enforce a grammar"
        if fault is not None:
            return wire.Failed(request.request_id, "invalid_request", fault)
        refusal = self._scheduler.add(request)
        if refusal is None:
            if grammar is not None and self._grammars is not None:
                request.grammar = self._grammars.compile(grammar, request.end_token_ids)
            return None
        self._stats.on_refusal(refusal)
        return wire.Failed(request.request_id, refusal, _REFUSALS[refusal])

    def cancel(self, connection: bytes, request_id: str) -> bool:
        return self._scheduler.cancel(connection, request_id, self._clock())

    def cancel_connection(self, connection: bytes) -> int:
        return self._scheduler.cancel_connection(connection, self._clock())

    def metrics(self) -> str:
        """Counters, histograms and the present state, in Prometheus's text format."""
        kv_cache = self._scheduler.kv_cache
        gauges = Gauges(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            cache_usage=(kv_cache.num_blocks - kv_cache.num_free_blocks) / kv_cache.num_blocks,
            block_size=kv_cache.block_size,
            num_blocks=kv_cache.num_blocks,
        )
        return self._stats.text(gauges)

    def reset_stats(self) -> None:
        """Forget what the warm-up counted."""
        self._stats.reset()

    def check_integrity(self, *, thorough: bool = True) -> None:
        """Fails if the bookkeeping is not whole. What is not thorough takes no time that a request would notice."""
        self._scheduler.check_integrity(thorough=thorough)

    def _observe(self, result: StepResult | None, launched: Batch, start_s: float, end_s: float) -> None:
        """A step's time is that from the end of the one before, or from its launch if the device was idle."""
        if result is None:
            self._device_free_s = start_s
            return
        duration_s = end_s - self._device_free_s
        self._device_free_s = end_s
        self._stats.on_step(result.batch, duration_s)
        if self._pacer is not None:
            self._pacer.observe(result.batch, launched, duration_s)
        if self._speculator is not None:
            self._speculator.observe(result.batch, launched, duration_s)

    def _fault(self, request: Request) -> str | None:
        """The API has checked all this; a fault here is an API process of ours gone wrong, and must not reach the
        device."""
        prompt, vocab_size = request.prompt_token_ids, self.info.vocab_size
        if self._scheduler.has(request.connection, request.request_id):
            return "request id is in use"
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            return f"prompt token ids must be in [0, {vocab_size}), at least one"
        is_too_short = request.max_tokens < (0 if request.needs_every_state else 1)
        if is_too_short or len(prompt) + request.max_tokens > self.info.context_length:
            return f"prompt and max_tokens must fit the context of {self.info.context_length} tokens"
        sampling = request.sampling
        token_ids = (*request.end_token_ids, *sampling.logit_bias, *sampling.dry_sequence_breakers)
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            return f"end token ids, logit_bias and dry_sequence_breakers must be of token ids in [0, {vocab_size})"
        if max(sampling.logprobs or 0, request.num_prompt_logprobs or 0) > MAX_TOP_LOGPROBS:
            return f"logprobs and prompt_logprobs must be at most {MAX_TOP_LOGPROBS}"
        return None


def _to_request(connection: bytes, message: wire.Submit, now_s: float) -> Request:
    return Request(
        message.request_id,
        connection,
        message.prompt_token_ids,
        message.max_tokens,
        frozenset(message.end_token_ids),
        message.sampling,
        num_prompt_logprobs=message.prompt_logprobs,
        priority=message.priority,
        client=message.client,
        progress=message.progress,
        cache_salt=message.cache_salt,
        arrived_s=now_s,
        deadline_s=math.inf if message.deadline_s is None else now_s + message.deadline_s,
    )


def _to_pooled_request(connection: bytes, message: wire.Embed, now_s: float) -> Request:
    return Request(
        message.request_id,
        connection,
        message.token_ids,
        0,  # the token whose draw ends a prompt's computation is dropped
        frozenset(),
        SamplingParams(temperature=0.0),
        pooled=PooledStates(message.pooling),
        client=message.client,
        arrived_s=now_s,
        deadline_s=math.inf if message.deadline_s is None else now_s + message.deadline_s,
    )
