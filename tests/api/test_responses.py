"""POST, GET and DELETE /v1/responses with OpenAI's own client, on the fake engine."""

from collections.abc import Callable
from typing import Any

import falcon.testing
import openai
import pytest
from openai.types.responses import FunctionToolParam
from pydantic import BaseModel

from fake_engine import Backend, answer, failing

TOOL: FunctionToolParam = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
HEADER = "x-mlx-server-ignored"
Post = Callable[..., falcon.testing.Result]


@pytest.fixture
def post(client: falcon.testing.TestClient) -> Post:
    def post(**fields: Any) -> falcon.testing.Result:
        return client.simulate_post("/v1/responses", json={"model": "tiny", "input": "Hi"} | fields)

    return post


def prompt(backend: Backend) -> str:
    """That of the last request."""
    return bytes(backend.engine.submits[-1].prompt_token_ids).decode()


def test_an_answer(sdk: openai.OpenAI, backend: Backend) -> None:
    backend.engine.script = answer("Grüße 👋🏽", num_cached=3)
    response = sdk.responses.create(model="tiny", input="Hi", instructions="Be brief.", metadata={"a": "b"})
    assert (response.output_text, response.status, response.model) == ("Grüße 👋🏽", "completed", "tiny")
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert prompt(backend) == "system: Be brief.\nuser: Hi\n"
    usage = response.usage
    assert usage is not None and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (usage.input_tokens, usage.input_tokens_details.cached_tokens) == (len(prompt(backend)), 3)
    assert usage.output_tokens == len("Grüße 👋🏽".encode()) + 1


