"""openai's responses against a real server on the demo model."""

import json
from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from e2e_server import STORY

pytestmark = pytest.mark.model

PARIS = "What is the capital of France?"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    "strict": True,
}


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "default", "input": PARIS, "temperature": 0, "max_output_tokens": 24} | fields


def test_a_stream_is_the_answer_in_pieces(client: OpenAI) -> None:
    assert "Paris" in client.responses.create(**ask()).output_text
    long = ask(input=STORY, max_output_tokens=100)  # pieces of what is ready before it is sent are joined
    whole = client.responses.create(**long)
    with client.responses.stream(**long) as stream:
        events = list(stream)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(pieces) > 3
    assert events[-1].type == "response.incomplete"
    assert "".join(pieces) == events[-1].response.output_text == whole.output_text


def test_any_worker_knows_a_response(client: OpenAI) -> None:
    first = client.responses.create(**ask(input=STORY, max_output_tokens=40))
    assert first.status == "incomplete" and first.usage is not None
    for _ in range(8):  # each connection may reach another worker
        with OpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
            assert other.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(**ask(input="Go on.", previous_response_id=first.id))
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.usage.input_tokens_details.cached_tokens >= 48
    client.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(first.id)


def test_a_call_that_must_come_is_valid(client: OpenAI) -> None:
    response = client.responses.create(**ask(tools=[WEATHER], tool_choice="required", max_output_tokens=64))
    call = next(item for item in response.output if item.type == "function_call")
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
