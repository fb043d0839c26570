"""Calls of tools and thoughts among a generation's events."""

from collections.abc import Iterator
from typing import Any

import pytest

from fake_engine import Backend, PlainTemplate, answer, endless, fake_model, until
from generations import collect, start
from mlx_server.chat.generation import Generation
from mlx_server.chat.output_router import join
from mlx_server.chat.reasoning import Tags
from mlx_server.chat.tool_parsers import TOOL_PARSERS
from mlx_server.chat.types import (
    ChatMessage,
    ChatRequest,
    Done,
    Event,
    Reasoning,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCallDelta,
    ToolCallStart,
    ToolChoice,
    Usage,
)
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import RequestOutput, Submit

# --- tools ---

TOOLS = [Tool(name="f", parameters={"type": "object", "properties": {"x": {"type": "string"}}}), Tool(name="g")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'


def test_calls_are_events(backend: Backend) -> None:
    backend.engine.script = answer(f"Let me see.\n{CALL}")
    events = join(start(backend, tools=TOOLS, max_tokens=80))
    first, called, arguments, done = events
    assert first == TextDelta("Let me see.")
    assert isinstance(called, ToolCallStart)
    assert (called.name, called.call_index) == ("f", 0)
    assert arguments == ToolCallDelta(0, '{"x": "é"}')
    assert isinstance(done, Done)
    assert done.finish_reason == "tool_calls"
    assert bytes(backend.engine.submits[0].prompt_token_ids) == b"tools: f, g\nuser: hi\n"


def test_a_call_that_is_cut_ends_by_length(backend: Backend) -> None:
    backend.engine.script = answer(CALL)
    *_, arguments, done = join(start(backend, tools=TOOLS, max_tokens=45))
    assert isinstance(arguments, ToolCallDelta)
    assert isinstance(done, Done)
    assert done.finish_reason == "length"


def test_no_tools_no_calls(backend: Backend) -> None:
    backend.engine.script = answer(CALL)
    for changes in ({}, {"tools": TOOLS, "tool_choice": ToolChoice("none")}):
        assert collect(start(backend, max_tokens=90, **changes))[0] == CALL


def test_one_call_at_most(backend: Backend) -> None:
    backend.engine.script = answer('<tool_call>{"name":"g"}</tool_call>' * 2)
    events = list(start(backend, tools=TOOLS, parallel_tool_calls=False, max_tokens=99))
    assert sum(isinstance(event, ToolCallStart) for event in events) == 1
    assert isinstance(events[-1], Done)
    assert events[-1].finish_reason == "tool_calls"
    until(lambda: backend.engine.cancelled)


def test_tools_that_are_not_allowed_are_not_called(backend: Backend) -> None:
    backend.engine.script = answer(CALL)
    text, done = collect(start(backend, tools=TOOLS, tool_choice=ToolChoice("auto", ["g"]), max_tokens=90))
    assert (text, done.finish_reason) == (CALL, "stop")


@pytest.mark.parametrize(
    "tools, choice", [([], ToolChoice("required")), (TOOLS, ToolChoice("auto", ["h"])), ([], ToolChoice("auto", ["f"]))]
)
def test_choices_that_can_not_be_met(backend: Backend, tools: list[Tool], choice: ToolChoice) -> None:
    with pytest.raises(InvalidRequestError) as error:
        start(backend, tools=tools, tool_choice=choice)
    assert error.value.param == "tool_choice"


def test_a_name_that_the_format_can_not_write_is_refused(backend: Backend) -> None:
    model = fake_model(tool_parser=TOOL_PARSERS["qwen3_coder"])
    request = ChatRequest(
        messages=[ChatMessage(role="user", content="hi")],
        tools=[Tool(name="a b")],
        sampling=SamplingParams(seed=1),
        max_tokens=5,
    )
    with pytest.raises(InvalidRequestError, match="'a b'") as error:
        Generation(model, backend.client, request, 30.0)
    assert error.value.param == "tools"


def test_a_call_that_must_come_is_a_grammar(backend: Backend) -> None:
    backend.engine.script = answer(CALL)
    list(start(backend, tools=TOOLS, tool_choice=ToolChoice("required")))
    list(start(backend, tools=TOOLS))
    required, auto = backend.engine.submits
    assert required.grammar is not None
    assert auto.grammar is None


# --- reasoning ---

THINKING = {"reasoning_tags": Tags("<think>", "</think>")}


def think(backend: Backend, *, model: dict[str, Any] | None = None, **changes: Any) -> list[Event]:
    fields: dict[str, Any] = {"sampling": SamplingParams(seed=1), "max_tokens": 60}
    request = ChatRequest(**({"messages": [ChatMessage(role="user", content="hi")]} | fields | changes))
    return join(Generation(fake_model(**THINKING, **(model or {})), backend.client, request, 30.0))


def test_thoughts_are_events_and_counted(backend: Backend) -> None:
    backend.engine.script = answer("<think>\nHm.\n</think>\n\nHi.")
    *deltas, done = think(backend)
    assert deltas == [ReasoningDelta("Hm."), TextDelta("Hi.")]
    assert isinstance(done, Done)
    # One byte a token: of the opening tag, only the last is known to be one.
    assert done.usage.num_reasoning_tokens == len(">\nHm.\n</think>")


class OpeningTemplate(PlainTemplate):
    """A template that begins the thoughts."""

    def render(self, messages: Any, **kwargs: Any) -> str:
        return super().render(messages, **kwargs) + "<think>\n"


def test_thoughts_that_the_template_begins(backend: Backend) -> None:
    backend.engine.script = answer("Hm.\n</think>\n\nHi.")
    assert think(backend, model={"template": OpeningTemplate()})[:2] == [ReasoningDelta("Hm."), TextDelta("Hi.")]


def test_a_budget_closes_the_thoughts(backend: Backend) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        closed = submit.prompt_token_ids[-11:] == list(b"\n</think>\n\n")
        return answer("Hi.", num_cached=3)(submit) if closed else endless(submit)

    backend.engine.script = script
    template = {"template": OpeningTemplate()}
    *deltas, done = think(backend, model=template, reasoning=Reasoning(budget_tokens=5))
    assert deltas == [ReasoningDelta("xxxxx"), TextDelta("Hi.")]
    first, second = backend.engine.submits
    assert second.prompt_token_ids == [*first.prompt_token_ids, *b"xxxxx\n</think>\n\n"]
    assert second.max_tokens == first.max_tokens - 16
    assert isinstance(done, Done)
    assert (done.finish_reason, done.usage) == ("stop", Usage(len(first.prompt_token_ids), 16 + 4, 3, 16))
    until(lambda: backend.engine.cancelled == [first.request_id])


def test_a_budget_that_leaves_no_room_ends_by_length(backend: Backend) -> None:
    backend.engine.script = endless
    *_, done = think(
        backend, model={"template": OpeningTemplate()}, reasoning=Reasoning(budget_tokens=5), max_tokens=16
    )
    assert isinstance(done, Done)
    assert done.finish_reason == "length"
    assert len(backend.engine.submits) == 1


@pytest.mark.parametrize("reasoning", [Reasoning(enabled=False), Reasoning(effort="none"), Reasoning(budget_tokens=0)])
def test_no_thoughts_where_the_template_begins_them(backend: Backend, reasoning: Reasoning) -> None:
    backend.engine.script = answer("Hi.")
    *deltas, _ = think(backend, model={"template": OpeningTemplate()}, reasoning=reasoning)
    assert deltas == [TextDelta("Hi.")]
    assert bytes(backend.engine.submits[0].prompt_token_ids).endswith(b"<think>\n</think>\n\n")


def test_effort_is_a_share_of_the_answer(backend: Backend) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        yield from (answer("Hi.") if backend.engine.submits[1:] else endless)(submit)

    backend.engine.script = script
    *deltas, _ = think(backend, model={"template": OpeningTemplate()}, reasoning=Reasoning(effort="low"), max_tokens=50)
    assert deltas == [ReasoningDelta("x" * 10), TextDelta("Hi.")]
