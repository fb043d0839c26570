"""Grammars on a real (tiny) model with random weights: what it writes is noise, but noise of the right form."""

import json
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from engine.guesses import known_answers
from engine.test_runner import PARITY, OutOfMemory, make_core
from engine.test_scheduler import API, Collector, run_with_failures
from grammars import END, TinyGrammars, Vocabulary, text_of
from mlx_server import wire
from mlx_server.chat.grammar import text_grammar
from mlx_server.chat.types import Choice, JsonSchema, Lark, Regex
from mlx_server.engine.core import EngineCore
from mlx_server.engine.grammar import Grammars
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"},
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "colour", "count"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
PERSON = text_grammar(JsonSchema(schema=SCHEMA, param=""))
CODE = text_grammar(Regex(pattern="[a-f]{2}-[0-9]{3,5}", param=""))
LETTERS = text_grammar(Regex(pattern="[a-z ]+", param=""))  # any number of them
PROMPT = [70, 71, 72, 73, 74]


@pytest.fixture(scope="module", params=["llama", "qwen3_next"])
def model(request) -> Model:
    """Attention alone, and with recurrent layers."""
    return load_model(str(PARITY / request.param / "mlx-4bit"))


@pytest.fixture(scope="module")
def grammars(model: Model) -> Grammars:
    return TinyGrammars(model.vocab_size)  # fewer than the vocabulary has, for one of the models


@pytest.fixture
def core(model: Model, grammars: Grammars) -> EngineCore:
    return make_core(model, grammars=grammars)


def submit(name: str, grammar: str | None, max_tokens: int = 80, *, end: tuple[int, ...] = (END,), **params: Any):
    sampling = SamplingParams(**{"temperature": 1.0, "seed": len(name)} | params)
    return wire.Submit(
        name, PROMPT + [80 + ord(c) % 100 for c in name], max_tokens, list(end), sampling, grammar=grammar
    )


def run(core: EngineCore, *messages: wire.Submit) -> Collector:
    collector = Collector()
    for message in messages:
        assert core.submit(API, message) is None
    collector.run_until_idle(core)
    return collector


def finished(collector: Collector, name: str) -> wire.Finished:
    end = collector.ends[name]
    assert isinstance(end, wire.Finished), end
    return end


def is_person(text: str) -> bool:
    person = json.loads(text)
    return bool(
        list(person) == ["name", "colour", "count"]
        and re.fullmatch("[a-z]{0,5}", person["name"])
        and person["colour"] in ("red", "green")
        and 0 <= person["count"] <= 99
    )


CASES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "schema": (PERSON, is_person),
    "regex": (CODE, lambda text: re.fullmatch("[a-f]{2}-[0-9]{3,5}", text) is not None),
    "choice": (
        text_grammar(Choice(choices=["red", "green", "rebel"], param="")),
        ["red", "green", "rebel"].__contains__,
    ),
    "lark": (
        text_grammar(Lark(source='start: "(" start ")" | /[0-9]/', param="")),
        lambda text: re.fullmatch(r"\(*[0-9]\)*", text) is not None and text.count("(") == text.count(")"),
    ),
    "one text": (text_grammar(Choice(choices=["abcabc: true"], param="")), "abcabc: true".__eq__),
    "nothing": (text_grammar(Regex(pattern="", param="")), "".__eq__),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_output_matches(core: EngineCore, case: str, temperature: float) -> None:
    grammar, holds = CASES[case]
    messages = [submit(f"r{seed}", grammar, 200, temperature=temperature, seed=seed) for seed in range(4)]
    collector = run(core, *messages)
    for message in messages:
        end = finished(collector, message.request_id)
        if end.finish_reason == "stop":  # noise may open brackets until it is cut
            assert holds(text_of(collector.tokens[message.request_id]))
        else:
            assert case == "lark" and end.num_output_tokens == 200


def all_kinds() -> list[wire.Submit]:
    return [
        submit("plain", None, 30),
        submit("greedy", None, 30, temperature=0.0),
        submit("person", PERSON),
        submit("code", CODE, temperature=0.0),
        submit("letters", LETTERS, 25),
        submit("scored", PERSON, logprobs=2),
    ]


