"""Generations on the fake engine."""

from typing import Any

from fake_engine import Backend, fake_model
from mlx_server.chat.generation import Generation
from mlx_server.chat.types import (
    ChatMessage,
    ChatRequest,
    Done,
    TextDelta,
)
from mlx_server.sampling_params import SamplingParams


def start(backend: Backend, *, timeout_s: float = 30.0, **changes: Any) -> Generation:
    fields: dict[str, Any] = {"sampling": SamplingParams(seed=1), "max_tokens": 50}
    request = ChatRequest(**({"messages": [ChatMessage(role="user", content="hi")]} | fields | changes))
    return Generation(fake_model(), backend.client, request, timeout_s)


def collect(generation: Generation) -> tuple[str, Done]:
    *deltas, done = generation
    assert isinstance(done, Done)
    texts = [delta.text for delta in deltas if isinstance(delta, TextDelta)]
    assert all(texts)
    return "".join(texts), done
