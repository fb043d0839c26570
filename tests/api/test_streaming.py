"""The streamed answer, frame by frame."""

import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk

from fake_engine import Backend, Post, answer, endless, failing, silent, until
from mlx_server.api.errors import ClientGoneError
from mlx_server.api.openai.chat import ChatWriter
from mlx_server.api.openai.types import ChatCompletionRequest
from mlx_server.api.sse import Client, SseBody
from mlx_server.chat.generation import Generation
from mlx_server.chat.types import ChatMessage, ChatRequest
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import Finished, RequestOutput, Submit, Tokens


def frames(text: str) -> list[str]:
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def chunks(text: str) -> list[dict[str, Any]]:
    """The data of a stream that ended well, without comments."""
    data = [frame.removeprefix("data: ") for frame in frames(text) if not frame.startswith(":")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def content(stream: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream if chunk["choices"])


def test_a_stream(post: Post) -> None:
    result = post(stream=True)
    assert result.headers["content-type"] == "text/event-stream"
    assert result.headers["cache-control"] == "no-cache"
    assert result.headers["x-accel-buffering"] == "no"
    assert "content-length" not in result.headers
    stream = chunks(result.text)
    for chunk in stream:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert "usage" not in chunk
    assert [chunk["choices"] for chunk in (stream[0], stream[-1])] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}],
    ]
    for chunk in stream[1:-1]:
        (choice,) = chunk["choices"]
        assert choice["delta"].keys() == {"content"} and choice["finish_reason"] is None
    assert content(stream) == "Hello!"


def test_all_chunks_have_one_head(post: Post) -> None:
    stream = chunks(post(stream=True, model="default").text)
    heads = [
        {key: chunk[key] for key in ("id", "object", "created", "model", "system_fingerprint")} for chunk in stream
    ]
    assert all(head == heads[0] for head in heads)
    assert heads[0]["model"] == "default"


def test_usage_comes_last_when_asked_for(post: Post) -> None:
    stream = chunks(post(stream=True, stream_options={"include_usage": True}).text)
    assert stream[-1]["choices"] == []
    usage = stream[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (9, 7, 16)
    assert [chunk["usage"] for chunk in stream[:-1]] == [None] * (len(stream) - 1)


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"include_usage": None}, {"include_obfuscation": True}]
)
def test_no_usage_where_it_is_not_asked_for(post: Post, options: dict[str, Any] | None) -> None:
    stream = chunks(post(stream=True, stream_options=options).text)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in stream)


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_tokens": 4}, {"stop": "lo"}, {"stop": ["o, w"]}, {"max_tokens": 3, "stop": "lx"}, {"max_tokens": 1}],
)
def test_a_stream_and_a_whole_answer_are_the_same(backend: Backend, post: Post, fields: dict[str, Any]) -> None:
    backend.engine.script = answer("Hello, wörld 😀")
    whole = post(**fields).json
    stream = chunks(post(stream=True, stream_options={"include_usage": True}, **fields).text)
    assert content(stream) == whole["choices"][0]["message"]["content"]
    assert stream[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert stream[-1]["usage"] == whole["usage"]


def test_characters_are_never_split(backend: Backend, post: Post) -> None:
    """The fake engine's tokens are bytes; half a character would be U+FFFD."""
    backend.engine.script = answer("a😀é漢")
    assert content(chunks(post(stream=True).text)) == "a😀é漢"


def test_an_empty_answer(backend: Backend, post: Post) -> None:
    backend.engine.script = answer("")
    stream = chunks(post(stream=True).text)
    assert [chunk["choices"][0]["finish_reason"] for chunk in stream] == [None, "stop"]


@pytest.mark.usefixtures("outputs_one_by_one")
def test_one_step_is_one_chunk(backend: Backend, post: Post) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput]:
        yield Tokens(submit.request_id, list(b"one "))
        yield Finished(submit.request_id, list(b"two"), "length", 0, 7)

    backend.engine.script = script
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks(post(stream=True).text)]
    assert deltas == ["", "one ", "two", None]


@pytest.mark.usefixtures("outputs_one_by_one")
def test_a_failure_in_the_stream_is_its_last_event(backend: Backend, post: Post) -> None:
    backend.engine.script = failing("engine_died", after="so far")
    result = post(stream=True)
    assert result.status_code == 200
    *good, last = frames(result.text)
    assert content([json.loads(frame.removeprefix("data: ")) for frame in good]) == "so far"
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {"message": "The engine failed.", "type": "server_error", "param": None, "code": "engine_died"}
    }


def test_a_timeout_in_the_stream_is_its_last_event(
    backend: Backend, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.engine.script = endless
    generation, body = make_body(backend, timeout_s=0.2)
    *_, last = body
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "request_timeout"
    assert generation.finished


def test_comments_fill_silence(backend: Backend, post: Post, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_server.api.sse.KEEP_ALIVE_S", 0.02)
    go = threading.Event()

    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        while not go.is_set():
            yield None
        yield Finished(submit.request_id, list(b"late"), "length", 0, 4)

    backend.engine.script = script
    _, body = make_body(backend)
    received = list(itertools.islice(body, 4))
    assert b'"role":"assistant"' in received[0]
    assert received[1:] == [b": keep-alive\n\n"] * 3
    go.set()
    assert b"late" in b"".join(body)


def test_text_that_is_held_back_is_silence_too(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_server.api.sse.KEEP_ALIVE_S", 0.02)
    backend.engine.script = endless
    _, body = make_body(backend, stop=["x" * 100_000])
    received = list(itertools.islice(body, 3))
    assert received[1:] == [b": keep-alive\n\n"] * 2
    body.close()


def make_body(
    backend: Backend, *, timeout_s: float = 30.0, stop: list[str] | None = None
) -> tuple[Generation, SseBody]:
    from falcon.testing import create_req  # noqa: PLC0415

    from fake_engine import fake_model  # noqa: PLC0415

    request = ChatRequest(
        messages=[ChatMessage(role="user", content="hi")], sampling=SamplingParams(), max_tokens=50, stop=stop or []
    )
    generation = Generation(fake_model(), backend.client, request, timeout_s)
    return generation, SseBody(
        generation, ChatWriter(ChatCompletionRequest(model="m", messages=[]), "f"), Client(create_req()), []
    )


def test_closing_a_body_that_never_started_cancels(backend: Backend) -> None:
    backend.engine.script = silent
    _, body = make_body(backend)
    until(lambda: backend.engine.running)
    body.close()
    until(lambda: backend.engine.cancelled)


def test_closing_a_body_in_the_middle_cancels(backend: Backend) -> None:
    backend.engine.script = endless
    _, body = make_body(backend)
    next(body)
    next(body)
    body.close()
    until(lambda: backend.engine.cancelled)
    assert list(body) == []


def test_a_client_that_left_ends_the_stream(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Client) -> None:
        raise ClientGoneError

    backend.engine.script = silent
    _, body = make_body(backend)
    next(body)
    monkeypatch.setattr(Client, "check", gone)
    assert list(body) == []
