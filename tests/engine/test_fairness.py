"""Who is served when there is not enough for all: priorities, shares of clients, bounds of the queue, deadlines."""

import msgspec
import pytest

from engine.test_scheduler import API, Collector, make_core, make_submit
from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.engine.queue import QueueLimits


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def submit_all(core: EngineCore, *messages: wire.Submit) -> None:
    for message in messages:
        assert core.submit(API, message) is None


def steps_until_first_token(core: EngineCore, collector: Collector, request_id: str) -> int:
    for num_steps in range(1, 1000):
        collector.take(core.step())
        if request_id in collector.tokens:
            return num_steps
    raise AssertionError("no token in 1000 steps")


@pytest.mark.parametrize(("max_running", "num_blocks"), [(4, 64), (32, 16)], ids=["few slots", "few blocks"])
def test_a_flood_of_one_client_does_not_stall_another(max_running: int, num_blocks: int) -> None:
    core, _ = make_core(max_running=max_running, num_blocks=num_blocks)
    flood = [make_submit(f"a{i}", [i + 1] * 9, 40, client="a") for i in range(50)]
    submit_all(core, *flood)
    collector = Collector()
    for _ in range(6):
        collector.take(core.step())
    single = make_submit("b", [7] * 9, 20, client="b")
    submit_all(core, single)
    assert steps_until_first_token(core, collector, "b") <= 3
    for _ in range(20):
        collector.take(core.step())
    collector.check(single)  # it was not sent back to the queue either
    collector.run_until_idle(core)
    for message in flood:
        collector.check(message)


def test_prompts_of_two_clients_take_turns() -> None:
    core, runner = make_core(max_batch_tokens=8, context=1000, num_blocks=1000)
    submit_all(core, make_submit("a", [1] * 80, 1, client="a"), make_submit("b", [2] * 16, 1, client="b"))
    order = []
    for _ in range(6):
        core.step()
        assert runner.in_flight is not None
        order += [row.request.request_id for row in runner.in_flight.rows]
    assert order == ["a", "b", "a", "b", "a", "a"]


def test_prompts_of_one_client_are_served_in_order() -> None:
    core, runner = make_core(max_batch_tokens=8, context=1000, num_blocks=1000)
    submit_all(core, make_submit("a", [1] * 24, 1), make_submit("b", [2] * 16, 1))
    order = []
    for _ in range(5):
        core.step()
        assert runner.in_flight is not None
        order += [row.request.request_id for row in runner.in_flight.rows]
    assert order == ["a", "a", "a", "b", "b"]


def test_an_idle_client_saves_up_no_claim() -> None:
    """b comes back after a was served for long: they take turns from there on."""
    core, runner = make_core(max_batch_tokens=8, context=1000, num_blocks=1000)
    submit_all(core, make_submit("b0", [1], 1, client="b"), make_submit("a", [1] * 200, 1, client="a"))
    for _ in range(10):
        core.step()
    submit_all(core, make_submit("b", [2] * 80, 1, client="b"))
    order = []
    for _ in range(6):
        core.step()
        assert runner.in_flight is not None
        order += [row.request.request_id for row in runner.in_flight.rows]
    assert order.count("a") == 3


def test_a_higher_priority_goes_first_and_takes_the_place_of_a_lower_one() -> None:
    core, _ = make_core(max_running=2)
    low = [make_submit(f"low{i}", [i + 1] * 5, 40, priority=1) for i in range(4)]
    submit_all(core, *low)
    collector = Collector()
    for _ in range(4):
        collector.take(core.step())
    assert set(collector.tokens) == {"low0", "low1"}
    high = make_submit("high", [9] * 5, 5, priority=0)
    submit_all(core, high)
    assert steps_until_first_token(core, collector, "high") <= 3
    collector.run_until_idle(core)
    for message in [high, *low]:
        collector.check(message)
    assert next(iter(collector.ends)) == "high"


