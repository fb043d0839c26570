"""Each place of the API's process where something can fail fails once: at its first call, at its second, and so on
until a run ends without. The client is told in its API's form, no work goes on for nobody, the next one is served."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import falcon.testing
import msgspec
import pytest

from api.test_http import make_client
from fail_once import failing
from fake_engine import Backend, ByteStream, ByteTokenizer, answer, until
from mlx_server.api import body
from mlx_server.api.anthropic.messages import MessageWriter
from mlx_server.api.openai.chat import ChatWriter
from mlx_server.api.openai.responses import ResponseWriter
from mlx_server.api.openai.responses_store import ResponseStore
from mlx_server.api.rate_limit import RateLimiter
from mlx_server.chat import plan
from mlx_server.chat.choice import ChoiceStream
from mlx_server.chat.embedding import EmbeddingRun
from mlx_server.chat.output_router import OutputRouter
from mlx_server.engine_client import EngineClient, EngineStream

POINTS: list[tuple[Any, str]] = [
    (RateLimiter, "admit"),
    (body, "_read"),
    (body, "unknown_fields"),
    (plan, "render_chat"),
    (ByteTokenizer, "encode"),
    (ByteTokenizer, "encode_chat"),
    (plan, "chat_grammar"),
    (EngineClient, "_submit"),
    (EngineStream, "get"),
    (EmbeddingRun, "poll"),
    (ChoiceStream, "take"),
    (ByteStream, "push"),
    (OutputRouter, "feed"),
    (OutputRouter, "finish"),
    (ChatWriter, "fold"),
    *[(writer, "start") for writer in (ChatWriter, MessageWriter, ResponseWriter)],
    *[(writer, "events") for writer in (ChatWriter, MessageWriter, ResponseWriter)],
    *[(writer, "end") for writer in (ChatWriter, MessageWriter, ResponseWriter)],
    (ResponseStore, "put"),
    (ResponseStore, "get"),
]
HI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
STREAM = {"stream": True}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", HI | {"n": 2, "response_format": SCHEMA}),
    ("/v1/chat/completions", HI | STREAM),
    ("/v1/messages", HI | STREAM | {"max_tokens": 20}),
    ("/v1/responses", {"model": "tiny", "input": "hi"} | STREAM),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}),
]


@pytest.fixture
def client(backend: Backend, tmp_path: Path) -> Iterator[falcon.testing.TestClient]:
    backend.engine.script = answer("H")
    limiter = RateLimiter(tmp_path / "rate", limit=1 << 30)
    yield make_client(backend, rate_limiter=limiter, responses=ResponseStore(tmp_path / "responses"))
    limiter.close()


def failures(client: falcon.testing.TestClient) -> int:
    """Of all kinds of requests, sent one after the other, so many failed, each with the right error."""
    num_failed = 0
    for path, fields in REQUESTS:
        result = client.simulate_post(path, json=fields)
        has_failed = is_failure(path, result)
        if path == "/v1/responses" and not has_failed:
            path = f"/v1/responses/{events(result.text)[-1]['response']['id']}"
            has_failed = is_failure(path, client.simulate_get(path))
        num_failed += has_failed
    return num_failed


def is_failure(path: str, result: falcon.testing.Result) -> bool:
    """Whether an answer says that something failed; then it says so as its API does, and nothing of what it was."""
    is_stream = result.headers["content-type"] == "text/event-stream"
    told: Any = events(result.text)[-1] if is_stream else result.json
    told = told.get("response", told)  # a response's stream ends with the whole of it
    error = told.get("error")
    if error is None:
        assert result.status_code == 200
        return False
    code = error["details"]["error_code"] if path == "/v1/messages" else error["code"]
    assert code in ("internal_error", "server_error")  # the latter is the only one that responses have
    assert result.status_code == (200 if is_stream else 500)
    assert "fails, as the test wants" not in result.text
    return True


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [msgspec.json.decode(line) for line in lines if line != "[DONE]"]


def test_the_run_without_a_fault(client: falcon.testing.TestClient) -> None:
    """It passes by every point at least once."""
    for owner, name in POINTS:
        with failing(owner, name, at=10_000) as fault:
            assert failures(client) == 0
        assert fault.num_calls > 0, name


@pytest.mark.parametrize("owner, name", POINTS, ids=[f"{owner.__name__}.{name}" for owner, name in POINTS])
def test_one_fault(backend: Backend, client: falcon.testing.TestClient, owner: Any, name: str) -> None:
    at = 0
    has_happened = True
    while has_happened:
        at += 1
        with failing(owner, name, at) as fault:
            num_failed = failures(client)
            has_happened = fault.has_happened
        assert num_failed == has_happened
        until(lambda: not backend.engine.running)
        assert not backend.client._streams
