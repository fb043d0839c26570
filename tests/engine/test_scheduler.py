"""The scheduler and the pipelined step on a fake model: whatever happens, a request gets the tokens it gets alone."""

import time
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from fakes import FAKE_VOCAB_SIZE, FakeRunner, fake_next_token
from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.pacing import PrefillPacer
from mlx_server.engine.queue import QueueLimits
from mlx_server.engine.scheduler import Outputs, Scheduler
from mlx_server.engine.speculation import Speculator
from mlx_server.engine.stats import EngineStats
from mlx_server.sampling_params import SamplingParams

API = b"api-1"


def make_core(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_batch_tokens: int = 16,
    max_running: int = 8,
    context: int = 64,
    window: int | None = None,
    num_snapshots: int | None = None,
    limits: QueueLimits | None = None,
    pacer: PrefillPacer | None = None,
    speculator: Speculator | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[EngineCore, FakeRunner]:
    """`num_snapshots`: of a recurrent model."""
    kv_cache = KVCacheManager(num_blocks, block_size, max_running, window=window, num_snapshots=num_snapshots)
    stats = EngineStats()
    scheduler = Scheduler(
        kv_cache, max_batch_tokens=max_batch_tokens, limits=limits, pacer=pacer, speculator=speculator, stats=stats
    )
    num_slots = max_running + (num_snapshots or 0)
    runner = FakeRunner(num_blocks, block_size, num_slots, window, recurrent=num_snapshots is not None)
    core = EngineCore(
        scheduler,
        runner,
        info=wire.EngineInfo(context, FAKE_VOCAB_SIZE, max_requests=100, limited_by_memory=False),
        pacer=pacer,
        speculator=speculator,
        stats=stats,
        clock=clock,
    )
    return core, runner


def make_submit(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    *,
    seed: int = 0,
    end: tuple[int, ...] = (),
    priority: int = 0,
    client: str = "",
    deadline_s: float | None = None,
    cache_salt: str = "",
) -> wire.Submit:
    sampling = SamplingParams(seed=seed)
    return wire.Submit(
        request_id,
        prompt,
        max_tokens,
        list(end),
        sampling,
        priority=priority,
        client=client,
        deadline_s=deadline_s,
        cache_salt=cache_salt,
    )


def alone(message: wire.Submit, window: int | None = None, *, recurrent: bool = False) -> tuple[list[int], str, int]:
    """(sent tokens, finish reason, number generated) of a request that has the engine for itself."""
    tokens = list(message.prompt_token_ids)
    sent: list[int] = []
    while True:
        token_id = fake_next_token(tokens, message.sampling.seed, window, recurrent=recurrent)
        tokens.append(token_id)
        num_output = len(tokens) - len(message.prompt_token_ids)
        if token_id in message.end_token_ids:
            return sent, "stop", num_output
        sent.append(token_id)
        if num_output == message.max_tokens:
            return sent, "length", num_output


class Collector:
    """What came back for each request, checked on the way: one end, nothing after it."""

    def __init__(self, window: int | None = None, *, recurrent: bool = False) -> None:
        self.window = window
        self.recurrent = recurrent
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, wire.Finished | wire.Failed] = {}

    def take(self, outputs: Outputs) -> None:
        for connection, output in outputs:
            assert connection == API
            assert output.request_id not in self.ends
            if isinstance(output, wire.Tokens | wire.Finished):
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if isinstance(output, wire.Finished | wire.Failed):
                self.ends[output.request_id] = output

    def run_until_idle(self, core: EngineCore) -> None:
        for _ in range(10_000):
            if not core.has_work:
                core.check_integrity()
                return
            self.take(core.step())
        raise AssertionError("not idle")

    def check(self, message: wire.Submit) -> None:
        end = self.ends[message.request_id]
        assert isinstance(end, wire.Finished)
        assert (self.tokens[message.request_id], end.finish_reason, end.num_output_tokens) == alone(
            message, self.window, recurrent=self.recurrent
        )


def test_one_request_gets_its_tokens() -> None:
    core, _ = make_core()
    message = make_submit("a", [1, 2, 3], 5)
    assert core.submit(API, message) is None
    collector = Collector()
    collector.run_until_idle(core)
    collector.check(message)


