"""What the official SDKs add to plain requests, on a real server: helpers, parsing, tool runners, async clients."""

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import httpx2
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_tool
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel

from agent_requests import CLAUDE_CODE_HEADERS, claude_code
from e2e_server import PARIS
from server_process import ServerProcess

pytestmark = pytest.mark.model

GREEDY: dict[str, Any] = {"model": "default", "temperature": 0}
HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


class Weather(BaseModel):
    """Look up the weather."""

    city: Literal["Paris", "Rome"]
    celsius: bool


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url(), api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_openais_streaming_helper(client: OpenAI) -> None:
    with client.chat.completions.stream(messages=PARIS, max_tokens=24, **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "Paris" in "".join(deltas) == final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_openais_parse(client: OpenAI) -> None:
    completion = client.chat.completions.parse(messages=PARIS, max_tokens=64, response_format=Weather, **GREEDY)
    assert isinstance(completion.choices[0].message.parsed, Weather)
    tools = [pydantic_function_tool(Weather)]
    completion = client.chat.completions.parse(
        messages=PARIS, max_tokens=64, tools=tools, tool_choice="required", parallel_tool_calls=False, **GREEDY
    )
    [call] = completion.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_the_async_clients(server: ServerProcess) -> None:
    async def both() -> tuple[str, str]:
        async with (
            AsyncOpenAI(base_url=f"{server.url()}/v1", api_key="none", max_retries=0) as openai,
            AsyncAnthropic(base_url=server.url(), api_key="none", max_retries=0) as claude,
        ):
            chunks = await openai.chat.completions.create(messages=PARIS, max_tokens=24, stream=True, **GREEDY)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            async with claude.messages.stream(
                model="default", max_tokens=24, messages=PARIS, extra_body={"temperature": 0}
            ) as stream:
                return text, "".join([piece async for piece in stream.text_stream])

    first, second = asyncio.run(both())
    assert "Paris" in first == second


def test_anthropics_parse(claude: Anthropic) -> None:
    message = claude.messages.parse(model="default", max_tokens=64, messages=PARIS, output_format=Weather)
    assert isinstance(message.parsed_output, Weather)


@pytest.mark.parametrize("streamed", [False, True])
def test_anthropics_tool_runner(claude: Anthropic, streamed: bool) -> None:
    """Which asks for message threads, and sends everything after our refusal of them."""
    asked: list[str] = []

    @beta_tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Look up the weather."""
        asked.append(city)
        return "It rains."

    runner = claude.beta.messages.tool_runner(
        model="default",
        max_tokens=64,
        messages=HELLO,
        tools=[get_weather],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        max_iterations=2,
        stream=streamed,
    )
    turns: list[Any] = [turn.get_final_message() if streamed else turn for turn in runner]  # type: ignore[union-attr]
    assert [turn.stop_reason for turn in turns] == ["tool_use", "tool_use"]
    assert asked and set(asked) <= {"Paris", "Rome"}
    assert turns[1].usage.cache_read_input_tokens > 0


def test_a_request_of_the_old_sdks(server: ServerProcess) -> None:
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01"}
    body = {"model": "default", "max_tokens": 24, "messages": PARIS, "temperature": 0.0, "top_k": 1, "top_p": 1.0}
    response = httpx2.post(f"{server.url()}/v1/messages", json=body, headers=headers, timeout=60)
    assert response.status_code == 200
    assert "Paris" in response.json()["content"][0]["text"]


def test_claude_codes_next_request_reads_the_cache(server: ServerProcess) -> None:
    """Although its first system block is another one each time."""
    for request in (1, 2):
        body = claude_code(request) | {"stream": False, "max_tokens": 4}
        url = f"{server.url()}/v1/messages?beta=true"
        response = httpx2.post(url, json=body, headers=CLAUDE_CODE_HEADERS, timeout=120)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
    assert usage["cache_read_input_tokens"] > 1000
    assert usage["input_tokens"] < 64
