"""The step loop's body."""

from typing import Protocol

from mlx_server import wire
from mlx_server.engine.batch import Batch, StepResult
from mlx_server.engine.request import Request
from mlx_server.engine.scheduler import Outputs, Scheduler


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

    def __init__(self, scheduler: Scheduler, runner: Runner, *, context_length: int, vocab_size: int) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._launching: Batch | None = None
        self.info = wire.EngineInfo(context_length, vocab_size)

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.num_running or self._scheduler.num_waiting or self._runner.in_flight)

    def step(self) -> Outputs:
        self._launching = batch = self._scheduler.schedule()
        previous = self._runner.run(batch)
        return self._scheduler.update(previous)

    def fail_step(self) -> Outputs:
        """After `step` has raised: end the requests that took part in it, keep the others."""
        lost = [batch for batch in (self._runner.in_flight, self._launching) if batch is not None]
        self._runner.reset()
        return self._scheduler.fail(lost, "engine_error", "The engine failed to compute a step of this request.")

    def submit(self, connection: bytes, message: wire.Submit) -> wire.Failed | None:
        """Queue a request, or say why not. The API has checked all this; a fault here is an API process of ours gone
        wrong, and must not reach the device."""
        prompt, vocab_size = message.prompt_token_ids, self.info.vocab_size
        fault = None
        if self._scheduler.has(connection, message.request_id):
            fault = "request id is in use"
        elif not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            fault = f"prompt token ids must be in [0, {vocab_size}), at least one"
        elif message.max_tokens < 1 or len(prompt) + message.max_tokens > self.info.context_length:
            fault = f"prompt and max_tokens must fit the context of {self.info.context_length} tokens"
        if fault is not None:
            return wire.Failed(message.request_id, "invalid_request", fault)
        self._scheduler.add(
            Request(
                message.request_id,
                connection,
                prompt,
                message.max_tokens,
                frozenset(message.end_token_ids),
                message.sampling,
            )
        )
        return None

    def cancel(self, connection: bytes, request_id: str) -> bool:
        return self._scheduler.cancel(connection, request_id)

    def cancel_connection(self, connection: bytes) -> int:
        return self._scheduler.cancel_connection(connection)

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