@pytest.fixture(scope="module")
def alone(model: Model, grammars: Grammars) -> dict[str, list[int]]:
    """What each gets that has the engine for itself."""
    messages = all_kinds()
    return {m.request_id: run(make_core(model, grammars=grammars), m).tokens[m.request_id] for m in messages}


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 9}, {"max_batch_tokens": 5}, {"max_running": 2}], ids=str)
@pytest.mark.parametrize("speculates", [False, True])
def test_company_changes_nothing(
    model: Model, grammars: Grammars, alone: dict[str, list[int]], limits: dict[str, int], speculates: bool
) -> None:
    """Also when requests are preempted, their prompts are cut into chunks, and those without a grammar have drafts."""
    drafts = known_answers(alone, model.vocab_size) if speculates else None
    collector = run(make_core(model, grammars=grammars, speculator=drafts, **limits), *all_kinds())
    assert collector.tokens == alone


@pytest.mark.parametrize("at", [1, 2, 3, 5, 9, 14])
def test_failed_steps_change_nothing(model: Model, grammars: Grammars, alone: dict[str, list[int]], at: int) -> None:
    core = make_core(OutOfMemory(model, at), grammars=grammars)  # type: ignore[arg-type]
    collector = Collector()
    for message in all_kinds():
        assert core.submit(API, message) is None
    run_with_failures(core, collector, MemoryError)
    assert collector.tokens == alone


def count_steps(core: EngineCore, message: wire.Submit) -> tuple[int, list[int]]:
    assert core.submit(API, message) is None
    collector, num_steps = Collector(), 0
    while core.has_work:
        collector.take(core.step())
        num_steps += 1
    return num_steps, collector.tokens[message.request_id]


def test_forced_tokens_take_no_step_of_their_own(core: EngineCore) -> None:
    grammar = text_grammar(Choice(choices=["xyzxyzxyzxyzxyzxyz", "Xyzxyzxyzxyzxyzxyz"], param=""))
    num_steps, token_ids = count_steps(core, submit("a", grammar))
    assert text_of(token_ids).lower() == "xyz" * 6 and len(token_ids) == 18
    assert num_steps <= 4


def test_forced_tokens_are_the_same_with_log_probabilities(core: EngineCore) -> None:
    plain = run(core, submit("a", PERSON)).tokens["a"]
    collector, scores = Collector(), []
    assert core.submit(API, submit("a", PERSON, logprobs=1)) is None
    while core.has_work:
        outputs = core.step()
        collector.take(outputs)
        for _, output in outputs:
            assert isinstance(output, wire.Tokens | wire.Finished)
            assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
            scores += output.logprobs
    assert collector.tokens["a"] == plain and len(scores) == len(plain)
    assert all(score.logprob < 0 for score in scores)  # of the model, not of what the grammar has left


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 9])
def test_max_tokens_bounds_forced_tokens_too(core: EngineCore, max_tokens: int) -> None:
    grammar = text_grammar(Choice(choices=["xyzxyzxyzxyz", "Xyzxyzxyzxyz"], param=""))
    end = finished(run(core, submit("a", grammar, max_tokens)), "a")
    assert (end.finish_reason, end.num_output_tokens) == ("length", max_tokens)


def test_a_grammar_without_end_is_bounded(core: EngineCore) -> None:
    grammar = text_grammar(Lark(source='start: "a" start | "b" start', param=""))
    end = finished(run(core, submit("a", grammar, 30)), "a")
    assert (end.finish_reason, end.num_output_tokens) == ("length", 30)


def test_an_endless_text_that_is_forced_is_too_much(core: EngineCore) -> None:
    collector = run(core, submit("a", text_grammar(Lark(source='start: "a" start', param=""))))
    failed = collector.ends["a"]
    assert isinstance(failed, wire.Failed) and "Too many items" in failed.message


def test_min_tokens_and_missing_end_tokens_leave_a_complete_output_alone(core: EngineCore) -> None:
    for message in submit("a", CODE, min_tokens=40), submit("a", CODE, end=()):
        collector = run(core, message)
        assert finished(collector, "a").finish_reason == "stop"
        assert CASES["regex"][1](text_of(collector.tokens["a"]))