def test_a_full_queue_refuses_at_once() -> None:
    core, _ = make_core(max_running=1, limits=QueueLimits(max_requests=4, max_tokens=1000))
    submit_all(core, make_submit("running", [1], 40, client="x"))
    core.step()
    submit_all(core, *(make_submit(name, [1], 4, client=name) for name in "abcd"))
    failed = core.submit(API, make_submit("e", [1], 4, client="e"))
    assert failed is not None and failed.code == "queue_full"
    assert 'refusals_total{code="queue_full",engine="0",model_name=""} 1.0' in core.metrics()


def test_one_client_leaves_room_in_the_queue() -> None:
    core, _ = make_core(max_running=1, limits=QueueLimits(max_requests=4, max_tokens=1000))
    submit_all(core, make_submit("running", [1], 40, client="x"))
    core.step()
    submit_all(core, *(make_submit(f"a{i}", [1], 4, client="a") for i in range(2)))
    failed = core.submit(API, make_submit("a2", [1], 4, client="a"))
    assert failed is not None and failed.code == "client_queue_full"
    submit_all(core, make_submit("b", [1], 4, client="b"))


def test_free_places_beside_the_queue_count() -> None:
    core, _ = make_core(max_running=8, limits=QueueLimits(max_requests=1, max_tokens=1000))
    submit_all(core, *(make_submit(f"a{i}", [1], 4, client="a") for i in range(5)))


def test_the_queue_is_bounded_in_tokens_too() -> None:
    core, _ = make_core(limits=QueueLimits(max_requests=100, max_tokens=30))
    submit_all(core, make_submit("whole", [1] * 40, 4, client="a"))  # into an empty queue anything goes
    failed = core.submit(API, make_submit("more", [1], 4, client="b"))
    assert failed is not None and failed.code == "queue_full"
    core.step()
    submit_all(core, make_submit("b0", [1] * 12, 4, client="b"))
    failed = core.submit(API, make_submit("b1", [1] * 12, 4, client="b"))
    assert failed is not None and failed.code == "client_queue_full"
    submit_all(core, make_submit("c", [1] * 12, 4, client="c"))


def test_deadlines_end_what_waits_and_what_runs() -> None:
    clock = Clock()
    core, _ = make_core(max_running=1, clock=clock)
    submit_all(
        core,
        make_submit("runs", [1], 60, deadline_s=3),
        make_submit("waits", [1], 60, deadline_s=2),
        make_submit("stays", [1], 4, deadline_s=99),
    )
    collector = Collector()
    for _ in range(3):
        clock.now_s += 1
        collector.take(core.step())
    for name in ("runs", "waits"):
        failed = collector.ends[name]
        assert isinstance(failed, wire.Failed) and failed.code == "deadline_exceeded"
    collector.run_until_idle(core)
    assert isinstance(collector.ends["stays"], wire.Finished)


def test_finished_says_where_the_time_went() -> None:
    clock = Clock()
    core, _ = make_core(clock=clock)
    submit_all(core, make_submit("a", [1], 3))
    collector = Collector()
    clock.now_s += 5
    while core.has_work:
        collector.take(core.step())
        clock.now_s += 1
    end = collector.ends["a"]
    assert isinstance(end, wire.Finished)
    assert end.timings == wire.Timings(queue_s=5.0, prefill_s=1.0, decode_s=2.0)


def test_progress_is_told_after_each_part_of_a_prompt() -> None:
    core, _ = make_core(max_batch_tokens=8)
    message = make_submit("a", list(range(20)), 2)
    submit_all(core, msgspec.structs.replace(message, progress=True), make_submit("b", [1], 2))
    outputs = []
    while core.has_work:
        outputs += [output for _, output in core.step() if output.request_id == "a"]
    assert [o.num_computed_tokens for o in outputs if isinstance(o, wire.Progress)] == [8, 16, 20]
    assert [type(output) for output in outputs[-2:]] == [wire.Tokens, wire.Finished]
