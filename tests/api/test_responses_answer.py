"""The answers of /v1/responses: byte-exact streams, and what the SDK's own accumulator and types make of them."""

import json
from collections.abc import Sequence
from typing import Any

import httpx2
import msgspec
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from fake_engine import fake_model
from mlx_server.api.errors import ErrorReply
from mlx_server.api.openai.responses import ResponseWriter, new_response
from mlx_server.api.openai.responses_request import to_chat_request, to_items
from mlx_server.api.openai.responses_types import ResponsesRequest
from mlx_server.chat.types import (
    Done,
    Event,
    ReasoningDelta,
    ScoredToken,
    TextDelta,
    TokenLogprobs,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.wire import EngineInfo

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
TOOL_CALL: list[Event] = [ToolCallStart(0, "call_1", "f"), ToolCallDelta(0, '{"a"'), ToolCallDelta(0, ":1}")]
ID = "0" * 32


def done(finish_reason: Any = "stop") -> Done:
    return Done(finish_reason, Usage(10, 3, 4, 1))


def writer(**fields: Any) -> ResponseWriter:
    body = msgspec.json.decode(msgspec.json.encode({"model": "m", "input": "Hi"} | fields), type=ResponsesRequest)
    info = EngineInfo(100, 257, 1000, limited_by_memory=False)
    response = new_response(body, to_chat_request(body, to_items(body, None), fake_model(), info, 64))
    response.id, response.created_at = f"resp_{ID}", 1
    return ResponseWriter(response, lambda _: None)


def stream(events: Sequence[Event], **fields: Any) -> bytes:
    it = writer(**fields)
    return it.start() + b"".join(it.events([event]) for event in events) + it.end()


def parse(sse: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each valid by the SDK's own types."""
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    events = []
    for number, block in enumerate(sse.decode().strip().split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        adapter.validate_python(event, strict=True)
        events.append(event)
    return events


def accumulate(sse: bytes) -> dict[str, Any]:
    """What the SDK's streaming helper makes of a stream, without what it parses of the texts."""

    def answer(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=sse)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    with (
        OpenAI(api_key="none", http_client=http) as client,
        client.responses.stream(model="m", input="Hi") as stream,
    ):
        *_, last = stream
    final: Any = last
    response: dict[str, Any] = final.response.to_dict()
    for item in response["output"]:
        item.pop("parsed_arguments", None)
        for part in item.get("content") or []:
            part.pop("parsed", None)
    return response


RESPONSE = (
    '{{"id":"resp_00000000000000000000000000000000","object":"response","created_at":1,"status":"{status}",'
    '"completed_at":{completed_at},"background":false,"error":{error},"incomplete_details":{incomplete},'
    '"instructions":null,"max_output_tokens":null,"model":"m","output":{output},"parallel_tool_calls":true,'
    '"previous_response_id":null,"reasoning":{{"effort":null,"summary":null}},"service_tier":"default","store":true,'
    '"temperature":0.5,"text":{{"format":{{"type":"text"}}}},"tool_choice":"auto","tools":[],"top_logprobs":0,'
    '"top_p":1.0,"truncation":"disabled","usage":{usage},"metadata":{{}}}}'
)
USAGE = (
    '{"input_tokens":10,"input_tokens_details":{"cached_tokens":4,"cache_write_tokens":0},"output_tokens":3,'
    '"output_tokens_details":{"reasoning_tokens":1},"total_tokens":13}'
)


def whole(status: str, output: str = "", **changes: str) -> str:
    fields = {"completed_at": "null", "error": "null", "incomplete": "null", "usage": "null"} | changes
    return RESPONSE.format(status=status, output=f"[{output}]", **fields)


def frames(*events: tuple[str, str]) -> str:
    """Server-sent events, by type and the fields after it."""
    return "".join(
        f'event: {kind}\ndata: {{"type":"{kind}",{fields},"sequence_number":{number}}}\n\n'
        for number, (kind, fields) in enumerate(events)
    )


START = [
    ("response.created", f'"response":{whole("in_progress")}'),
    ("response.in_progress", f'"response":{whole("in_progress")}'),
]


def message(status: str, *content: str) -> str:
    return (
        f'{{"type":"message","id":"msg_{ID}_0","role":"assistant","status":"{status}","content":[{",".join(content)}]}}'
    )


def text_part(text: str) -> str:
    return f'{{"type":"output_text","text":"{text}","annotations":[],"logprobs":[]}}'


def message_events(pieces: Sequence[str], status: str) -> list[tuple[str, str]]:
    where, text = f'"item_id":"msg_{ID}_0","output_index":0,"content_index":0', "".join(pieces)
    return [
        ("response.output_item.added", f'"output_index":0,"item":{message("in_progress")}'),
        ("response.content_part.added", f'{where},"part":{text_part("")}'),
        *(("response.output_text.delta", f'{where},"delta":"{piece}","logprobs":[]') for piece in pieces),
        ("response.output_text.done", f'{where},"text":"{text}","logprobs":[]'),
        ("response.content_part.done", f'{where},"part":{text_part(text)}'),
        ("response.output_item.done", f'"output_index":0,"item":{message(status, text_part(text))}'),
    ]


def test_a_stream_of_text_is_exactly_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 2.5)
    sse = stream([TextDelta("Hel"), TextDelta("lo"), done()])
    final = whole("completed", message("completed", text_part("Hello")), completed_at="2", usage=USAGE)
    assert sse.decode() == frames(
        *START, *message_events(["Hel", "lo"], "completed"), ("response.completed", f'"response":{final}')
    )
    parse(sse)


def test_a_stream_that_is_cut_is_exactly_this() -> None:
    sse = stream([TextDelta("Hel"), done("length")])
    output = message("incomplete", text_part("Hel"))
    final = whole("incomplete", output, incomplete='{"reason":"max_output_tokens"}', usage=USAGE)
    assert sse.decode() == frames(
        *START, *message_events(["Hel"], "incomplete"), ("response.incomplete", f'"response":{final}')
    )
    parse(sse)


def test_a_stream_of_thoughts_and_a_call_is_exactly_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 2.5)
    sse = stream([ReasoningDelta("Hm."), *TOOL_CALL, done("tool_calls")])
    thoughts = f'{{"type":"reasoning","id":"rs_{ID}_0","summary":[],"content":[%s],"status":"%s"}}'
    part = '{"type":"reasoning_text","text":"Hm."}'
    call = f'{{"type":"function_call","id":"fc_{ID}_1","call_id":"call_1","name":"f","arguments":"%s","status":"%s"}}'
    arguments = '{\\"a\\":1}'
    in_thoughts = f'"item_id":"rs_{ID}_0","output_index":0,"content_index":0'
    in_call = f'"item_id":"fc_{ID}_1","output_index":1'
    output = f"{thoughts % (part, 'completed')},{call % (arguments, 'completed')}"
    assert sse.decode() == frames(
        *START,
        ("response.output_item.added", f'"output_index":0,"item":{thoughts % ("", "in_progress")}'),
        ("response.content_part.added", f'{in_thoughts},"part":{{"type":"reasoning_text","text":""}}'),
        ("response.reasoning_text.delta", f'{in_thoughts},"delta":"Hm."'),
        ("response.reasoning_text.done", f'{in_thoughts},"text":"Hm."'),
        ("response.content_part.done", f'{in_thoughts},"part":{part}'),
        ("response.output_item.done", f'"output_index":0,"item":{thoughts % (part, "completed")}'),
        ("response.output_item.added", f'"output_index":1,"item":{call % ("", "in_progress")}'),
        ("response.function_call_arguments.delta", f'{in_call},"delta":"{{\\"a\\""'),
        ("response.function_call_arguments.delta", f'{in_call},"delta":":1}}"'),
        ("response.function_call_arguments.done", f'{in_call},"name":"f","arguments":"{arguments}"'),
        ("response.output_item.done", f'"output_index":1,"item":{call % (arguments, "completed")}'),
        ("response.completed", f'"response":{whole("completed", output, completed_at="2", usage=USAGE)}'),
    )
    parse(sse)


def test_an_error_in_a_stream_is_exactly_this() -> None:
    it = writer()
    sse = it.start() + it.events([TextDelta("Hel")])
    sse += it.error(ErrorReply(503, "server_error", "The engine died.", None, "engine_died"))
    error = '{"code":"server_error","message":"The engine died."}'
    assert sse.decode() == frames(
        *START,
        *message_events(["Hel"], "")[:3],
        ("error", '"code":"engine_died","message":"The engine died.","param":null'),
        ("response.failed", f'"response":{whole("failed", error=error)}'),
    )
    parse(sse)


@pytest.mark.parametrize(
    "events",
    [
        [TextDelta("Hello"), done()],
        [done()],
        [ReasoningDelta("a"), done()],
        [ReasoningDelta("a"), done("length")],
        [ReasoningDelta("a"), ReasoningDelta("b"), TextDelta("c"), done()],
        [TextDelta("I look."), *TOOL_CALL, ToolCallStart(1, "call_2", "f"), ToolCallDelta(1, "{}"), done("tool_calls")],
        [TextDelta("before"), *TOOL_CALL, TextDelta("after"), done("tool_calls")],
        [*TOOL_CALL[:2], done("length")],
    ],
)
def test_a_stream_and_a_whole_answer_say_the_same(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 2.5)
    fields: dict[str, Any] = {
        "tools": [TOOL],
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        "tool_choice": {"type": "function", "name": "f"},
        "reasoning": {"effort": "low"},
    }
    sse = stream(events, **fields)
    last = parse(sse)[-1]["response"]
    folded = json.loads(writer(**fields).fold(events))
    assert folded == last
    Response.model_validate(folded, strict=True)
    assert accumulate(sse) == folded
    kinds = {item["type"] for item in folded["output"]}
    assert folded["status"] == "incomplete" or kinds & {"message", "function_call"}


def test_log_probabilities_ride_on_their_text() -> None:
    token = ScoredToken("a", b"a", -0.5)
    events = [TextDelta("a", [TokenLogprobs(token, [token])]), TextDelta("a", [TokenLogprobs(token, [])]), done()]
    sse = stream(events, include=["message.output_text.logprobs"], top_logprobs=1)
    scored = {"token": "a", "logprob": -0.5, "bytes": [97]}
    first, second = scored | {"top_logprobs": [scored]}, scored | {"top_logprobs": []}
    deltas = [event["logprobs"] for event in parse(sse) if event["type"] == "response.output_text.delta"]
    assert deltas == [[first], [second]]
    assert parse(sse)[-1]["response"]["output"][0]["content"][0]["logprobs"] == [first, second]


def test_silence_is_filled_with_comments() -> None:
    assert writer().keep_alive() == b": keep-alive\n\n"