def test_a_stream(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="tiny", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Hello!"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (final.output_text, events[0].type, events[-1].type) == ("Hello!", "response.created", "response.completed")
    raw = list(sdk.responses.create(model="tiny", input="Hi", stream=True))
    assert [event.type for event in (raw[0], raw[-1])] == ["response.created", "response.completed"]


def test_parsed_answers(sdk: openai.OpenAI, backend: Backend) -> None:
    class Place(BaseModel):
        city: str

    backend.engine.script = answer('{"city": "Paris"}')
    response = sdk.responses.parse(model="tiny", input="Where?", text_format=Place)
    assert response.output_parsed == Place(city="Paris")
    assert backend.engine.submits[0].grammar is not None
    with sdk.responses.stream(model="tiny", input="Where?", text_format=Place) as stream:
        assert stream.get_final_response().output_parsed == Place(city="Paris")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_call_and_its_result(sdk: openai.OpenAI, backend: Backend, streamed: bool) -> None:
    backend.engine.script = answer(CALL)
    if streamed:
        with sdk.responses.stream(model="tiny", input="Hi", tools=[TOOL]) as stream:
            first: Any = stream.get_final_response()
    else:
        first = sdk.responses.create(model="tiny", input="Hi", tools=[TOOL])
    (call,) = first.output
    assert (call.type, call.name, call.status) == ("function_call", "f", "completed")
    assert (call.arguments, call.call_id[:5]) == ('{"a": 1}', "call_")
    backend.engine.script = answer()
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    sdk.responses.create(model="tiny", input=[result], previous_response_id=first.id)
    by_reference = prompt(backend)
    sdk.responses.create(model="tiny", input=[{"role": "user", "content": "Hi"}, call.to_dict(), result])
    assert by_reference == prompt(backend)
    sdk.responses.create(
        model="tiny",
        input=[{"role": "user", "content": "Hi"}, {"type": "item_reference", "id": call.id}, result],
    )
    assert by_reference == prompt(backend)


def test_a_conversation_goes_on_from_its_responses(sdk: openai.OpenAI, backend: Backend) -> None:
    first = sdk.responses.create(model="tiny", input="a", instructions="not carried on")
    second = sdk.responses.create(model="tiny", input="b", previous_response_id=first.id)
    assert prompt(backend) == "user: a\nassistant: Hello!\nuser: b\n"
    sdk.responses.delete(first.id)
    third = sdk.responses.create(model="tiny", input="c", previous_response_id=second.id, instructions="i")
    assert prompt(backend) == "system: i\nuser: a\nassistant: Hello!\nuser: b\nassistant: Hello!\nuser: c\n"
    assert third.previous_response_id == second.id
    sdk.responses.create(model="tiny", input="d", previous_response_id=second.id)  # another way on from there
    assert prompt(backend) == "user: a\nassistant: Hello!\nuser: b\nassistant: Hello!\nuser: d\n"


def test_responses_are_kept_and_forgotten(sdk: openai.OpenAI, client: falcon.testing.TestClient) -> None:
    with sdk.responses.stream(model="tiny", input="Hi", max_output_tokens=3) as stream:
        *_, last = stream
    kept: Any = last
    assert kept.type == "response.incomplete" and kept.response.incomplete_details.reason == "max_output_tokens"
    response = kept.response
    assert sdk.responses.retrieve(response.id).to_dict() == response.to_dict()
    path = f"/v1/responses/{response.id}"
    assert client.simulate_get(path, params={"stream": "true"}).json["error"]["param"] == "stream"
    assert client.simulate_delete(path).json == {"id": response.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.delete(response.id)
    with pytest.raises(openai.BadRequestError) as error:
        sdk.responses.create(model="tiny", input="Hi", previous_response_id=response.id)
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")


@pytest.mark.parametrize("name", ["x", "resp_", "..", "..%2Flaunch.json", "resp_" + "g" * 32])
def test_ids_of_no_response(client: falcon.testing.TestClient, name: str) -> None:
    for method in ("GET", "DELETE"):
        result = client.simulate_request(method, f"/v1/responses/{name}")
        assert (result.status_code, result.json["error"]["type"]) == (404, "invalid_request_error")


def test_what_is_not_to_be_kept_is_not(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(model="tiny", input="Hi", store=False)
    assert response.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)


def test_tools_that_are_no_functions_are_named(post: Post, backend: Backend) -> None:
    tools = [{"type": "web_search"}, TOOL, {"type": "namespace", "name": "n", "tools": [], "x": 1}]
    result = post(tools=tools)
    assert result.headers[HEADER] == "tools[2].tools, tools[2].x, tools[0], tools[2]"
    assert [tool["name"] for tool in result.json["tools"]] == ["f"]
    assert prompt(backend).startswith("tools: f\n")
    strict = falcon.testing.TestClient(backend.app(strict=True), headers={"host": "localhost"})
    body = {"model": "tiny", "input": "Hi", "tools": tools[:2]}
    assert strict.simulate_post("/v1/responses", json=body).json["error"]["param"] == "tools[0]"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"input": 5}, 400, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, 400, "input[0].role"),
        ({"input": "x" * 200}, 400, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"metadata": {"a": 1}}, 400, "metadata["),
        ({"include": ["x"]}, 400, "include[0]"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, 400, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, 400, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}}, 400,
         "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort"),
    ],
)  # fmt: skip
def test_refusals(post: Post, fields: dict[str, Any], status: int, param: str) -> None:
    result = post(**fields)
    assert (result.status_code, result.json["error"]["type"]) == (status, "invalid_request_error"), result.text
    assert result.json["error"]["param"].startswith(param), result.text


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_an_early_failure_has_a_status(post: Post, backend: Backend, fields: dict[str, Any]) -> None:
    backend.engine.script = failing("queue_full")
    result = post(**fields)
    assert (result.status_code, result.headers["retry-after"]) == (503, "2")


@pytest.mark.usefixtures("outputs_one_by_one")
def test_a_late_failure_is_told_in_both_ways(sdk: openai.OpenAI, backend: Backend) -> None:
    backend.engine.script = failing("engine_died", after="so far")
    *_, error, last = sdk.responses.create(model="tiny", input="Hi", stream=True)
    assert error.type == "error" and error.code == "engine_died"
    assert last.type == "response.failed" and last.response.error is not None
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(last.response.id)
