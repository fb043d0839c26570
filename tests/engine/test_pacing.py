"""How the share of prompts in a step follows what steps take."""

import pytest

from engine.test_fairness import submit_all
from engine.test_scheduler import make_core, make_submit
from mlx_server.engine.batch import Batch, BatchRow
from mlx_server.engine.pacing import FREE_STEPS, GRANULE, MIN_TOKENS, PERIOD, SLOWDOWN, PrefillPacer
from mlx_server.engine.request import Request
from mlx_server.sampling_params import SamplingParams


def batch(num_decodes: int, num_prefill_tokens: int) -> Batch:
    request = Request("a", b"", [1] * 10_000, 9, frozenset(), SamplingParams())
    rows = [BatchRow(request, 5, 6, True, is_decode=True) for _ in range(num_decodes)]
    return Batch([*rows, BatchRow(request, 0, num_prefill_tokens, False)] if num_prefill_tokens else rows)


def observe(pacer: PrefillPacer, num_decodes: int, num_prefill_tokens: int, duration_s: float) -> None:
    """A step like the one before it."""
    step = batch(num_decodes, num_prefill_tokens)
    pacer.observe(step, step, duration_s)


def allowed(pacer: PrefillPacer, num_decodes: int) -> int:
    """Prompt tokens in the next step that is not kept free of them."""
    return next(n for _ in range(FREE_STEPS + 1) if (n := pacer.max_prefill_tokens(num_decodes)))


def test_decodes_are_looked_at_first_and_then_prompts_begin_small() -> None:
    pacer = PrefillPacer()
    assert [pacer.max_prefill_tokens(8) for _ in range(FREE_STEPS)] == [0] * FREE_STEPS
    observe(pacer, 8, 0, 0.030)
    assert pacer.max_prefill_tokens(8) == GRANULE


def test_a_mixed_step_takes_about_the_allowed_time() -> None:
    pacer = PrefillPacer()
    decode_s, token_s = 0.030, 0.0004

    def duration_s(num_tokens: int) -> float:
        return decode_s + token_s * num_tokens

    observe(pacer, 8, 0, decode_s)
    for _ in range(2 * PERIOD):
        num_tokens = pacer.max_prefill_tokens(8)
        observe(pacer, 8, num_tokens, duration_s(num_tokens))
    num_tokens = allowed(pacer, 8)
    assert num_tokens % GRANULE == 0
    assert duration_s(num_tokens) <= SLOWDOWN * decode_s < duration_s(num_tokens + GRANULE)


def test_prompts_always_go_on() -> None:
    pacer = PrefillPacer()
    observe(pacer, 1, 0, 0.001)
    observe(pacer, 0, 100, 100.0)
    assert allowed(pacer, 1) == MIN_TOKENS


def test_a_machine_that_becomes_slower_is_noticed_during_a_long_prompt() -> None:
    """Else all of the slowness would be blamed on the prompt, which would stand still."""
    pacer = PrefillPacer()
    for slowness in (1, 10):
        for _ in range(20 * PERIOD):
            num_tokens = pacer.max_prefill_tokens(8)
            observe(pacer, 8, num_tokens, slowness * (0.030 + 0.0004 * num_tokens))
        assert 64 <= allowed(pacer, 8) <= 96


def test_it_does_not_matter_which_of_two_steps_a_pause_belongs_to() -> None:
    """The launch of a step waits for the one before, or for most of itself."""
    for waits_for_itself in (False, True):
        pacer = PrefillPacer()
        observe(pacer, 8, 0, 0.030)
        last = 0
        for _ in range(20 * PERIOD):
            num_tokens = pacer.max_prefill_tokens(8)
            duration_s = 0.030 + 0.0004 * (num_tokens if waits_for_itself else last)
            pacer.observe(batch(8, last), batch(8, num_tokens), duration_s)
            last = num_tokens
        assert 64 <= allowed(pacer, 8) <= 96


def test_one_odd_step_changes_little() -> None:
    pacer = PrefillPacer()
    for _ in range(10):
        observe(pacer, 4, 0, 0.02)
        observe(pacer, 4, 64, 0.03)
    before = allowed(pacer, 4)
    observe(pacer, 4, 64, 60.0)
    assert before / 2 <= allowed(pacer, 4) <= before


@pytest.mark.parametrize(("num_seen", "wanted"), [(1, 8), (8, 1)])
def test_the_closest_number_of_decodes_counts(num_seen: int, wanted: int) -> None:
    pacer = PrefillPacer()
    observe(pacer, num_seen, 0, 0.064)
    observe(pacer, 0, 32, 0.032)
    assert allowed(pacer, wanted) == (SLOWDOWN - 1) * 64


def test_prompts_fill_the_step_when_nothing_decodes_and_less_beside_decodes() -> None:
    core, runner = make_core(max_batch_tokens=64, context=1000, num_blocks=1000, pacer=PrefillPacer())
    submit_all(core, make_submit("a", [1], 40))
    for _ in range(1 + FREE_STEPS):
        core.step()
    submit_all(core, make_submit("b", [1] * 100, 2))
    core.step()
    assert runner.in_flight is not None
    assert [row.num_tokens for row in runner.in_flight.rows] == [1, GRANULE]
    core.cancel(b"api-1", "a")
    core.step()
    assert runner.in_flight is not None
    assert [row.num_tokens for row in runner.in_flight.rows] == [64]
