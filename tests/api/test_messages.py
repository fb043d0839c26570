"""POST /v1/messages and /v1/messages/count_tokens with Anthropic's own client, on the fake engine."""

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import falcon.testing
import httpx2
import pytest
from anthropic.types import MessageParam, ToolParam

from chat.test_generation_events import THINKING, OpeningTemplate
from fake_engine import END, Backend, PlainTemplate, answer, failing, fake_model
from mlx_server.wire import Failed, Progress, RequestOutput, Submit

HELLO: list[MessageParam] = [{"role": "user", "content": "Hi"}]
TOOL: ToolParam = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
Post = Callable[..., falcon.testing.Result]


@pytest.fixture
def sdk(backend: Backend) -> Iterator[anthropic.Anthropic]:
    transport = httpx2.WSGITransport(app=backend.app())
    with anthropic.Anthropic(
        api_key="none",
        base_url="http://localhost:8000",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture
def post(client: falcon.testing.TestClient) -> Post:
    def post(**fields: Any) -> falcon.testing.Result:
        body = {"model": "tiny", "max_tokens": 64, "messages": HELLO} | fields
        return client.simulate_post("/v1/messages", json=body)

    return post


def test_an_answer(sdk: anthropic.Anthropic, backend: Backend) -> None:
    backend.engine.script = answer(num_cached=3)
    message = sdk.messages.create(model="tiny", max_tokens=64, messages=HELLO)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello!"}]
    assert (message.stop_reason, message.model, message.role) == ("end_turn", "tiny", "assistant")
    count = sdk.messages.count_tokens(model="tiny", messages=HELLO)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (count.input_tokens - 3, 3)
    assert message.usage.output_tokens == len("Hello!") + 1


def test_a_stream(sdk: anthropic.Anthropic, backend: Backend) -> None:
    backend.engine.script = answer("Grüße 👋🏽", num_cached=3)
    with sdk.messages.stream(model="tiny", max_tokens=64, messages=HELLO) as stream:
        events = list(stream)
        assert "".join(event.text for event in events if event.type == "text") == "Grüße 👋🏽"
        message = stream.get_final_message()
    start = next(event for event in events if event.type == "message_start")
    assert start.message.usage.input_tokens == message.usage.input_tokens
    assert start.message.usage.cache_read_input_tokens == message.usage.cache_read_input_tokens == 3
    assert message.stop_reason == "end_turn"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_call(sdk: anthropic.Anthropic, backend: Backend, streamed: bool) -> None:
    backend.engine.script = answer(f"I look.\n{CALL}")
    if streamed:
        with sdk.messages.stream(model="tiny", max_tokens=128, messages=HELLO, tools=[TOOL]) as stream:
            message: Any = stream.get_final_message()
    else:
        message = sdk.messages.create(model="tiny", max_tokens=128, messages=HELLO, tools=[TOOL])
    text, call = message.content
    assert (text.type, text.text.strip(), message.stop_reason) == ("text", "I look.", "tool_use")
    assert (call.name, call.input, call.id[:6]) == ("f", {"a": 1}, "toolu_")


def test_a_tool_call_that_is_cut(sdk: anthropic.Anthropic, backend: Backend) -> None:
    backend.engine.script = answer('<tool_call>{"name": "f", "arguments": {"a": 1, "b": "Zür')
    message = sdk.messages.create(model="tiny", max_tokens=57, messages=HELLO, tools=[TOOL])
    (call,) = message.content
    assert call.type == "tool_use"
    assert (call.input, message.stop_reason) == ({"a": 1, "b": "Zür"}, "max_tokens")


def test_a_stop_sequence_is_named(sdk: anthropic.Anthropic) -> None:
    message = sdk.messages.create(model="tiny", max_tokens=64, messages=HELLO, stop_sequences=["x", "lo"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "lo")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hel"}]


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("max_tokens", [1, 30])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief.", "tools": [TOOL], "tool_choice": {"type": "any"}},
        {"messages": [*HELLO, {"role": "assistant", "content": "I"}]},
        {"thinking": {"type": "disabled"}},
        {"thinking": {"type": "enabled", "budget_tokens": 0}},
        {"thinking": {"type": "enabled", "budget_tokens": 3}},
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        {"output_config": {"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}}},
    ],
)
def test_a_count_is_what_usage_says(backend: Backend, fields: dict[str, Any], max_tokens: int, opens: bool) -> None:
    """`opens`: the template begins thoughts, which it has no switch for."""
    backend.engine.script = answer("Hm.\n</think>\n\nHi.", num_cached=5)
    model = fake_model(**THINKING, template=OpeningTemplate() if opens else PlainTemplate())
    client = falcon.testing.TestClient(backend.app(model=model), headers={"host": "localhost"})
    body = {"model": "tiny", "messages": HELLO} | fields
    usage = client.simulate_post("/v1/messages", json=body | {"max_tokens": max_tokens}).json["usage"]
    counted = client.simulate_post("/v1/messages/count_tokens", json=body).json["input_tokens"]
    assert usage["cache_read_input_tokens"] == 5
    assert counted == sum(usage[f"{kind}input_tokens"] for kind in ("", "cache_read_", "cache_creation_"))
    assert counted == len(backend.engine.submits[0].prompt_token_ids)


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(3, "max_tokens"), (20_000, "model_context_window_exceeded"), (0, "max_tokens")]
)
def test_cut_answers(sdk: anthropic.Anthropic, backend: Backend, max_tokens: int, expected: str) -> None:
    backend.engine.script = answer("x" * 200)
    message = sdk.messages.create(model="tiny", max_tokens=max_tokens, messages=HELLO)
    assert message.stop_reason == expected
    assert backend.engine.submits[0].max_tokens == {3: 3, 0: 1}.get(max_tokens, 100 - message.usage.input_tokens)


