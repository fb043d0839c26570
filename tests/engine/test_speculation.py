"""Drafts change no token, whatever they are; and when they are tried."""

import random
import re

import pytest

from engine.guesses import Guesses, known_answers
from engine.test_runner import GREEDY, directory, fixture, generate, make_core, model, seeded  # noqa: F401
from engine.test_scheduler import API, Collector, alone, make_submit
from engine.test_scheduler import make_core as make_fake_core
from fakes import FAKE_VOCAB_SIZE, fake_next_token
from mlx_server import wire
from mlx_server.engine.batch import Batch, BatchRow
from mlx_server.engine.core import EngineCore
from mlx_server.engine.prompt_lookup import PromptLookup
from mlx_server.engine.request import Request
from mlx_server.engine.speculation import MAX_DRAFTS, Speculator
from mlx_server.sampling_params import SamplingParams


def counts(core: EngineCore) -> dict[str, float]:
    """What the metrics say of drafts."""
    found = re.findall(r"^vllm:spec_decode_num_(\w+)_total{.*} ([0-9.]+)$", core.metrics(), re.MULTILINE)
    return {name: float(value) for name, value in found}


# --- Real models ---


@pytest.mark.parametrize(("num_blocks", "max_batch_tokens"), [(64, 64), (7, 64), (64, 9)])
def test_drafts_change_no_token(model, num_blocks: int, max_batch_tokens: int) -> None:  # noqa: F811
    """Greedy and seeded, together, cached, and computed again after they made room for each other."""
    messages = seeded(model)
    answers = generate(make_core(model), *messages)
    core = make_core(
        model,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        speculator=known_answers(answers, model.vocab_size),
    )
    for _ in range(2):
        assert generate(core, *messages, stagger=1) == answers
    assert 0 < counts(core)["accepted_tokens"] < counts(core)["draft_tokens"]


def test_lookup_finds_what_a_model_repeats(model, fixture) -> None:  # noqa: F811
    """Its own drafts, with a device that computes many tokens as fast as one."""
    three_tokens = dict.fromkeys([3, 4, 5], 1000.0)  # in turn, as the newest two are penalized
    biased = SamplingParams(temperature=0.0, logit_bias=three_tokens, frequency_penalty=100.0, penalty_window=2)
    messages = [
        wire.Submit("plain", fixture["prompt"], 32, [], GREEDY),
        wire.Submit("repeats", fixture["prompt"], 60, [], biased),
    ]
    answers = generate(make_core(model), *messages)
    core = make_core(model, speculator=FreeDrafts())
    assert generate(core, *messages) == answers
    assert counts(core)["accepted_tokens"] > 5


class FreeDrafts(Speculator):
    """A step always takes the same time."""

    def observe(self, previous: Batch, launched: Batch, duration_s: float) -> None:
        super().observe(previous, launched, 1.0)


# --- Where a request ends ---


class Highest(random.Random):
    """As many drafts as there may be, all right."""

    def random(self) -> float:
        return 0.0

    def randint(self, a: int, b: int) -> int:
        return b


def right_drafts() -> Guesses:
    return Guesses(Highest(), lambda request, tokens: fake_next_token(tokens, request.sampling.seed), FAKE_VOCAB_SIZE)


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 9, 17])
def test_drafts_stop_at_max_tokens(max_tokens: int) -> None:
    core, runner = make_fake_core(speculator=right_drafts())
    message = make_submit("a", [1, 2, 3], max_tokens)
    assert core.submit(API, message) is None
    collector = Collector()
    collector.run_until_idle(core)
    collector.check(message)
    assert counts(core)["accepted_tokens"] == counts(core)["draft_tokens"]
    assert runner.num_steps <= 4 + 2 * (max_tokens // (MAX_DRAFTS + 1))


@pytest.mark.parametrize("end_at", range(1, 12))
def test_nothing_follows_an_end_token_among_drafts(end_at: int) -> None:
    tokens, _, _ = alone(make_submit("a", [1, 2, 3], 30))
    message = make_submit("a", [1, 2, 3], 30, end=(tokens[end_at],))
    core, _ = make_fake_core(speculator=right_drafts())
    assert core.submit(API, message) is None
    collector = Collector()
    collector.run_until_idle(core)
    collector.check(message)
    assert collector.tokens["a"] == tokens[:end_at]


# --- Lookup ---


def looked_up(prompt: list[int], drawn: list[int]) -> PromptLookup:
    lookup = PromptLookup()
    lookup.extend(prompt, drawn=False)
    lookup.extend(drawn, drawn=True)
    return lookup


def test_lookup_goes_on_where_the_newest_tokens_stood_before() -> None:
    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2], [3]).drafts(3) == (4, 5, 9)
    assert looked_up([1, 2, 3, 4, 5], [7]).drafts(3) == ()
    assert looked_up([], []).drafts(3) == ()


