"""Which request computes which tokens in the next step.

Pure bookkeeping: no arrays, no randomness, and times only as they are told.
"""

import bisect
import math
from collections import Counter

from mlx_server import wire
from mlx_server.engine.batch import Batch, StepResult
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.pacing import PrefillPacer
from mlx_server.engine.pooling import PooledStates
from mlx_server.engine.queue import FairShares, QueueLimits, Refusal, WaitingQueue, age
from mlx_server.engine.request import Request, RequestState
from mlx_server.engine.speculation import MAX_DRAFTS, Speculator, follow
from mlx_server.engine.stats import EndReason, EngineStats
from mlx_server.engine.step_builder import StepBuilder
from mlx_server.engine.suspects import Suspects
from mlx_server.ops.sampling import INVALID_TOKEN

Outputs = list[tuple[bytes, wire.RequestOutput]]  # (connection, output)

LEAST_BATCH_TOKENS = 32


class Scheduler:
    """Continuous batching: prefill chunks and decodes of many requests share each step under one token budget.

    - Decodes go first, and bound what is left for prompts (`PrefillPacer`), so that a long prompt does not stall them.
    - Prompts take turns by priority, then by what their clients have had (`FairShares`), then by arrival. A client
      that waits gets the place of one that holds two more.
    - When blocks run out, a request gives its own back and is computed again later: of the lowest priority, of the
      client with the most, the youngest. The oldest of the highest priority always goes on, so all of it finishes.
    - Requests of a step that failed are tried again alone, one after the other, before all others.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        *,
        max_batch_tokens: int,
        limits: QueueLimits | None = None,
        pacer: PrefillPacer | None = None,
        speculator: Speculator | None = None,
        stats: EngineStats | None = None,
    ) -> None:
        """Without `limits` any number may wait; without `pacer` prompts fill each step; without `speculator` there are
        no drafts."""
        self.kv_cache = kv_cache
        self._max_batch_tokens = max_batch_tokens
        self._pacer = pacer
        self._speculator = speculator
        self._awaits_drafts = False  # the step in flight has some: where its requests go on, it will tell
        self._stats = stats or EngineStats()
        self._shares = FairShares()
        self._queue = WaitingQueue(limits or QueueLimits(2**62, 2**62), self._shares)
        self._running: list[Request] = []  # by age
        self._suspects = Suspects()  # waiting or running
        self._outputs: Outputs = []  # of the step that is taken in
        self._taken: Request | None = None  # whose tokens of that step are taken in
        self._by_id: dict[tuple[bytes, str], Request] = {}
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def awaits_grammars(self) -> bool:
        """Nothing runs, and none of those that wait is ready."""
        return bool(self._queue) and not self._running and self._queue.peek() is None

    def add(self, request: Request) -> Refusal | None:
        """Queue a request, or say why it may not wait."""
        refusal = self._queue.refusal(request, self.kv_cache.num_free_slots)
        if refusal is not None:
            return refusal
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._by_id[request.connection, request.request_id] = request
        self._shares.join(request)
        self._queue.push(request)
        return None

    def has(self, connection: bytes, request_id: str) -> bool:
        return (connection, request_id) in self._by_id

    def cancel(self, connection: bytes, request_id: str, now_s: float = 0.0) -> bool:
        """End a request without output; False if it has already ended."""
        request = self._by_id.get((connection, request_id))
        if request is None:
            return False
        self._end(request, "abort", now_s)
        return True

    def cancel_connection(self, connection: bytes, now_s: float = 0.0) -> int:
        """End all requests of an API process that is gone; how many they were."""
        gone = [request for request in self._by_id.values() if request.connection == connection]
        for request in gone:
            self._end(request, "abort", now_s)
        return len(gone)

    # --- schedule ---

    def schedule(self, now_s: float = 0.0) -> Batch:
        """The next step: decodes, then prompts, while budget and blocks last."""
        step = StepBuilder(self.kv_cache, self._max_batch_tokens)
        if self._awaits_drafts:
            return Batch([])
        if (suspect := self._suspects.next) is not None:
            self._schedule_alone(step, suspect)
        else:
            decodes = [r for r in self._running if r.is_decoding and not r.awaits_last_token]
            drafts = self._plan_drafts(decodes)
            if drafts is None:
                return Batch([])
            self._make_place()
            self._schedule_decodes(step, decodes, drafts)
            self._schedule_prompts(step)
        for row in step.rows:
            found_pos = min(row.start_pos, len(row.request.prompt_token_ids))
            row.request.num_cached_tokens += max(found_pos - row.request.num_served_tokens, 0)
            self._shares.charge(row.request, row.start_pos, row.certain_end_pos)
            if self._speculator is not None:
                follow(row.request)
            if row.request.started_s is None:
                row.request.started_s = now_s
                self._stats.on_start(row.request)
        batch = Batch(step.rows)
        self._awaits_drafts = batch.num_drafts > 0
        return batch

    def _schedule_alone(self, step: StepBuilder, suspect: Request) -> None:
        """Not pipelined: a failure must have one culprit."""
        if self._suspects.is_in_flight:
            return
        num_tokens = self.kv_cache.next_chunk(suspect, step.budget) or min(suspect.num_uncomputed_tokens, step.budget)
        if suspect.state is RequestState.WAITING:
            self._start(suspect)
        while not self.kv_cache.allocate(suspect, num_tokens):
            self._preempt(next(request for request in reversed(self._running) if request is not suspect))
        step.add(suspect, num_tokens)
        self._suspects.is_in_flight = True

    def _plan_drafts(self, decodes: list[Request]) -> list[tuple[int, ...]] | None:
        """Drafts for each; None: they are worth it that the step in flight is read first."""
        if self._speculator is None or not decodes:
            return [()] * len(decodes)
        return self._speculator.plan(decodes, [self._max_drafts(request) for request in decodes])

    def _max_drafts(self, request: Request) -> int:
        if request.num_redone_tokens or request.grammar is not None:
            return 0
        num_wanted = request.max_tokens - len(request.output_token_ids) - request.num_in_flight_tokens
        limit = self.kv_cache.max_drafts(request)
        return max(min(num_wanted - 1, MAX_DRAFTS if limit is None else min(limit, MAX_DRAFTS)), 0)

    def _schedule_decodes(self, step: StepBuilder, decodes: list[Request], drafts: list[tuple[int, ...]]) -> None:
        for request, its_drafts in zip(decodes, drafts, strict=True):
            if request.state is not RequestState.RUNNING or not step.budget:
                continue  # it may have given way to one before it
            num_tokens = self.kv_cache.next_chunk(request, step.budget)
            if num_tokens > step.budget:
                continue
            its_drafts = its_drafts[: min(step.budget - num_tokens, self._max_drafts(request))]
            if its_drafts and self.kv_cache.allocate(request, num_tokens + len(its_drafts)):
                step.add(request, num_tokens, its_drafts)
            elif self._make_room(step, request, num_tokens):
                step.add(request, num_tokens)

    def _schedule_prompts(self, step: StepBuilder) -> None:
        if step.rows and self._pacer is not None:
            step.budget = min(step.budget, self._pacer.max_prefill_tokens(len(step.rows)))
        begun = [request for request in self._running if not request.is_decoding and not request.awaits_last_token]
        blocks_are_short = False  # then what is free is for the one whose turn it was
        while step.budget:
            new = None if blocks_are_short or not self.kv_cache.num_free_slots else self._queue.peek()
            # One that gave way to another may run again already, as a new one.
            candidates = [r for r in begun if r.state is RequestState.RUNNING and r not in step.members]
            request = min([*candidates, *([new] if new else [])], key=self._shares.turn, default=None)
            if request is None:
                return
            if request is new:
                num_tokens = self.kv_cache.next_chunk(request, step.budget)
                has_room = num_tokens > 0 and self._admit(request, num_tokens)
            else:
                begun.remove(request)
                num_tokens = self.kv_cache.next_chunk(request, step.budget)
                has_room = self._make_room(step, request, num_tokens)
            if has_room:
                step.add(request, num_tokens)
            else:
                blocks_are_short = True

    def _admit(self, request: Request, num_tokens: int) -> bool:
        """Let a waiting request run, if blocks for its next tokens and a slot are free."""
        if not self.kv_cache.allocate(request, num_tokens):
            return False
        self._start(request)
        return True

    def _start(self, request: Request) -> None:
        self._queue.remove(request)
        request.state = RequestState.RUNNING
        bisect.insort(self._running, request, key=age)

    def _make_place(self) -> None:
        """If a slot or blocks are short, let a running request give way to the one whose turn it is, where fair."""
        head = self._queue.peek()
        if head is None or self._has_place(head):
            return
        held = Counter(request.client for request in self._running)
        unfair = [
            request
            for request in self._running
            if request.priority > head.priority
            or (request.priority == head.priority and held[request.client] >= held[head.client] + 2)
        ]
        if unfair:
            self._preempt(max(unfair, key=lambda request: (request.priority, held[request.client], request.arrival)))

    def _has_place(self, head: Request) -> bool:
        num_tokens = min(head.num_uncomputed_tokens, self._max_batch_tokens)
        num_blocks = math.ceil(num_tokens / self.kv_cache.block_size) + len(self._running)
        return bool(self.kv_cache.num_free_slots) and self.kv_cache.num_free_blocks >= num_blocks

    def _make_room(self, step: StepBuilder, request: Request, num_tokens: int) -> bool:
        """Get the blocks for `num_tokens` more, at the cost of others that are not in this step yet. False: all of
        them, or the step's members, go first; then the request sits this step out and keeps what it has."""
        while not self.kv_cache.allocate(request, num_tokens):
            held = Counter(r.client for r in self._running)
            others = [r for r in self._running if r not in step.members and not r.awaits_last_token]
            last = max(others, key=lambda r: (r.priority, held[r.client], r.arrival))
            if last is request:
                return False
            self._preempt(last)
        return True

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.state = RequestState.WAITING
        self._queue.push(request)
        self._stats.num_preemptions += 1

    # --- update ---

    def update(self, result: StepResult | None, now_s: float = 0.0) -> Outputs:
        """Take in the tokens of a computed step, and the time; what the requests' owners are to be told."""
        if result is not None:
            self._take(result, now_s)
        failed = [(request, failure) for request in self._by_id.values() if (failure := request.failure(now_s))]
        for request, failure in failed:
            self._end(request, "error" if failure.code == "invalid_grammar" else "abort", now_s)
            self._outputs.append((request.connection, failure))
        outputs, self._outputs = self._outputs, []
        return outputs

    def _take(self, result: StepResult, now_s: float) -> None:
        self._suspects.clear(result.batch)
        if result.batch.num_drafts:
            self._awaits_drafts = False
        self._outputs += [
            (row.request.connection, row.progress)
            for row in result.batch.rows
            if row.request.progress and row.is_prompt and row.request.state is not RequestState.ENDED
        ]
        for row, scores in zip(result.batch.rows, result.prompt_logprobs, strict=True):
            if scores:
                before = row.request.prompt_logprobs[: row.start_pos]  # more, if it was preempted
                row.request.prompt_logprobs = before + scores
            if row.request.pooled is not None:
                row.request.pooled.add(row.start_pos, row.end_pos, result.pooled[row.request])
        drawn = zip(result.batch.sampling_rows, result.token_ids, result.logprobs, strict=True)
        for row, token_ids, logprobs in drawn:
            request = row.request
            if row.certain_end_pos < request.num_known_tokens:
                continue  # the grammar had forced this token already
            request.num_in_flight_tokens -= 1
            if request.state is not RequestState.ENDED:
                self._taken = request
                token_ids = row.accepted(token_ids)
                if row.draft_token_ids:
                    num_drafts = len(row.draft_token_ids)
                    self.kv_cache.judge(request, row.start_pos, num_drafts, len(token_ids) - 1)
                self._outputs.append((request.connection, self._append(request, token_ids, logprobs, now_s)))
                self._taken = None

    def fail(self, batches: list[Batch], code: str, message: str, now_s: float = 0.0) -> Outputs:
        """These steps, or the making of the next one, failed, and all KV is lost. Their requests are tried again alone;
        one that fails alone, again and again, or while its tokens are taken in, ends. All others are computed again."""
        outputs, self._outputs, taken, self._taken = self._outputs, [], self._taken, None
        self._suspects.is_in_flight = self._awaits_drafts = False
        lost = {row.request: row.certain_end_pos for batch in batches for row in batch.rows}
        for request, end_pos in (lost or dict.fromkeys(self._next_up(), 0)).items():
            request.num_in_flight_tokens = 0
            has_ended = request.state is RequestState.ENDED
            if request is taken or not (has_ended or self._suspects.accuse(request, end_pos)):
                if not has_ended:
                    self._end(request, "error", now_s)
                outputs.append((request.connection, wire.Failed(request.request_id, code, message)))
        for request in self._by_id.values():  # also of one that was preempted with a token in flight
            request.num_in_flight_tokens = 0
            if request.grammar is not None:
                request.grammar.rewind()
        for request in list(self._running):
            self._preempt(request)
        self.kv_cache.clear()
        return outputs

    def shrink_steps(self) -> None:
        """Memory was short: let further steps have half as many tokens."""
        self._max_batch_tokens = max(self._max_batch_tokens // 2, min(LEAST_BATCH_TOKENS, self._max_batch_tokens))

    def _next_up(self) -> list[Request]:
        """Whom the next step is about."""
        if (suspect := self._suspects.next) is not None:
            return [suspect]
        return [*self._running, *([head] if (head := self._queue.peek()) is not None else [])]

    def _append(
        self, request: Request, token_ids: list[int], logprobs: list[wire.TokenLogprobs] | None, now_s: float
    ) -> wire.RequestOutput:
        last_token_id = token_ids[-1]
        if last_token_id == INVALID_TOKEN:
            self.kv_cache.discard(request)
            self._end(request, "error", now_s)
            return wire.Failed(request.request_id, "invalid_logits", "The model gave no valid probabilities.")
        if request.pooled is not None:
            return self._embedded(request, request.pooled, now_s)
        is_first = not request.output_token_ids
        prompt_logprobs = request.prompt_logprobs if is_first and request.num_prompt_logprobs is not None else None
        self._stats.num_accepted_tokens += len(token_ids) - 1
        token_ids, is_complete = request.continuation(token_ids)
        request.output_token_ids += token_ids
        self._stats.on_tokens(request, len(token_ids), now_s)
        reason: wire.FinishReason | None = None
        stop_token_id: int | None = None
        if token_ids and last_token_id in request.end_token_ids:
            reason, stop_token_id, token_ids = "stop", last_token_id, token_ids[:-1]
        elif is_complete:
            reason = "stop"
        elif len(request.output_token_ids) == request.max_tokens:
            reason = "length"
        its_logprobs = None if logprobs is None else logprobs[: len(token_ids)]
        if reason is None:
            return wire.Tokens(request.request_id, token_ids, its_logprobs, prompt_logprobs)
        self._end(request, reason, now_s)
        return wire.Finished(
            request.request_id,
            token_ids,
            reason,
            num_cached_tokens=request.num_cached_tokens,
            num_output_tokens=len(request.output_token_ids),
            stop_token_id=stop_token_id,
            logprobs=its_logprobs,
            prompt_logprobs=prompt_logprobs,
            timings=request.timings(),
        )

    def _embedded(self, request: Request, pooled: PooledStates, now_s: float) -> wire.RequestOutput:
        vector = pooled.vector()
        self._stats.on_tokens(request, 0, now_s)
        self._end(request, "error" if vector is None else "stop", now_s)
        if vector is None:
            return wire.Failed(request.request_id, "invalid_embedding", "The model gave no valid hidden states.")
        return wire.Embedded(request.request_id, vector.tobytes())

    def _end(self, request: Request, reason: EndReason, now_s: float) -> None:
        """Blocks go back at once, though a step in flight may still write to them: steps run in order on the device,
        so whoever gets the blocks next writes later."""
        if request.state is RequestState.RUNNING:
            self._release(request)
        else:
            self._queue.remove(request)
        self._suspects.remove(request)
        if request.grammar is not None:
            request.grammar.abandon()
        request.state = RequestState.ENDED
        self._shares.leave(request)
        del self._by_id[request.connection, request.request_id]
        self._stats.on_end(request, reason, now_s)

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        self.kv_cache.free(request)

    def check_integrity(self, *, thorough: bool = True) -> None:
        """Idle means that every block is back."""
        self.kv_cache.check_integrity(thorough=thorough)
        if not self._by_id:
            assert not self._running and not self._queue and not self._suspects
            self.kv_cache.check_all_free()