def test_sampling_reaches_the_engine(post: Post, backend: Backend) -> None:
    assert post(temperature=0.25, top_p=0.5, top_k=9).status_code == 200
    sampling = backend.engine.submits[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 9)
    assert backend.engine.submits[0].end_token_ids == [END]


@pytest.mark.parametrize(
    ("fields", "status", "kind", "says"),
    [
        ({"model": "gpt"}, 404, "not_found_error", "'org/tiny'"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": -1}, 400, "invalid_request_error", "max_tokens"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "invalid_request_error", "content[0]"),
    ],
)
def test_refusals(post: Post, fields: dict[str, Any], status: int, kind: str, says: str) -> None:
    result = post(**fields)
    assert result.status_code == status
    body = result.json
    assert (body["type"], body["error"]["type"]) == ("error", kind) and says in body["error"]["message"]
    assert body["request_id"] == result.headers["request-id"]


@pytest.mark.parametrize(
    ("num_bytes", "says"), [(193, "200 tokens > 100 tokens maximum"), (993, "1000 bytes > 100 tokens maximum")]
)
def test_a_prompt_that_is_too_long_is_refused_in_anthropics_words(post: Post, num_bytes: int, says: str) -> None:
    """Claude Code looks for them: it then compacts the conversation."""
    result = post(messages=[{"role": "user", "content": "x" * num_bytes}])
    assert (result.status_code, result.json["error"]["type"]) == (400, "invalid_request_error")
    assert result.json["error"]["message"] == f"prompt is too long: {says}"
    assert result.json["error"]["details"] == {"error_code": "context_length_exceeded"}


def test_tokens_beyond_the_context_are_counted(sdk: anthropic.Anthropic) -> None:
    messages: list[MessageParam] = [{"role": "user", "content": "x" * 193}]
    assert sdk.messages.count_tokens(model="tiny", messages=messages).input_tokens == 200
    messages = [{"role": "user", "content": "x" * 993}]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 1000 bytes"):
        sdk.messages.count_tokens(model="tiny", messages=messages)


def test_threads_are_refused_in_the_way_that_makes_clients_send_everything(post: Post) -> None:
    result = post(thread={"type": "create"})
    assert result.status_code == 400
    assert result.json["error"]["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_an_early_failure_has_a_status(post: Post, backend: Backend, fields: dict[str, Any]) -> None:
    backend.engine.script = failing("queue_full")
    result = post(**fields)
    assert (result.status_code, result.json["error"]["type"]) == (529, "overloaded_error")
    assert result.headers["retry-after"] == "2"


@pytest.mark.usefixtures("outputs_one_by_one")
def test_a_late_failure_is_an_event(post: Post, backend: Backend) -> None:
    backend.engine.script = failing("engine_died", after="so far")
    result = post(stream=True)
    assert result.status_code == 200
    *_, last = result.text.strip().split("\n\n")
    assert last.startswith('event: error\ndata: {"type":"error","error":{"type":"overloaded_error"')
    assert "message_stop" not in result.text


def test_a_failure_while_the_prompt_is_computed_has_a_status(post: Post, backend: Backend) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput]:
        yield Progress(submit.request_id, 9, 0, 4)
        yield Failed(submit.request_id, "engine_died", "The engine failed.")

    backend.engine.script = script
    assert post(stream=True).status_code == 529
