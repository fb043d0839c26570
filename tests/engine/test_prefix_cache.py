"""What is computed only once, on a fake model: shared prefixes, second turns, branches, and what becomes of them."""

import re

import pytest

from engine.test_scheduler import API, Collector, alone, make_core, make_submit
from fakes import FakeRunner
from mlx_server import wire
from mlx_server.engine.core import EngineCore

SYSTEM = list(range(100, 120))
ATTENTION, RECURRENT = None, 20  # num_snapshots


class Engine:
    """Requests of one engine, and how many tokens it has computed for them."""

    def __init__(self, num_snapshots: int | None = ATTENTION, *, window: int | None = None, **sizes: int) -> None:
        self.core: EngineCore
        self.runner: FakeRunner
        self.core, self.runner = make_core(num_snapshots=num_snapshots, window=window, context=200, **sizes)
        self.window, self.recurrent = window, num_snapshots is not None
        self.num_computed_tokens = 0
        self.num_copied_tokens = 0
        self.collector = Collector(window, recurrent=self.recurrent)

    def submit(self, *messages: wire.Submit) -> None:
        for message in messages:
            assert self.core.submit(API, message) is None

    def step(self) -> None:
        launched = self.runner.num_steps
        self.collector.take(self.core.step())
        assert self.runner.num_steps == launched + 1
        if self.runner.in_flight is not None:
            self.num_computed_tokens += self.runner.in_flight.num_tokens
            copies = [row.copy for row in self.runner.in_flight.rows if row.copy]
            self.num_copied_tokens += sum(copy.num_tokens for copy in copies)
        self.core.check_integrity()

    def run(self, *messages: wire.Submit) -> list[int]:
        """How many tokens of each prompt were cached, when all have ended with the right tokens."""
        self.submit(*messages)
        while self.core.has_work:
            self.step()
        for message in messages:
            self.collector.check(message)
        return [self.num_cached(message) for message in messages]

    def num_cached(self, message: wire.Submit) -> int:
        end = self.collector.ends[message.request_id]
        assert isinstance(end, wire.Finished)
        return end.num_cached_tokens

    def answer(self, message: wire.Submit) -> list[int]:
        return alone(message, self.window, recurrent=self.recurrent)[0]


@pytest.mark.parametrize("window", [None, 6, 64])
def test_a_second_turn_computes_what_is_new(window: int | None) -> None:
    engine = Engine(window=window)
    first = make_submit("first", [*SYSTEM, 1, 2, 3], 10)
    assert engine.run(first) == [0]
    history = first.prompt_token_ids + engine.answer(first)  # 33 tokens, of which the last was never computed
    before = engine.num_computed_tokens
    assert engine.run(make_submit("second", [*history, 4, 5], 1)) == [32]
    assert engine.num_computed_tokens - before == 3


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 20, 21, 23])
def test_a_repeated_prompt_computes_its_last_token(num_tokens: int) -> None:
    engine = Engine()
    for name in "abc":
        message = make_submit(name, SYSTEM[:1] * num_tokens, 3)
        assert engine.run(message) == [0 if name == "a" else num_tokens - 1]


def test_what_was_found_is_counted() -> None:
    engine = Engine()
    for name in "ab":
        engine.run(make_submit(name, [*SYSTEM, 1], 1))
    metrics = engine.core.metrics()
    assert re.search(r"^vllm:prefix_cache_queries_total\{.*\} 42\.0$", metrics, re.MULTILINE)
    assert re.search(r"^vllm:prefix_cache_hits_total\{.*\} 20\.0$", metrics, re.MULTILINE)


def test_branches_share_what_they_have_in_common() -> None:
    engine = Engine()
    engine.run(make_submit("trunk", SYSTEM + [1] * 20, 1))
    assert engine.run(make_submit("early", SYSTEM[:9] + [2] * 20, 1)) == [9]
    assert engine.run(make_submit("late", SYSTEM + [1] * 15 + [3] * 9, 1)) == [35]
    assert engine.run(make_submit("other", [9, *SYSTEM], 1)) == [0]


def test_salts_share_nothing() -> None:
    engine = Engine()
    for salt, num_cached in [("", 0), ("a", 0), ("b", 0), ("a", 19), ("", 19)]:
        message = make_submit(f"{salt}{num_cached}", SYSTEM, 1, cache_salt=salt)
        assert engine.run(message) == [num_cached]


