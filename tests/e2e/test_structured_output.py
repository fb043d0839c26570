"""Structured output and calls that must come, from a model of 135M parameters that would not manage them by itself."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from e2e_server import connect
from server_process import ServerProcess

pytestmark = pytest.mark.model

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "population": {"type": "integer", "minimum": 1},
        "climate": {"enum": ["warm", "cold"]},
    },
    "required": ["name", "population", "climate"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
DESCRIBE: Any = [{"role": "user", "content": "Describe the city of Paris."}]


class City(BaseModel):
    name: str
    climate: Literal["warm", "cold"]
    districts: list[int] = Field(max_length=3)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with connect(server) as client:
        yield client


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url(), api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: OpenAI, **fields: Any) -> Any:
    defaults = {"model": "default", "messages": DESCRIBE, "max_completion_tokens": 300, "temperature": 0}
    return client.chat.completions.create(**defaults | fields)


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_has_its_schema(client: OpenAI, seed: int) -> None:
    answer = ask(client, response_format=json_schema(CITY), temperature=1, seed=seed)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), CITY)


def test_a_stream_has_its_schema(client: OpenAI) -> None:
    whole = ask(client, response_format=json_schema(CITY)).choices[0].message.content
    chunks = list(ask(client, response_format=json_schema(CITY), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole


def test_any_object(client: OpenAI) -> None:
    answer = ask(client, response_format={"type": "json_object"}, max_completion_tokens=600).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


def test_the_sdk_parses_a_pydantic_type(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="default", messages=DESCRIBE, response_format=City, temperature=0, max_completion_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["red", "green"]}, "red|green"),
        ({"regex": "[A-Z][a-z]{2,8}, [0-9]{4}"}, "[A-Z][a-z]{2,8}, [0-9]{4}"),
        ({"grammar": 'root ::= "yes" | "no" [!]{1,3}'}, "yes|no!{1,3}"),
        ({"grammar": 'start: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,3}/'}, r"\d{1,3}(\+\d{1,3}){1,3}"),
    ],
    ids=["choice", "regex", "gbnf", "lark"],
)
def test_other_grammars(client: OpenAI, constraint: dict[str, Any], pattern: str) -> None:
    answer = ask(client, extra_body={"structured_outputs": constraint}, temperature=1, seed=1)
    assert re.fullmatch(pattern, answer.choices[0].message.content)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("seed", range(2))
def test_a_call_that_must_come_is_valid(client: OpenAI, choice: Any, seed: int) -> None:
    function = {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}
    tools = [{"type": "function", "function": function}]
    answer = ask(client, tools=tools, tool_choice=choice, parallel_tool_calls=False, temperature=1, seed=seed)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and answer.choices[0].finish_reason in ("tool_calls", "stop")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)


def test_only_the_allowed_tools_can_be_called(client: OpenAI) -> None:
    names = ["describe_city", "get_weather", "play_chess"]
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": nothing}} for name in names]
    for name in names:
        allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": name}}]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        answer = ask(client, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == (name, {})


def test_log_probabilities_of_every_token(client: OpenAI) -> None:
    plain = ask(client, response_format=json_schema(CITY)).choices[0]
    scored = ask(client, response_format=json_schema(CITY), logprobs=True, top_logprobs=2).choices[0]
    assert scored.message.content == plain.message.content
    assert "".join(entry.token for entry in scored.logprobs.content) == scored.message.content


def test_a_schema_that_is_none_is_refused(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="response_format"):
        ask(client, response_format=json_schema({"type": "strange"}))


def ask_claude(claude: Anthropic, extra_body: dict[str, Any] | None = None, **fields: Any) -> Any:
    extra_body = {"temperature": 0} | (extra_body or {})
    defaults: dict[str, Any] = {"model": "default", "max_tokens": 300, "messages": DESCRIBE, "extra_body": extra_body}
    return claude.messages.create(**defaults | fields)


def test_claude_answers_with_its_schema(claude: Anthropic) -> None:
    message = ask_claude(claude, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}})
    jsonschema.validate(json.loads(message.content[0].text), CITY)


def test_claude_must_use_a_tool(claude: Anthropic) -> None:
    message = ask_claude(
        claude,
        tools=[{"name": "get_weather", "description": "The weather.", "input_schema": WEATHER}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and call.name == "get_weather"
    jsonschema.validate(call.input, WEATHER)
