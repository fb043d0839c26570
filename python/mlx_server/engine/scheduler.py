"""Which request computes which tokens in the next step. Pure bookkeeping: no arrays, no clock, no randomness."""

from collections import deque

from mlx_server import wire
from mlx_server.engine.batch import Batch, BatchRow, StepResult
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.request import Request, RequestState
from mlx_server.ops.sampling import INVALID_TOKEN

Outputs = list[tuple[bytes, wire.RequestOutput]]  # (connection, output)


class Scheduler:
    """Continuous batching: prefill chunks and decodes of many requests share each step under one token budget.

    Service is first come, first served. Decodes go first, so that a long prompt does not stall the others. When blocks
    run out, the youngest request gives its own back and is computed again later: the oldest always finishes.
    """

    def __init__(self, kv_cache: KVCacheManager, *, max_batch_tokens: int) -> None:
        self.kv_cache = kv_cache
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Request] = deque()  # by arrival
        self._running: list[Request] = []  # by arrival
        self._by_id: dict[tuple[bytes, str], Request] = {}
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._by_id[request.connection, request.request_id] = request
        self._waiting.append(request)

    def has(self, connection: bytes, request_id: str) -> bool:
        return (connection, request_id) in self._by_id

    def cancel(self, connection: bytes, request_id: str) -> bool:
        """End a request without output; False if it has already ended."""
        request = self._by_id.get((connection, request_id))
        if request is None:
            return False
        self._end(request)
        return True

    def cancel_connection(self, connection: bytes) -> int:
        """End all requests of an API process that is gone; how many they were."""
        gone = [request for request in self._by_id.values() if request.connection == connection]
        for request in gone:
            self._end(request)
        return len(gone)

    def schedule(self) -> Batch:
        """The next step: decodes, then prompts already begun, then new requests, while budget and blocks last."""
        budget = self._max_batch_tokens
        rows: list[BatchRow] = []
        unscheduled = sorted(self._running, key=lambda request: (not request.is_decoding, request.arrival))
        while unscheduled and budget > 0:
            request = unscheduled.pop(0)
            if request.awaits_last_token:
                continue
            num_tokens = min(request.num_uncomputed_tokens, budget)
            if self._make_room(request, num_tokens, unscheduled):
                rows.append(self._launch(request, num_tokens))
                budget -= num_tokens
        while self._waiting and budget > 0 and self.kv_cache.num_free_slots:
            request = self._waiting[0]
            num_tokens = min(request.num_uncomputed_tokens, budget)
            if not self.kv_cache.allocate(request, num_tokens):
                break
            self._waiting.popleft()
            request.state = RequestState.RUNNING
            self._running.append(request)
            self._running.sort(key=lambda r: r.arrival)
            rows.append(self._launch(request, num_tokens))
            budget -= num_tokens
        return Batch(rows)

    def update(self, result: StepResult | None) -> Outputs:
        """Take in the tokens of a computed step; what its requests' owners are to be told."""
        if result is None:
            return []
        outputs: Outputs = []
        for row, token_id in zip(result.batch.sampling_rows, result.token_ids, strict=True):
            request = row.request
            request.num_in_flight_tokens -= 1
            if request.state is not RequestState.ENDED:
                outputs.append((request.connection, self._append(request, token_id)))
        return outputs

    def fail(self, batches: list[Batch], code: str, message: str) -> Outputs:
        """These steps could not be computed: their requests end, all others are computed again."""
        outputs: Outputs = []
        for request in {row.request: None for batch in batches for row in batch.rows}:
            if request.state is not RequestState.ENDED:
                self._end(request)
                outputs.append((request.connection, wire.Failed(request.request_id, code, message)))
        for request in list(self._running):
            request.num_in_flight_tokens = 0
            self._preempt(request)
        return outputs

    def check_integrity(self) -> None:
        """Idle means that every block is back."""
        self.kv_cache.check_integrity()
        if not self._by_id:
            assert not self._running and not self._waiting
            self.kv_cache.check_all_free()

    def _make_room(self, request: Request, num_tokens: int, unscheduled: list[Request]) -> bool:
        """Get the blocks for `num_tokens` more, at the cost of younger requests that are not in this step yet."""
        while not self.kv_cache.allocate(request, request.num_computed_tokens + num_tokens):
            victim = max([*unscheduled, request], key=lambda r: r.arrival)
            assert len(self._running) > 1, "admission takes only requests that fit the whole pool"
            self._preempt(victim)
            if victim is request:
                return False
            unscheduled.remove(victim)
        return True

    def _launch(self, request: Request, num_tokens: int) -> BatchRow:
        start_pos = request.num_computed_tokens
        end_pos = start_pos + num_tokens
        samples = end_pos == request.num_tokens
        request.num_computed_tokens = end_pos
        request.num_in_flight_tokens += samples
        return BatchRow(request, start_pos, end_pos, samples)

    def _append(self, request: Request, token_id: int) -> wire.RequestOutput:
        if token_id == INVALID_TOKEN:
            self._end(request)
            return wire.Failed(request.request_id, "invalid_logits", "The model gave no valid probabilities.")
        request.output_token_ids.append(token_id)
        num_output = len(request.output_token_ids)
        if token_id in request.end_token_ids:
            self._end(request)
            return wire.Finished(request.request_id, [], "stop", 0, num_output)
        if num_output == request.max_tokens:
            self._end(request)
            return wire.Finished(request.request_id, [token_id], "length", 0, num_output)
        return wire.Tokens(request.request_id, [token_id])

    def _preempt(self, request: Request) -> None:
        self.kv_cache.free(request)
        self._running.remove(request)
        request.state = RequestState.WAITING
        younger = next((i for i, r in enumerate(self._waiting) if r.arrival > request.arrival), len(self._waiting))
        self._waiting.insert(younger, request)

    def _end(self, request: Request) -> None:
        """Blocks go back at once, though a step in flight may still write to them: steps run in order on the device,
        so whoever gets the blocks next writes later."""
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self.kv_cache.free(request)
        else:
            self._waiting.remove(request)
        request.state = RequestState.ENDED
        del self._by_id[request.connection, request.request_id]
