"""Waiting for a generation's events while watching the client, and sending them as server-sent events."""

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import falcon

from mlx_server.api.errors import ClientGoneError, ErrorReply, describe
from mlx_server.api.middleware import AccessLog
from mlx_server.chat.generation import Generation
from mlx_server.chat.types import Event
from mlx_server.errors import ServerError

log = logging.getLogger(__name__)

# What the first answer waits for, so that an early failure has an HTTP status of its own, also for streams; then the
# longest silence in a stream.
FIRST_EVENT_S = KEEP_ALIVE_S = 5.0
CLIENT_CHECK_S = 0.1


class Client:
    """The client's end of the connection. Under another server than gunicorn it always seems to be there."""

    def __init__(self, req: falcon.Request) -> None:
        self._socket: socket.socket | None = req.env.get("gunicorn.socket")
        self.request_id: str = req.env.get(AccessLog.ID_KEY, "-")

    def check(self) -> None:
        """ClientGoneError if the client has closed the connection, or its sending half."""
        if self._socket is None:
            return
        try:
            gone = self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        if gone:
            raise ClientGoneError


def wait_for_events(generation: Generation, client: Client, timeout_s: float) -> list[Event]:
    """The next events, or an empty list after `timeout_s`. ClientGoneError if nobody waits for them any more."""
    deadline = time.monotonic() + timeout_s
    while True:
        remaining_s = deadline - time.monotonic()
        events = generation.poll(min(max(remaining_s, 0.0), CLIENT_CHECK_S))
        if events or remaining_s <= 0:
            return events
        client.check()


class Encoder(Protocol):
    """One protocol's way to write a stream; each method gives zero or more whole frames."""

    def start(self) -> bytes: ...
    def events(self, events: Sequence[Event]) -> bytes: ...
    def end(self) -> bytes: ...
    def keep_alive(self) -> bytes: ...
    def error(self, reply: ErrorReply) -> bytes: ...


class SseBody:
    """The body of a streamed answer: one piece for each step of the engine, comments while nothing comes.

    An object, not a generator: the server closes it also when it never started, and that must end the generation.
    """

    def __init__(self, generation: Generation, encoder: Encoder, client: Client, first: Sequence[Event]) -> None:
        self._generation = generation
        self._encoder = encoder
        self._client = client
        self._first: Sequence[Event] | None = first

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._first is None and self._generation.finished:
            raise StopIteration
        try:
            return self._next_piece()
        except ClientGoneError:
            raise StopIteration from None
        except Exception as error:  # the status is sent: only an event can tell the client, also of a fault of ours
            if not isinstance(error, ServerError):
                log.exception("request %s failed", self._client.request_id)
            self._first = None
            self._generation.close()
            return self._encoder.error(describe(error))

    def _next_piece(self) -> bytes:
        if self._first is not None:
            piece = self._encoder.start() + self._frames(self._first)
            self._first = None
            return piece
        events = wait_for_events(self._generation, self._client, KEEP_ALIVE_S)
        return self._frames(events) or self._encoder.keep_alive()

    def close(self) -> None:
        self._generation.close()

    def _frames(self, events: Sequence[Event]) -> bytes:
        frames = self._encoder.events(events)
        return frames + self._encoder.end() if self._generation.finished else frames


def stream(resp: falcon.Response, body: SseBody) -> None:
    """Answer with `body`."""
    resp.content_type = "text/event-stream"
    resp.set_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
    resp.stream = body


def frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
