"""Anthropic's answers: what the SDK's accumulator and types make of them. `test_golden` has them byte for byte."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import httpx2
import msgspec
import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from mlx_server.api.anthropic.messages import MessageWriter
from mlx_server.api.anthropic.types import MessagesRequest
from mlx_server.api.errors import ErrorReply
from mlx_server.chat.types import (
    Done,
    Event,
    PromptProgress,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)

PROGRESS = PromptProgress(10, 4, 10, 0.1)
TOOL_CALL = [ToolCallStart(0, "call_1", "f"), ToolCallDelta(0, '{"a"'), ToolCallDelta(0, ":1}")]


def done(finish_reason: Any = "stop", num_output_tokens: int = 3, stop_sequence: str | None = None) -> Done:
    return Done(finish_reason, Usage(10, num_output_tokens, 4, 1), stop_sequence)


def writer(max_tokens: int = 64, **fields: Any) -> MessageWriter:
    body = {"model": "default", "max_tokens": max_tokens, "messages": [{"role": "user", "content": "Hi"}]} | fields
    writer = MessageWriter(msgspec.json.decode(msgspec.json.encode(body), type=MessagesRequest), "req_1")
    writer._id = "msg_1"
    return writer


def stream(events: Sequence[Event], **fields: Any) -> bytes:
    it = writer(**fields)
    return it.start() + b"".join(it.events([event]) for event in events) + it.end()


def parse(sse: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each valid by the SDK's own types."""
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    events = []
    for block in sse.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        adapter.validate_python(event, strict=True)
        events.append(event)
    return events


def accumulate(sse: bytes) -> Message:
    """What the SDK's streaming helper makes of a stream."""

    def answer(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=sse)

    parse(sse)
    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    hello: list[Any] = [{"role": "user", "content": "Hi"}]
    with (
        Anthropic(api_key="none", http_client=http) as client,
        client.messages.stream(model="default", max_tokens=64, messages=hello) as stream,
    ):
        return stream.get_final_message()


@pytest.mark.parametrize(
    "events",
    [
        [TextDelta("Hello"), done()],
        [done(num_output_tokens=1)],
        [ReasoningDelta("a"), ReasoningDelta("b"), TextDelta("c"), done()],
        [TextDelta("I look."), *TOOL_CALL, ToolCallStart(1, "call_2", "g"), done("tool_calls")],
        [TextDelta("before"), *TOOL_CALL, TextDelta("after"), done("tool_calls")],
        [TextDelta("cut"), done("length", 64)],
        [TextDelta("cut"), done("stop", 3, "STOP")],
    ],
)
def test_a_stream_and_a_whole_answer_say_the_same(events: list[Event]) -> None:
    whole = Message.model_validate_json(writer().fold([PROGRESS, *events]), strict=True)
    streamed = accumulate(stream([PROGRESS, *events]))
    assert streamed.model_dump(exclude={"content"}) == whole.model_dump(exclude={"content"})
    assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
    assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (6, 4)


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (done(), ("end_turn", None)),
        (done("stop", 3, "END"), ("stop_sequence", "END")),
        (done("length", 64), ("max_tokens", None)),
        (done("length", 40), ("model_context_window_exceeded", None)),
        (done("tool_calls"), ("tool_use", None)),
    ],
)
def test_stop_reasons(last: Done, expected: tuple[str, str | None]) -> None:
    whole = json.loads(writer().fold([TextDelta("x"), last]))
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected


def test_thoughts_can_be_omitted() -> None:
    events: Iterable[Event] = [PROGRESS, ReasoningDelta("secret"), TextDelta("Hi"), done()]
    fields: dict[str, Any] = {"thinking": {"type": "adaptive", "display": "omitted"}}
    sse = stream(list(events), **fields)
    assert b"secret" not in sse
    assert accumulate(sse).content[0].to_dict() == {"type": "thinking", "thinking": "", "signature": "unsigned"}


def test_max_tokens_of_0_only_fills_the_cache() -> None:
    whole = json.loads(writer(max_tokens=0).fold([PROGRESS, TextDelta("x"), done("length", 1)]))
    assert (whole["content"], whole["stop_reason"], whole["usage"]["output_tokens"]) == ([], "max_tokens", 0)


def test_an_error_in_a_stream_is_an_event_of_the_api() -> None:
    reply = ErrorReply(503, "server_error", "The engine died.", None, "engine_died")
    assert writer().error(reply).decode() == (
        'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"The engine died.",'
        '"details":{"error_code":"engine_died"}},"request_id":"req_1"}\n\n'
    )


def test_silence_is_filled_with_pings() -> None:
    assert writer().keep_alive() == b'event: ping\ndata: {"type":"ping"}\n\n'
