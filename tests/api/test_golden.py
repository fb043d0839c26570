"""Streams, byte for byte: golden/<protocol>_<case>.txt. To rewrite one, delete it: what is missing is written, and the
test fails once."""

import io
import json
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import falcon.testing
import pytest
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from fake_engine import TIMINGS, Backend, Script, fake_model, until
from mlx_server.chat.reasoning import Tags
from mlx_server.wire import Failed, Finished, Progress, RequestOutput, Submit, Tokens

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"name": "f", "parameters": SCHEMA}
HELLO = [{"role": "user", "content": "Hi"}]
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 200, "stream_options": {"include_usage": True}}),
    "completions": ("/v1/completions", {"prompt": "Hi", "max_tokens": 200, "stream_options": {"include_usage": True}}),
    "messages": ("/v1/messages", {"messages": HELLO, "max_tokens": 200}),
    "responses": ("/v1/responses", {"input": "Hi", "max_output_tokens": 200}),
}
TOOLS: dict[str, dict[str, Any]] = {
    "chat": {"tools": [{"type": "function", "function": FUNCTION}]},
    "messages": {"tools": [{"name": "f", "input_schema": SCHEMA}]},
    "responses": {"tools": [{"type": "function", **FUNCTION}]},
}
STOP = {"messages": "stop_sequences"}  # its name, where it is not `stop`
EVENT_TYPES: dict[str, TypeAdapter[Any]] = {  # completions' knows no null of a choice that is open
    "chat": TypeAdapter(ChatCompletionChunk),
    "messages": TypeAdapter(RawMessageStreamEvent),
    "responses": TypeAdapter(ResponseStreamEvent),
}
LACKS = {"completions": ("tools", "reasoning"), "responses": ("stop_string",)}


class Case(NamedTuple):
    """What the engine writes: a piece a step, each of which gives the client something."""

    pieces: tuple[str, ...]
    end: str = "stop"  # or length, failure; disconnect: the client leaves


CASES = {
    "text": Case(("Grüße", " 👋🏽", "!")),
    "tools": Case(
        (
            "I look.",
            '\n<tool_call>\n{"name": "f", "arguments": {"a"',
            ": 1}}",
            '\n</tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        )
    ),
    "reasoning": Case(("<think>\nI think", " hard.\n</think>\n\nHello", "!")),
    "length": Case(("Hel", "lo"), "length"),
    "stop_string": Case(("Hello, w", "orld", "END of it")),
    "error": Case(("so far",), "failure"),
    "disconnect": Case(("so", " far"), "disconnect"),
}
TRANSCRIPTS = [(protocol, case) for protocol in PROTOCOLS for case in CASES if case not in LACKS.get(protocol, ())]


def stepwise(case: Case, permits: threading.Semaphore) -> Script:
    """The engine's part; each step waits until the client asks for more."""

    def outputs(submit: Submit) -> Iterator[RequestOutput]:
        num_prompt = len(submit.prompt_token_ids)
        yield Progress(submit.request_id, num_prompt, 2, num_prompt)
        num_tokens = 0
        for piece in case.pieces:
            num_tokens += len(piece.encode())
            yield Tokens(submit.request_id, list(piece.encode()))
        if case.end == "failure":
            yield Failed(submit.request_id, "engine_died", "The engine failed.")
        else:
            reason = "length" if case.end == "length" else "stop"
            yield Finished(submit.request_id, [], reason, 2, num_tokens + (reason == "stop"), timings=TIMINGS)

    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        for output in outputs(submit):
            while not permits.acquire(blocking=False):
                yield None
            yield output

    return script


def transcript(backend: Backend, protocol: str, case: Case, fields: dict[str, Any]) -> bytes:
    """The body of a streamed answer."""
    is_told_progress = protocol == "messages"  # its first event says what the cache had
    permits = threading.Semaphore(1 if is_told_progress else 2)
    backend.engine.script = stepwise(case, permits)
    path, prompt = PROTOCOLS[protocol]
    body = {"model": "tiny", "stream": True} | prompt | fields
    model = fake_model(reasoning_tags=Tags("<think>", "</think>"))
    with Conversation(backend.app(model=model), path, body) as conversation:
        received = conversation.read()
        for _ in case.pieces if is_told_progress else case.pieces[1:]:
            permits.release()
            received += conversation.read()
        if case.end == "disconnect":
            conversation.leave()
        else:
            permits.release()
        return received + b"".join(conversation)


class Conversation(Iterator[bytes]):
    """A request to a WSGI app over a socket that the client may close."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self._server, self._client = socket.socketpair()
        environ = falcon.testing.create_environ(
            path, method="POST", body=json.dumps(body), headers={"content-type": "application/json"}, host="localhost"
        )
        environ["gunicorn.socket"] = self._server
        environ["wsgi.errors"] = io.StringIO()
        self.status = ""
        self._answer: Iterable[bytes] = app(environ, self._start)
        self._pieces = iter(self._answer)
        assert self.status == "200 OK", b"".join(self._pieces)

    def __enter__(self) -> "Conversation":  # noqa: PYI034 - Self is Python 3.11's
        return self

    def __exit__(self, *_: object) -> None:
        self._answer.close()  # type: ignore[attr-defined]
        self._server.close()
        self._client.close()

    def __next__(self) -> bytes:
        return next(self._pieces)

    def read(self) -> bytes:
        """What one step of the engine gives."""
        while not (piece := next(self._pieces)):
            pass
        return piece

    def leave(self) -> None:
        self._client.close()

    def _start(self, status: str, _headers: Any, _error: Any = None) -> None:
        self.status = status


def anonymous(sse: bytes) -> bytes:
    """Without what is another one each time."""
    for pattern, replacement in (
        (rb'"(chatcmpl-|cmpl-|msg_|rs_|fc_|call_|toolu_|resp_)[0-9a-f]+(_\d+)?"', rb'"\1ID\2"'),
        (rb'"(created|created_at|completed_at)":\d+', rb'"\1":0'),
        (rb'"request_id":"[^"]+"', rb'"request_id":"ID"'),
        (rb'"timings":\{[^}]*\}', rb'"timings":{}'),
    ):
        sse = re.sub(pattern, replacement, sse)
    return sse


@pytest.mark.parametrize(("protocol", "name"), TRANSCRIPTS)
def test_a_stream_is_what_it_was(backend: Backend, protocol: str, name: str) -> None:
    fields = TOOLS[protocol] if name == "tools" else {}
    if name == "stop_string":
        fields = {STOP.get(protocol, "stop"): ["END"]}
    actual = anonymous(transcript(backend, protocol, CASES[name], fields))
    golden = GOLDEN / f"{protocol}_{name}.txt"
    if not golden.exists():
        golden.write_bytes(actual)
        pytest.fail(f"{golden} was missing; read what is in it now")
    assert actual.decode() == golden.read_text()
    if name == "disconnect":
        until(lambda: len(backend.engine.cancelled) == 1)


@pytest.mark.parametrize(("protocol", "name"), [case for case in TRANSCRIPTS if case[0] in EVENT_TYPES])
def test_a_stream_is_of_the_official_types(protocol: str, name: str) -> None:
    """But for errors, of which the SDKs have no type in streams."""
    frames = (GOLDEN / f"{protocol}_{name}.txt").read_text().split("\n\n")[:-1]
    events = [frame.rpartition("data: ")[2] for frame in frames]
    events = [event for event in events if event != "[DONE]" and "error" not in json.loads(event)]
    assert events
    for event in events:
        EVENT_TYPES[protocol].validate_json(event, strict=True)