def test_the_end_of_a_conversation_is_gone_on_in() -> None:
    """Nobody owns its last block, so that nothing is copied."""
    engine = Engine()
    history: list[int] = []
    for turn in range(6):
        message = make_submit(str(turn), [*history, *SYSTEM[: 5 + turn]], 4 + turn)
        assert engine.run(message) == [max(len(history) - 1, 0)]
        history = message.prompt_token_ids + engine.answer(message)
    assert engine.num_copied_tokens == 0


def test_two_ends_of_one_conversation_are_copies() -> None:
    """Its last block, of 3 tokens, is gone on in by the first of the two; the other one copies them. Both stay."""
    engine = Engine()
    engine.run(make_submit("trunk", SYSTEM[:11], 1))
    pair = [make_submit(str(i), SYSTEM[:11] + [i] * 7, 3) for i in range(2)]
    assert engine.run(*pair) == [11, 11]
    assert engine.num_copied_tokens == 3
    assert [
        engine.run(make_submit(f"{i} again", message.prompt_token_ids, 1))[0] for i, message in enumerate(pair)
    ] == [
        17,
        17,
    ]


def test_a_copy_does_not_take_the_last_block() -> None:
    """The second prompt needs all four; what it could copy a part of is one of them."""
    engine = Engine(num_blocks=4, max_batch_tokens=64)
    engine.run(make_submit("first", SYSTEM[:7], 1))
    assert engine.run(make_submit("second", SYSTEM[:6] + [1] * 8, 2)) == [4]
    assert engine.num_copied_tokens == 0


@pytest.mark.parametrize("lens", [(23, 23, 23, 23), (3, 3, 3), (21, 22, 23), (23, 22, 21), (22, 20, 23, 24)], ids=str)
def test_prompts_of_one_step_share_their_ends(lens: tuple[int, ...]) -> None:
    """Also what one of them is copying itself."""
    engine = Engine(max_batch_tokens=64)
    messages = [make_submit(str(i), [*range(100, 100 + size)], 5, seed=i) for i, size in enumerate(lens)]
    engine.submit(*messages)
    engine.step()
    longest = 0
    for message, size in zip(messages, lens, strict=True):
        num_shared = min(longest, size - 1)
        longest = max(longest, size)
        assert engine.runner.in_flight is not None
        row = next(row for row in engine.runner.in_flight.rows if row.request.request_id == message.request_id)
        assert (row.start_pos, row.end_pos) == (num_shared, size)
    assert engine.num_copied_tokens > 0
    engine.run()
    for message in messages:
        engine.collector.check(message)


def test_requests_of_one_step_share() -> None:
    engine = Engine(max_batch_tokens=64)
    messages = [make_submit(name, [*SYSTEM, i], 5, seed=i) for i, name in enumerate("abcd")]
    engine.submit(*messages)
    engine.step()
    assert engine.num_computed_tokens == 21 + 3
    assert engine.run() == []
    assert [engine.num_cached(message) for message in messages] == [0, 20, 20, 20]


def test_prompts_that_are_computed_side_by_side_share() -> None:
    """Clients take turns, so both prompts are open at once: each goes on from the farthest point of both."""
    engine = Engine(max_batch_tokens=16)
    messages = [make_submit(name, [7] * 150 + [i], 5, client=name) for i, name in enumerate("ab")]
    engine.run(*messages)
    assert engine.num_computed_tokens <= 151 + 16 + 2 * 4


def test_a_cancelled_prompt_leaves_what_it_has_computed() -> None:
    engine = Engine(max_batch_tokens=16)
    engine.submit(make_submit("gone", [1] * 100, 5))
    engine.step()
    engine.step()
    assert engine.core.cancel(API, "gone")
    assert engine.run(make_submit("next", [1] * 100, 5)) == [32]


def test_a_full_pool_drops_what_was_used_longest_ago() -> None:
    engine = Engine(num_blocks=16)
    old, new = make_submit("old", [1] * 28, 1), make_submit("new", [2] * 28, 1)
    engine.run(old)
    engine.run(new)
    assert engine.run(make_submit("again", old.prompt_token_ids, 1)) == [27]
    engine.run(make_submit("third", [3] * 20, 1))
    assert engine.run(make_submit("kept", old.prompt_token_ids, 1)) == [27]
    assert engine.run(make_submit("partly dropped", new.prompt_token_ids, 1))[0] < 24


@pytest.mark.parametrize("sizes", [{"num_blocks": 16}, {"num_blocks": 200, "num_snapshots": 4}], ids=str)
def test_a_client_that_floods_the_cache_drops_its_own(sizes: dict[str, int]) -> None:
    engine = Engine(**sizes)
    engine.run(make_submit("quiet", [1] * 21, 1, client="quiet"))
    for i in range(20):
        engine.run(make_submit(f"flood {i}", [2 + i] * 21, 1, client="flood"))
    assert engine.run(make_submit("back", [1] * 21, 1, client="quiet")) == [20]