def test_min_tokens_keeps_a_grammar_going(core: EngineCore) -> None:
    collector = run(core, submit("a", LETTERS, 60, min_tokens=20, logit_bias={END: 50.0}))
    end = finished(collector, "a")
    assert (end.num_output_tokens, end.stop_token_id) == (21, END)
    assert re.fullmatch("[a-z ]{20,}", text_of(collector.tokens["a"]))


def test_each_end_token_of_the_request_ends_an_output(core: EngineCore) -> None:
    end = finished(run(core, submit("a", LETTERS, 60, end=(END, 0), logit_bias={0: 90.0})), "a")
    assert (end.finish_reason, end.stop_token_id, end.num_output_tokens) == ("stop", 0, 2)


def test_cancel_in_the_middle(core: EngineCore) -> None:
    for num_steps in range(12):
        for message in submit("a", PERSON), submit("b", LETTERS, 10):
            assert core.submit(API, message) is None
        collector = Collector()
        for _ in range(num_steps):
            collector.take(core.step())
        core.cancel(API, "a")
        collector.run_until_idle(core)
        assert len(collector.tokens["b"]) == 10


def test_a_grammar_that_is_none_fails_its_request_only(core: EngineCore) -> None:
    collector = run(core, submit("a", "{}"), submit("b", CODE))
    failed = collector.ends["a"]
    assert isinstance(failed, wire.Failed) and failed.code == "invalid_grammar" and failed.message
    assert CASES["regex"][1](text_of(collector.tokens["b"]))


def test_without_a_usable_tokenizer_grammars_fail_and_the_rest_goes_on(model: Model) -> None:
    def broken() -> LLTokenizer:
        raise ValueError("no such model")

    core = make_core(model, grammars=Grammars(broken, model.vocab_size))
    for message in submit("a", CODE), submit("b", None, 5):
        assert core.submit(API, message) is None
    collector = Collector()
    while core.has_work:
        collector.take(core.step())
    failed = collector.ends["a"]
    assert isinstance(failed, wire.Failed) and failed.message.endswith("no such model")
    assert len(collector.tokens["b"]) == 5
    refused = make_core(model).submit(API, submit("a", CODE))
    assert refused is not None and refused.code == "invalid_request"


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(model: Model) -> None:
    may_begin, compiled = threading.Event(), []

    class Counting(Grammars):
        def _match(self, grammar: str) -> LLMatcher:
            compiled.append(grammar)
            return super()._match(grammar)

    def tokenizer() -> LLTokenizer:
        assert may_begin.wait(20)
        return LLTokenizer(TokenizerWrapper(Vocabulary()))

    core = make_core(model, grammars=Counting(tokenizer, model.vocab_size))
    for message in submit("a", CODE), submit("b", PERSON), submit("c", LETTERS, 5):
        assert core.submit(API, message) is None
    assert core.cancel(API, "b")
    may_begin.set()
    collector = Collector()
    while core.has_work:
        collector.take(core.step())
    assert compiled == [CODE, LETTERS] and set(collector.ends) == {"a", "c"}


class SlowGrammars(TinyGrammars):
    """Grammars that are compiled when the test says so."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.is_done = False

    def compile(self, grammar, end_token_ids):
        compiled = super().compile(grammar, end_token_ids)
        slow = self

        class Slow(type(compiled)):  # type: ignore[misc]
            @property
            def is_ready(self) -> bool:
                return slow.is_done

        compiled.__class__ = Slow
        return compiled


def test_nobody_waits_for_a_grammar_but_its_request(model: Model) -> None:
    grammars = SlowGrammars(model.vocab_size)
    core = make_core(model, grammars=grammars)
    collector = Collector()
    for message in submit("a", CODE), submit("b", None, 5), submit("c", CODE):
        assert core.submit(API, message) is None
    while "b" not in collector.ends:
        collector.take(core.step())
    core.step()
    assert core.awaits_grammars and core.has_work and not collector.tokens.get("a")
    assert core.cancel(API, "c")
    grammars.is_done = True
    assert not core.awaits_grammars
    collector.run_until_idle(core)
    assert CASES["regex"][1](text_of(collector.tokens["a"])) and "c" not in collector.ends