def test_end_token_is_counted_but_not_sent() -> None:
    core, _ = make_core()
    third = alone(make_submit("x", [5, 6], 3))[0][2]
    message = make_submit("a", [5, 6], 10, end=(third,))
    core.submit(API, message)
    collector = Collector()
    collector.run_until_idle(core)
    collector.check(message)
    end = collector.ends["a"]
    assert isinstance(end, wire.Finished)
    assert (end.finish_reason, end.num_output_tokens, len(collector.tokens["a"])) == ("stop", 3, 2)


def test_steps_are_pipelined() -> None:
    """A step is in flight when the tokens of the one before are handed out."""
    core, runner = make_core()
    core.submit(API, make_submit("a", [1, 2, 3], 4))
    assert core.step() == []
    assert runner.in_flight is not None
    assert [output.request_id for _, output in core.step()] == ["a"]
    assert runner.in_flight is not None


def test_long_prompt_is_chunked_and_decodes_go_on_beside_it() -> None:
    core, runner = make_core(max_batch_tokens=8)
    collector = Collector()
    short, long = make_submit("short", [1], 20), make_submit("long", list(range(40)), 2)
    core.submit(API, short)
    collector.take(core.step())
    core.submit(API, long)
    for _ in range(4):
        collector.take(core.step())
        assert runner.in_flight is not None
        rows = [(row.request.request_id, row.num_tokens) for row in runner.in_flight.rows]
        assert rows == [("short", 1), ("long", 7)]
    collector.run_until_idle(core)
    collector.check(short)
    collector.check(long)


def test_youngest_is_preempted_and_still_gets_its_tokens() -> None:
    core, runner = make_core(num_blocks=8, block_size=4, max_batch_tokens=32, context=32)
    messages = [make_submit(name, [i] * 9, 20, seed=i) for i, name in enumerate("abc")]
    collector = Collector()
    for message in messages:
        core.submit(API, message)
    recomputed: set[str] = set()
    while core.has_work:
        collector.take(core.step())
        for row in runner.in_flight.rows if runner.in_flight else []:
            if row.num_tokens > 1 and row.request.output_token_ids:
                recomputed.add(row.request.request_id)
    assert recomputed == {"b", "c"}
    assert next(iter(collector.ends)) == "a"
    for message in messages:
        collector.check(message)
    core.check_integrity()


def test_blocks_behind_the_window_are_freed() -> None:
    """A request much longer than the pool, whose attention looks back a few tokens."""
    core, _ = make_core(num_blocks=6, block_size=4, max_batch_tokens=8, context=1000, window=8)
    message = make_submit("a", list(range(100)), 200)
    core.submit(API, message)
    collector = Collector(window=8)
    collector.run_until_idle(core)
    collector.check(message)


@pytest.mark.parametrize(("window", "longest"), [(None, 64), (8, None), (40, 64)])
def test_a_window_that_leaves_room_lifts_the_limit_of_the_pool(window: int | None, longest: int | None) -> None:
    assert KVCacheManager(16, 4, 1, window=window).max_request_tokens(max_batch_tokens=32) == longest


def test_cancelled_request_is_silent_and_its_blocks_come_back() -> None:
    core, _ = make_core()
    core.submit(API, make_submit("a", [1, 2, 3], 40))
    core.submit(API, make_submit("b", [4, 5], 5))
    collector = Collector()
    for _ in range(3):
        collector.take(core.step())
    assert core.cancel(API, "a")
    assert not core.cancel(API, "a")
    sent = list(collector.tokens["a"])
    collector.run_until_idle(core)
    assert collector.tokens["a"] == sent and "a" not in collector.ends
    assert "b" in collector.ends