def test_a_preempted_request_finds_its_own_blocks() -> None:
    engine = Engine(num_blocks=9, max_batch_tokens=64)
    messages = [make_submit(name, [i] * 11, 8, seed=i) for i, name in enumerate("ab")]
    assert engine.run(*messages) == [0, 0]  # what it had computed itself does not count as cached
    assert engine.num_computed_tokens < 2 * 18 + 11


def test_what_a_failed_step_had_is_not_used() -> None:
    engine = Engine()
    engine.run(make_submit("before", SYSTEM, 1))
    engine.submit(make_submit("fails", [5] * 10, 3))
    engine.runner.fail_at.add(engine.runner.num_steps + 1)
    with pytest.raises(RuntimeError):
        engine.step()
    engine.collector.take(engine.core.fail_step())
    assert engine.run(make_submit("after", SYSTEM, 1)) == [0]


def test_recurrent_states_are_restored() -> None:
    engine = Engine(RECURRENT)
    first = make_submit("first", [*SYSTEM, 1, 2, 3], 1)
    assert engine.run(first) == [0]
    assert engine.run(make_submit("same", first.prompt_token_ids, 1)) == [20]
    assert engine.run(make_submit("longer", first.prompt_token_ids + [4] * 30, 1)) == [20]
    assert engine.run(make_submit("shorter", SYSTEM[:18], 1)) == [0]  # blocks are there, but no state
    assert engine.run(make_submit("shorter too", SYSTEM[:18], 1)) == [16]


def test_a_second_turn_goes_on_from_the_state_in_the_answer() -> None:
    engine = Engine(RECURRENT)
    first = make_submit("first", [*SYSTEM, 1, 2, 3], 60)
    engine.run(first)
    history = first.prompt_token_ids + engine.answer(first)  # 83 tokens
    assert engine.run(make_submit("second", [*history, 4, 5], 1)) == [64]
    assert engine.run(make_submit("retry", [*first.prompt_token_ids, 4, 5], 1)) == [20]


def test_a_state_is_saved_where_prompts_part() -> None:
    engine = Engine(RECURRENT)
    prompts = [SYSTEM + [i] * 20 for i in range(3)]
    assert [engine.run(make_submit(str(i), prompt, 1))[0] for i, prompt in enumerate(prompts)] == [0, 0, 20]


def test_requests_wait_for_the_state_that_another_computes() -> None:
    engine = Engine(RECURRENT, max_batch_tokens=64)
    messages = [make_submit(name, [*SYSTEM, 1, i], 5, seed=i) for i, name in enumerate("abcd")]
    assert engine.run(*messages) == [0, 20, 20, 20]


def test_no_step_is_cut_for_a_small_gain() -> None:
    engine = Engine(RECURRENT, max_batch_tokens=64)
    engine.submit(make_submit("short", SYSTEM[:15], 5))
    engine.step()
    assert engine.num_computed_tokens == 15
    engine.submit(make_submit("long", SYSTEM, 5))
    engine.step()
    assert engine.num_computed_tokens == 15 + 1 + 16


def test_states_of_the_past_are_bounded() -> None:
    engine = Engine(1)
    first, second = make_submit("first", [1] * 20, 1), make_submit("second", [2] * 20, 1)
    engine.run(first)
    engine.run(second)
    assert engine.run(make_submit("second again", second.prompt_token_ids, 1)) == [16]
    assert engine.run(make_submit("first again", first.prompt_token_ids, 1)) == [0]
    assert Engine(0).run(first, second) == [0, 0]


@pytest.mark.parametrize("num_snapshots", [ATTENTION, RECURRENT])
@pytest.mark.parametrize("num_tokens", [2, 20])
def test_values_that_are_no_numbers_are_not_shared(num_snapshots: int | None, num_tokens: int) -> None:
    engine = Engine(num_snapshots)
    engine.runner.invalid.add("poisoned")
    engine.submit(make_submit("poisoned", SYSTEM[:num_tokens], 5))
    while engine.core.has_work:
        engine.step()
    failed = engine.collector.ends["poisoned"]
    assert isinstance(failed, wire.Failed) and failed.code == "invalid_logits"
    assert engine.run(make_submit("next", SYSTEM[:num_tokens], 1)) == [0]
