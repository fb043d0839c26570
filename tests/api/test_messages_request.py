"""What Anthropic's requests mean: messages, tools and settings of the neutral request, and what is refused."""

from typing import Any

import msgspec
import pytest

from mlx_server.api.anthropic.request import to_chat_request
from mlx_server.api.anthropic.types import MessagesRequest
from mlx_server.chat.types import ChatMessage, ChatRequest, JsonSchema, Reasoning, Tool, ToolCall, ToolChoice
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}

BILLING = {"type": "text", "text": "x-anthropic-billing-header: cch=1;"}
TEXT = {"type": "text", "text": "a"}
NUL = {"type": "text", "text": "a\0"}


def translate(**fields: Any) -> ChatRequest:
    body = {"model": "default", "max_tokens": 64, "messages": HELLO} | fields
    request = msgspec.json.decode(msgspec.json.encode(body), type=MessagesRequest)
    return to_chat_request(request, SamplingParams(temperature=0.5, top_k=7))


def user(text: str) -> ChatMessage:
    return ChatMessage(role="user", content=text)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"system": "Be brief."}, [ChatMessage(role="system", content="Be brief."), user("Hello")]),
        (
            {
                "system": [
                    {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "b"},
                ]
            },
            [ChatMessage(role="system", content="a\nb"), user("Hello")],
        ),
        ({"system": ""}, [user("Hello")]),
        (
            {"system": [BILLING, {"type": "text", "text": "b"}]},
            [ChatMessage(role="system", content="b"), user("Hello")],
        ),
        ({"messages": [*HELLO, {"role": "user", "content": "again"}]}, [user("Hello\nagain")]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                    {"role": "system", "content": "c"},
                ]
            },
            [user("a\nb"), ChatMessage(role="system", content="c")],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "document",
                                "title": "T",
                                "context": "C",
                                "source": {"type": "text", "media_type": "text/plain", "data": "D"},
                            },
                            {
                                "type": "search_result",
                                "title": "S",
                                "source": "https://x.org",
                                "content": [{"type": "text", "text": "R"}],
                            },
                        ],
                    }
                ]
            },
            [user("T\nC\nD\nS\nhttps://x.org\nR")],
        ),
    ],
)
def test_texts(fields: dict[str, Any], expected: list[ChatMessage]) -> None:
    assert translate(**fields).messages == expected


def test_tool_use_and_its_results() -> None:
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such city", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_3"},
        {"type": "text", "text": "Well?"},
    ]
    calls = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "I look."},
        USE,
    ]
    request = translate(
        messages=[*HELLO, {"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    )
    assert request.messages[1:] == [
        ChatMessage(
            role="assistant",
            content="I look.",
            reasoning_content="hm",
            tool_calls=[ToolCall("toolu_1", "weather", '{"city":"Paris"}')],
        ),
        ChatMessage(role="tool", content="sunny", tool_call_id="toolu_1"),
        ChatMessage(role="tool", content="Error: no such city", tool_call_id="toolu_2"),
        ChatMessage(role="tool", content="", tool_call_id="toolu_3"),
        user("Well?"),
    ]
    assert request.add_generation_prompt and not request.continue_final_message


def test_a_final_turn_of_the_assistant_is_continued() -> None:
    request = translate(messages=[*HELLO, {"role": "assistant", "content": "I am"}])
    assert request.messages[-1] == ChatMessage(role="assistant", content="I am")
    assert request.continue_final_message and not request.add_generation_prompt


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, SamplingParams(temperature=0.5, top_k=7)),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3}, SamplingParams(temperature=0.0, top_p=0.5, top_k=3)),
        ({"top_p": 0}, SamplingParams(temperature=0.5, top_k=1)),
    ],
)
def test_sampling(fields: dict[str, Any], expected: SamplingParams) -> None:
    sampling = translate(**fields).sampling
    assert msgspec.structs.replace(sampling, seed=0) == expected
    assert sampling.seed != translate(**fields).sampling.seed


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"max_tokens": 0}, {"max_tokens": 1}),
        ({"tools": [TOOL]}, {"tools": [Tool(name="weather", description="Tells the weather", parameters=SCHEMA)]}),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tool_choice": ToolChoice("required")}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}},
            {"tool_choice": ToolChoice("required", ["weather"])},
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {"tool_choice": ToolChoice("none")}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"parallel_tool_calls": False},
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            {"reasoning": Reasoning(enabled=True, budget_tokens=2048)},
        ),
        ({"thinking": {"type": "disabled"}}, {"reasoning": Reasoning(enabled=False)}),
        (
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
            {"reasoning": Reasoning(effort="low")},
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            {"grammar": JsonSchema(schema=SCHEMA, param="output_config.format.schema")},
        ),
    ],
)
def test_fields(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    request = translate(**fields)
    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "images are not supported"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}
                ]
            },
            "messages[0].content[0].content[0]",
            "images are not supported",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "A"}}]}
                ]
            },
            "messages[0].content[0].source",
            "only documents of plain text",
        ),
        (
            {"messages": [{"role": "user", "content": [USE]}]},
            "messages[0].content[0]",
            "role user can't hold blocks of type tool_use",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": [IMAGE]}]},
            "messages[1].content[0]",
            "can't hold blocks of type image",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": [USE]}]},
            "messages",
            "results (`tool_result`) are missing",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "NUL"),
        ({"messages": [{"role": "user", "content": [TEXT, NUL]}]}, "messages[0].content[1].text", "NUL"),
        ({"system": "a\0"}, "system", "NUL"),
        ({"system": [BILLING, NUL]}, "system[1].text", "NUL"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type", "'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "is missing"),
        ({"tools": [{"name": "f", "input_schema": {"type": 5}}]}, "tools[0].input_schema.type", "must be 'object'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "needs `tools`"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name", "no tool 'f'"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name", "names must be unique"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens", "is missing"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]", "1 to 4096 characters"),
        ({"thread": {"type": "create"}}, "thread", "send the whole conversation"),
        ({"mcp_servers": [{"type": "url", "url": "https://x.org", "name": "x"}]}, "mcp_servers", "not supported"),
    ],
)
def test_refusals(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        translate(**fields)
    assert refused.value.param == param and says in refused.value.message
