"""What requests for responses mean: messages, tools and settings of the neutral request, and what is refused."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import fake_model
from mlx_server.api.openai.responses_request import ignored_tools, to_chat_request, to_items
from mlx_server.api.openai.responses_types import ResponsesRequest
from mlx_server.chat.types import ChatMessage, ChatRequest, JsonSchema, Reasoning, Tool, ToolCall, ToolChoice
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import EngineInfo

INFO = EngineInfo(100, 257, 1000, limited_by_memory=False)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "weather", "description": "Tells it", "parameters": SCHEMA, "strict": False}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": '{"city": "X"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
FORMAT = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}


def decode(**fields: Any) -> ResponsesRequest:
    body = {"model": "default", "input": "Hello"} | fields
    return msgspec.json.decode(msgspec.json.encode(body), type=ResponsesRequest)


def translate(**fields: Any) -> ChatRequest:
    body = decode(**fields)
    return to_chat_request(body, to_items(body, None), fake_model(), INFO, 64)


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


def message(role: str, *texts: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [user("Hello")]),
        ({"instructions": "Be brief."}, [ChatMessage(role="system", content="Be brief."), user("Hello")]),
        ({"instructions": ""}, [user("Hello")]),
        ({"input": [{"role": "user", "content": "a"}]}, [user("a")]),
        ({"input": [message("user", "a", "b"), {"role": "user", "content": "c"}]}, [user("a\nb"), user("c")]),
        (
            {"input": [message("developer", "d"), message("system", "s"), message("user", "u")]},
            [ChatMessage(role="developer", content="d"), ChatMessage(role="system", content="s"), user("u")],
        ),
        (
            {"input": [user_item := message("user", "u"), message("assistant", "a", kind="output_text"), user_item]},
            [user("u"), ChatMessage(role="assistant", content="a"), user("u")],
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "phase": "final_answer"},
                ]
            },
            [user("u"), ChatMessage(role="assistant", content="no")],
        ),
        ({"input": "日本 😀"}, [user("日本 😀")]),
    ],
)
def test_messages(fields: dict[str, Any], expected: list[ChatMessage]) -> None:
    assert translate(**fields).messages == expected


def test_what_the_assistant_thought_said_and_called_is_one_turn() -> None:
    thoughts = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    sealed = {"type": "reasoning", "id": "rs_2", "summary": [], "encrypted_content": "x"}
    second = CALL | {"call_id": "call_2", "arguments": ""}
    parts = {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "rain"}]}
    items = [thoughts, message("assistant", "I look.", kind="output_text"), CALL, second, OUTPUT, parts, sealed]
    messages = translate(input=[message("user", "u"), *items, message("user", "And?")]).messages
    assert messages == [
        user("u"),
        ChatMessage(
            role="assistant",
            content="I look.",
            reasoning_content="hm",
            tool_calls=[ToolCall("call_1", "weather", '{"city": "X"}'), ToolCall("call_2", "weather", "{}")],
        ),
        ChatMessage(role="tool", content="sunny", tool_call_id="call_1"),
        ChatMessage(role="tool", content="rain", tool_call_id="call_2"),
        user("And?"),
    ]


def test_a_summary_stands_for_thoughts_without_text() -> None:
    thoughts = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "in short"}]}
    assert translate(input=[thoughts, CALL]).messages[0].reasoning_content == "in short"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "weather"}, ToolChoice("required", ["weather"])),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
            ToolChoice("auto", ["weather"]),
        ),
    ],
)
def test_tool_choice(choice: Any, expected: ToolChoice) -> None:
    assert translate(tools=[TOOL], tool_choice=choice).tool_choice == expected


def test_tools() -> None:
    others = [{"type": "web_search", "search_context_size": "low"}, {"type": "namespace", "name": "n", "tools": []}]
    tools = [*others, TOOL, {"type": "function", "name": "f", "strict": True}, {"type": "local_shell"}]
    request = translate(tools=tools, parallel_tool_calls=False)
    assert request.tools == [
        Tool(name="weather", description="Tells it", parameters=SCHEMA),
        Tool(name="f", strict=True),
    ]
    assert not request.parallel_tool_calls and translate().parallel_tool_calls
    assert ignored_tools(decode(tools=tools)) == ["tools[0]", "tools[1]", "tools[4]"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ({"format": {"type": "text"}, "verbosity": "low"}, None),
        ({"format": {"type": "json_object"}}, JsonSchema(schema={"type": "object"}, param="text.format")),
        ({"format": FORMAT}, JsonSchema(schema=SCHEMA, param="text.format.schema")),
    ],
)
def test_text_format(text: Any, expected: JsonSchema | None) -> None:
    assert translate(text=text).grammar == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"temperature": 0.5, "top_k": 7}),  # the model's defaults
        ({"temperature": 2, "top_p": 0.25}, {"temperature": 2.0, "top_p": 0.25, "top_k": 7}),
        ({"top_p": 0}, {"temperature": 0.5, "top_k": 1}),
        ({"top_k": 3, "min_p": 0.5, "repetition_penalty": 1.5},
         {"temperature": 0.5, "top_k": 3, "min_p": 0.5, "repetition_penalty": 1.5}),
        ({"include": ["message.output_text.logprobs"]}, {"temperature": 0.5, "top_k": 7, "logprobs": 0}),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3},
         {"temperature": 0.5, "top_k": 7, "logprobs": 3}),
        ({"include": ["reasoning.encrypted_content"], "top_logprobs": 0}, {"temperature": 0.5, "top_k": 7}),
    ],
)  # fmt: skip
def test_sampling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translate(**fields, seed=5).sampling == SamplingParams(**expected, seed=5)


def test_settings() -> None:
    assert (translate().max_tokens, translate(max_output_tokens=16).max_tokens) == (64, 16)
    assert translate(reasoning={"effort": "low", "summary": "auto"}).reasoning == Reasoning(effort="low")
    assert translate(reasoning=None).reasoning == Reasoning()


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
        ({"input": "a\0"}, "input"),
        ({"input": [message("user", "a", "b\0")]}, "input[0].content[1]"),
        ({"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [message("user", "a"), {"type": "web_search_call", "id": "ws_1"}]}, "input[1].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"id": "msg_1"}]}, "input[0].id"),
        ({"input": [CALL | {"call_id": None}]}, "input[0].call_id"),
        ({"input": [CALL | {"name": None}]}, "input[0].name"),
        ({"input": [OUTPUT | {"call_id": None}]}, "input[0].call_id"),
        ({"input": [OUTPUT | {"output": None}]}, "input[0].output"),
        ({"input": [OUTPUT | {"output": [IMAGE]}]}, "input[0].output[0].type"),
        ({"instructions": "a\0"}, "instructions"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}}, "tool_choice.tools"),
        ({"text": {"format": FORMAT | {"schema": None}}}, "text.format.schema"),
        ({"text": {"format": FORMAT | {"name": None}}}, "text.format.name"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"truncation": "auto"}, "truncation"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        translate(**fields)
    assert error.value.param == param and param in error.value.message


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KINDS = [None, "message", "function_call", "function_call_output", "reasoning", "item_reference", "x"]
ITEMS = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS), "id": st.none() | st.text(max_size=5)},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "robot"]),
        "content": st.text(max_size=5) | VALUES,
        "call_id": st.text(max_size=5),
        "name": st.text(max_size=5),
        "arguments": st.text(max_size=5),
        "output": st.text(max_size=5) | VALUES,
    },
)


@given(fields=st.dictionaries(st.sampled_from(ResponsesRequest.__struct_fields__), VALUES, max_size=4), items=ITEMS)
def test_any_fields(fields: dict[str, Any], items: dict[str, Any]) -> None:
    try:
        request = translate(**({"input": [items]} | fields))
    except (InvalidRequestError, msgspec.ValidationError):
        return
    assert request.messages and request.max_tokens >= 1