def test_three_tokens_win_over_two_and_newer_ones_over_older() -> None:
    assert looked_up([1, 2, 3, 4, 7, 2, 3, 5, 1, 2], [3]).drafts(1) == (4,)
    assert looked_up([2, 3, 4, 2, 3, 5, 8, 2], [3]).drafts(1) == (5,)


def test_token_zero_is_a_token() -> None:
    assert looked_up([0, 1, 2, 6, 1, 2, 7, 0, 1], [2]).drafts(1) == (6,)


def test_lookup_goes_round_in_a_circle() -> None:
    assert looked_up([5, 1, 2, 1, 2], []).drafts(5) == (1, 2, 1, 2, 1)


def test_chances_rise_with_hits_and_fall_with_misses() -> None:
    text = list(range(100))
    lookup = looked_up([*text, 0, 1], [])
    before = lookup.chances(4)
    assert before == sorted(before, reverse=True) and len(before) == 4
    assert lookup.chances(3, num_unknown=1) == before[1:]
    lookup.extend(text[2:60], drawn=True)
    assert lookup.drafts(2) == (60, 61)
    assert lookup.chances(4)[3] > 0.8
    lookup = looked_up([*text, 0, 1], [])
    for i in range(0, 90, 3):
        lookup.extend([200 + i, i, i + 1], drawn=True)
    assert lookup.chances(1)[0] < 0.1


# --- When drafts are tried ---


def request_in_copy() -> Request:
    """It has been repeating its prompt for a while."""
    text = list(range(60))
    request = Request("a", b"", [*text, 0, 1], 100, frozenset(), SamplingParams())
    request.output_token_ids += text[2:40]
    return request


def step(num_drafts: int = 0) -> Batch:
    drafts = (0,) * num_drafts
    return Batch([BatchRow(request_in_copy(), 5, 6 + num_drafts, True, draft_token_ids=drafts, is_decode=True)])


def speculator_of(draft_step_s: float) -> Speculator:
    speculator = Speculator()
    for _ in range(20):
        speculator.observe(step(), step(), 1.0)
        speculator.observe(step(MAX_DRAFTS), Batch([]), draft_step_s)
    return speculator


def test_drafts_are_tried_where_they_pay() -> None:
    drafts = speculator_of(2.0).plan([request_in_copy()], [MAX_DRAFTS])
    assert drafts == [tuple(range(40, 40 + MAX_DRAFTS))]
    assert speculator_of(9.0).plan([request_in_copy()], [2]) == [(40, 41)]
    dear = speculator_of(9.0)
    for num_drafts in 1, 3:
        for _ in range(20):
            dear.observe(step(num_drafts), Batch([]), 9.0)
    assert dear.plan([request_in_copy()], [MAX_DRAFTS]) == [()]


def test_no_drafts_before_a_plain_step_is_known_nor_over_the_limit() -> None:
    assert Speculator().plan([request_in_copy()], [MAX_DRAFTS]) == [()]
    assert speculator_of(1.5).plan([request_in_copy()], [0]) == [()]


def test_many_requests_share_the_rows_that_there_is_memory_for() -> None:
    speculator = Speculator()
    for num_decodes in 4, 16, 32:
        requests = [request_in_copy() for _ in range(num_decodes)]
        rows = [BatchRow(request, 5, 6, True, is_decode=True) for request in requests]
        speculator.observe(Batch(rows), Batch(rows), 1.0)
        plan = speculator.plan(requests, [MAX_DRAFTS] * num_decodes)
        assert plan is not None and num_decodes + sum(map(len, plan)) <= 32


def test_the_step_in_flight_is_read_first() -> None:
    request = request_in_copy()
    request.num_in_flight_tokens = 1
    assert speculator_of(2.0).plan([request], [MAX_DRAFTS]) is None
    assert speculator_of(9.0).plan([request], [0]) == [()]


def test_a_cost_that_forbids_drafts_is_measured_again() -> None:
    speculator, request = speculator_of(30.0), request_in_copy()
    for num_drafts in 1, 3:
        for _ in range(20):
            speculator.observe(step(num_drafts), Batch([]), 30.0)
    plans = [speculator.plan([request], [MAX_DRAFTS]) for _ in range(300)]
    assert plans[0] == [()] and plans[-1] != [()]