def test_connection_gone_ends_its_requests_only() -> None:
    core, _ = make_core()
    core.submit(b"api-2", make_submit("a", [9], 40))
    core.submit(API, make_submit("a", [1], 5))
    assert core.cancel_connection(b"api-2") == 1
    collector = Collector()
    collector.run_until_idle(core)
    assert list(collector.ends) == ["a"]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (make_submit("a", [], 5), "prompt token ids"),
        (make_submit("a", [FAKE_VOCAB_SIZE], 5), "prompt token ids"),
        (make_submit("a", [-1], 5), "prompt token ids"),
        (make_submit("a", [1], 0), "max_tokens"),
        (make_submit("a", [1] * 60, 5), "context of 64"),
        (replace(make_submit("a", [1], 5), end_token_ids=[FAKE_VOCAB_SIZE]), "end token ids"),
        (replace(make_submit("a", [1], 5), sampling=SamplingParams(top_k=2**40)), "out of range"),
        (replace(make_submit("a", [1], 5), sampling=SamplingParams(seed=-1)), "out of range"),
    ],
)
def test_bad_submit_is_refused(message: wire.Submit, fault: str) -> None:
    core, _ = make_core()
    failed = core.submit(API, message)
    assert failed is not None and fault in failed.message
    assert not core.has_work


def run_with_failures(core: EngineCore, collector: Collector, fault: type[Exception] = RuntimeError) -> None:
    """Until idle, as the transport does it."""
    for _ in range(10_000):
        if not core.has_work:
            core.check_integrity()
            return
        try:
            collector.take(core.step())
        except fault:
            collector.take(core.fail_step())
    raise AssertionError("not idle")


@pytest.mark.parametrize("fails_when_read", [False, True])
def test_requests_of_a_failed_step_are_tried_again_and_get_their_tokens(fails_when_read: bool) -> None:
    core, runner = make_core()
    runner.fails_when_read = fails_when_read
    messages = [make_submit(name, [i, 2], 9) for i, name in enumerate("abc")]
    for message in messages:
        core.submit(API, message)
    runner.fail_at = {1, 12}
    collector = Collector()
    run_with_failures(core, collector)
    for message in messages:
        collector.check(message)


@pytest.mark.parametrize("fails_when_read", [False, True])
def test_a_request_that_fails_alone_too_ends_and_the_others_go_on(fails_when_read: bool) -> None:
    core, runner = make_core()
    runner.fails_when_read = fails_when_read
    messages = [make_submit(name, [i, 2], 9) for i, name in enumerate("abc")]
    for message in messages:
        core.submit(API, message)
    runner.poison = {"b"}
    collector = Collector()
    run_with_failures(core, collector)
    failed = collector.ends["b"]
    assert isinstance(failed, wire.Failed) and failed.code == "engine_error"
    collector.check(messages[0])
    collector.check(messages[2])


@pytest.mark.parametrize("fails_when_read", [False, True])
def test_retries_end(fails_when_read: bool) -> None:
    core, runner = make_core()
    runner.fails_when_read = fails_when_read
    core.submit(API, make_submit("a", [1], 9))
    runner.fail_at = set(range(100))
    collector = Collector()
    run_with_failures(core, collector)
    assert isinstance(collector.ends["a"], wire.Failed)


def test_a_step_that_fails_when_it_is_read_is_the_fault_of_its_own_requests() -> None:
    """The one launched after it may be without any, or of others."""
    core, runner = make_core()
    runner.fails_when_read, runner.poison = True, {"a"}
    messages = [make_submit("a", [1], 1), make_submit("b", [2], 9)]
    for message in messages:
        core.submit(API, message)
    collector = Collector()
    run_with_failures(core, collector)
    assert isinstance(collector.ends["a"], wire.Failed)
    collector.check(messages[1])
    core.submit(API, make_submit("a", [1], 1))
    run_with_failures(core, collector := Collector())
    assert isinstance(collector.ends["a"], wire.Failed)


@pytest.mark.parametrize(("before", "sizes"), [(128, [128, 64, 32, 32]), (16, [16, 16])])
def test_steps_become_smaller_when_memory_is_short(before: int, sizes: list[int]) -> None:
    core, runner = make_core(max_batch_tokens=before, context=2000, num_blocks=1000)
    message = make_submit("a", list(range(1000)), 5)
    core.submit(API, message)
    for size in sizes:
        core.step()
        assert runner.in_flight is not None and runner.in_flight.num_tokens == size
        core.cancel(API, "a")
        core.fail_step(out_of_memory=True)
        core.submit(API, message)
