"""Many clients at once: coroutines that speak plain HTTP, so that they take little of the machine from the server."""

import asyncio
import random
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from e2e_server import PARIS, STORY, num_requests
from server_process import ServerProcess, until

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
PATIENCE_S = 240.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes
    took_s: float

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Caller:
    """One connection with one request; leaving it early resets the connection."""

    def __init__(self, url: str, path: str, body: bytes | None = None) -> None:
        self._address = urlsplit(url)
        method = "GET" if body is None else "POST"
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\nConnection: close\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._request = head.encode() + b"\r\n" + (body or b"")

    async def send(self) -> None:
        self.reader, self._writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        self._start_s = time.monotonic()
        self._writer.write(self._request)

    async def receive(self) -> Reply:
        """All of the answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await self.reader.read()
        if headers.get("transfer-encoding") == "chunked":
            body = _unchunked(body)
        return Reply(int(status_line.split()[1]), headers, body, time.monotonic() - self._start_s)

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        if not self._writer.is_closing():
            sock: socket.socket = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._writer.transport.abort()


def _unchunked(body: bytes) -> bytes:
    content = b""
    while True:
        size, _, rest = body.partition(b"\r\n")
        if not int(size, 16):
            return content
        content, body = content + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


async def ask(url: str, path: str, body: bytes | None = None) -> Reply:
    caller = Caller(url, path, body)
    await caller.send()
    try:
        return await asyncio.wait_for(caller.receive(), PATIENCE_S)
    finally:
        caller.close()


async def leave(url: str, path: str, body: bytes, *, after_bytes: int) -> None:
    """Send a request, and reset the connection when so much of the answer has come."""
    caller = Caller(url, path, body)
    await caller.send()
    try:
        await asyncio.wait_for(caller.reader.readexactly(after_bytes), PATIENCE_S)
    finally:
        caller.reset()


def chat(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "default", "messages": PARIS, "max_tokens": 4, "temperature": 0} | fields)


def text_of(reply: Reply) -> str:
    """Of a chat's answer that is not streamed."""
    assert reply.status == 200, reply.body
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


# --- all kinds of requests ---

_SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": _SCHEMA}}
# Path, body and the status that it must get.
_KINDS: list[tuple[str, dict[str, Any] | bytes | None, int]] = [
    (CHAT, {}, 200),
    (CHAT, {"stream": True}, 200),
    (CHAT, {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "n": 2, "logprobs": True, "top_logprobs": 3}, 200),
    (CHAT, {"logit_bias": {"28": 100}, "frequency_penalty": 2, "dry_multiplier": 0.8}, 200),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}}, 200),
    (CHAT, {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 30, "stream": True}, 200),
    (COMPLETIONS, {"messages": None, "prompt": ["Once upon", "a time"], "echo": True, "logprobs": 2}, 200),
    (MESSAGES, {"stream": True}, 200),
    ("/v1/messages/count_tokens", {"max_tokens": None}, 200),
    ("/v1/responses", {"messages": None, "max_tokens": None, "input": "Hi", "max_output_tokens": 16}, 200),
    ("/v1/embeddings", {"messages": None, "max_tokens": None, "temperature": None, "input": ["a", "b c"]}, 200),
    ("/tokenize", {"messages": None, "max_tokens": None, "temperature": None, "prompt": "some words"}, 200),
    ("/v1/models", None, 200),
    ("/metrics", None, 200),
    ("/health", None, 200),
    ("/nowhere", None, 404),
    (CHAT, {"model": "gpt-99"}, 404),
    (CHAT, {"stop": 7}, 400),
    (CHAT, {"temperature": -1}, 400),
    (CHAT, {"logit_bias": {str(10**12): 1}}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 9000}]}, 400),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/no"}}}}, 400),
    (COMPLETIONS, {"messages": None, "prompt": [10**6]}, 400),
    (CHAT, b'{"model": "default", "messages": [', 400),
    (CHAT, b"\xff\xfe" * 500, 400),
]
_LEAVERS: list[tuple[dict[str, Any], int]] = [({}, 0), ({"stream": True}, 0), ({"stream": True}, 600)]


async def any_request(url: str, rng: random.Random) -> None:
    """One request of any kind, right or wrong, answered or left; the answer's status is checked."""
    number = rng.randrange(len(_KINDS) + len(_LEAVERS))
    if number >= len(_KINDS):
        fields, after_bytes = _LEAVERS[number - len(_KINDS)]
        body = chat(messages=STORY, max_tokens=500, temperature=2, **fields)
        await leave(url, CHAT, body, after_bytes=after_bytes)
        return
    path, fields_or_body, status = _KINDS[number]
    if isinstance(fields_or_body, dict):
        given = msgspec.json.decode(chat()) | fields_or_body
        fields_or_body = msgspec.json.encode({name: value for name, value in given.items() if value is not None})
    reply = await ask(url, path, fields_or_body)
    assert reply.status == status, (path, fields_or_body, reply)


async def crowd(num_requests: int, num_at_once: int, request: Callable[[], Any]) -> None:
    """So many requests, each begun when one before it has ended."""
    left = iter(range(num_requests))

    async def one_client() -> None:
        for _ in left:
            await request()

    await asyncio.gather(*(one_client() for _ in range(num_at_once)))


async def leave_together(server: ServerProcess, count: int) -> None:
    """So many clients with endless answers, half of them streams, which leave when all are in the engine."""
    bodies = [chat(messages=STORY, ignore_eos=True, max_tokens=4000, stream=i % 2 == 0) for i in range(count)]
    callers = [Caller(server.url(), CHAT, body) for body in bodies]
    await asyncio.gather(*(caller.send() for caller in callers))
    await asyncio.to_thread(until, lambda: num_requests(server) == count, f"{count} requests in the engine", 120)
    for caller in callers:
        caller.reset()
