"""Requests as they come in, piece by piece: where a head and a body end, how large and how slow they may be.

Nothing here waits, and nothing knows which server reads the bytes and parses a head.
"""

import contextlib
import io
import logging
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

import msgspec
from falcon import code_to_http_status

from mlx_server.api.body import MAX_BODY_BYTES, incomplete, too_large
from mlx_server.api.errors import HttpError, answer, describe
from mlx_server.api.middleware import Cors, new_request_id

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 << 10
MAX_URI_BYTES = 8 << 10
MAX_FIELDS = 100

_MAX_LINE_BYTES = 8 << 10  # of a chunk's size with its extensions; of all trailers
_MAX_FRAMING_BYTES = 1 << 20  # of all chunks' sizes and ends: a body in tiny chunks costs more than its bytes
_END_OF_HEAD = b"\r\n\r\n"
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")


class ClientLimits(msgspec.Struct, frozen=True):
    """What the server bears of its clients, beside the limits on sizes."""

    idle_s: int = 75  # without a request
    head_s: float = 10.0  # from a request's first byte to the end of its head
    body_s: float = 20.0  # from there to the body's end, and a second more for each `min_body_rate`
    min_body_rate: int = 1024  # bytes a second
    send_s: int = 20  # the client takes nothing of its answer
    linger_s: float = 2.0  # after the last answer: the client has not closed
    drain_s: int = 30  # from the stop signal to the end of what still runs
    max_pending_bytes: int = 256 << 20  # that a worker holds of requests which are not complete


class Request(Protocol):
    """What the server makes of a head."""

    path: str
    headers: list[tuple[str, str]]  # names in upper case
    body: Any


_R = TypeVar("_R", bound=Request)


@dataclass(frozen=True)
class Head(Generic[_R]):
    """A request of which only the head has come."""

    request: _R
    body: "Body"  # to be fed
    expects_continue: bool  # the client waits for a word before it sends the body


class Connection(Generic[_R]):
    """A client's connection, and as much of its next request as has come.

    Attributes:
        sock: the client's socket.
        client, server: addresses.
        received: bytes that belong to no head or body yet.
        request: from the end of its head on.
        lingering: answered for the last time; what still comes is dropped.
        num_counted: for whoever adds up `num_bytes` of all connections.
    """

    def __init__(
        self, sock: socket.socket, client: Any, server: Any, parse: Callable[[bytes], Head[_R]], limits: ClientLimits
    ) -> None:
        """`parse` raises HttpError for a head that it can't read."""
        self.sock = sock
        self.client = client
        self.server = server
        self.received = bytearray()
        self.request: _R | None = None
        self.lingering = False
        self.num_counted = 0
        self._parse = parse
        self._limits = limits
        self._head = b""
        self._body: Body | None = None
        self._deadline = time.monotonic() + limits.idle_s

    @property
    def is_idle(self) -> bool:
        return self.request is None and not self.received and not self.lingering

    @property
    def num_bytes(self) -> int:
        return len(self.received) + (len(self._body.content) if self._body is not None else 0)

    def expect_request(self) -> None:
        """The last request is answered."""
        self.request = self._body = None
        self._head = b""
        self._deadline = time.monotonic() + (self._limits.head_s if self.received else self._limits.idle_s)

    def feed(self, data: bytes) -> None:
        """More bytes have come."""
        if self.is_idle:
            self._deadline = time.monotonic() + self._limits.head_s
        self.received += data

    def read_request(self) -> _R | None:
        """The request with its whole body, once, when that has come. HttpError if it is none, or too large."""
        if self.request is None:
            head = take_head(self.received)
            if head is None:
                return None
            self._head = head
            parsed = self._parse(head)
            self.request, self._body = parsed.request, parsed.body
            self._deadline = time.monotonic() + self._limits.body_s
            if parsed.expects_continue:
                self.send_at_once(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert self._body is not None
        if not self._body.feed(self.received):
            return None
        self.request.body = io.BytesIO(self._body.content)
        self._body = None  # held once, by the request
        return self.request

    def is_late(self, now: float) -> bool:
        grace_s = len(self._body.content) / self._limits.min_body_rate if self._body is not None else 0.0
        return now > self._deadline + grace_s

    def end_by(self, deadline: float) -> None:
        """Let no deadline be later than this one; of requests that are coming neither."""
        self._deadline = min(self._deadline, deadline)

    def refuse(self, error: HttpError, cors: Cors) -> None:
        """Answer a request that reaches no resource; the connection is to be closed."""
        path, headers = self._target()
        request_id = new_request_id()
        status, fields, body = answer(describe(error), path, headers, request_id)
        log.info("%s - %s %s", request_id, quote(path[:200]), status)
        fields |= cors.headers(headers.get("ORIGIN")) | {
            "x-request-id": request_id,
            "request-id": request_id,
            "content-length": str(len(body)),
            "connection": "close",
        }
        lines = [f"HTTP/1.1 {code_to_http_status(status)}", *(f"{name}: {value}" for name, value in fields.items())]
        is_head = (self._head or self.received).startswith(b"HEAD ")
        self.send_at_once("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if is_head else body))

    def _target(self) -> tuple[str, dict[str, str]]:
        """Path and headers of the request, as far as they are known: "-" and none at first."""
        if self.request is not None:
            return self.request.path, dict(self.request.headers)
        return read_target(self._head or bytes(self.received[:MAX_HEAD_BYTES]))

    def send_at_once(self, data: bytes) -> None:
        """Send what fits into the kernel's buffer: all of it, unless the client reads nothing that it is sent."""
        with contextlib.suppress(OSError):
            self.sock.send(data)

    def start_to_linger(self) -> bool:
        """End the sending half; drop what came, and what still comes for a while. False if the client is gone."""
        self.received.clear()
        self.expect_request()
        self.end_by(time.monotonic() + self._limits.linger_s)
        self.lingering = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            return False
        return True


def take_head(data: bytearray) -> bytes | None:
    """A request's head with its empty line, taken from `data`; None if more bytes are needed.

    HttpError if it is too large. A line that ends in a bare LF counts as the end: it can't become a valid head.
    """
    end = data.find(_END_OF_HEAD)
    size = end + len(_END_OF_HEAD) if end >= 0 else len(data)
    line_end = data.find(b"\r\n")
    if (line_end if line_end >= 0 else len(data)) > MAX_URI_BYTES:
        raise HttpError(414, "uri_too_long", f"The request's first line is longer than {MAX_URI_BYTES} bytes.")
    if size > MAX_HEAD_BYTES:
        raise headers_too_large()
    if end < 0 and data.count(b"\n") == data.count(b"\r\n"):
        return None
    head = bytes(data[:size])
    del data[:size]
    return head


def read_target(head: bytes) -> tuple[str, dict[str, str]]:
    """Path and headers of a head that is malformed, or of which more is to come: those that can be made out."""
    text, end, _ = head.decode("latin-1").partition("\r\n\r\n")
    first, *lines = text.split("\r\n")
    words = first.split(" ", 2)
    path = words[1].partition("?")[0] if len(words) > 1 else "-"
    fields = (line.partition(":") for line in (lines if end else lines[:-1]) if line.isprintable())
    return path, {name.strip().upper(): value.strip() for name, _, value in fields}


def headers_too_large() -> HttpError:
    return HttpError(
        431,
        "headers_too_large",
        f"The request's head has more than {MAX_FIELDS} fields, {MAX_URI_BYTES} bytes in a field or "
        f"{MAX_HEAD_BYTES} bytes in all.",
    )


class Body(Protocol):
    """A body on its way."""

    content: bytearray

    def feed(self, data: bytearray) -> bool:
        """Take the body's bytes from the front of `data`. Whether the body is complete."""


class LengthBody:
    """A body with a Content-Length, perhaps 0. HttpError at once if it will be too large."""

    def __init__(self, size_bytes: int) -> None:
        if size_bytes > MAX_BODY_BYTES:
            raise too_large()
        self._size_bytes = size_bytes
        self.content = bytearray()

    def feed(self, data: bytearray) -> bool:
        _move(data, self.content, self._size_bytes - len(self.content))
        return len(self.content) == self._size_bytes


class ChunkedBody:
    """A body in chunks (RFC 9112, section 7.1); extensions and trailers are dropped."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._expected = "size"  # of a chunk; then its "data", the "end" of its line; after the last one "trailers"
        self._chunk_end = 0  # position in `content` where the chunk ends
        self._num_framing_bytes = 0
        self._num_trailer_bytes = 0

    def feed(self, data: bytearray) -> bool:
        """HttpError if the chunks are malformed or too large."""
        while self._expected != "nothing":
            if self._expected == "data":
                _move(data, self.content, self._chunk_end - len(self.content))
                if len(self.content) < self._chunk_end:
                    return False
                self._expected = "end"
            line_end = data.find(b"\r\n")
            if line_end < 0:
                if len(data) > (1 if self._expected == "end" else _MAX_LINE_BYTES):
                    raise incomplete()
                return False
            line = bytes(data[:line_end])
            del data[: line_end + 2]
            self._take_line(line)
        return True

    def _take_line(self, line: bytes) -> None:
        self._num_framing_bytes += len(line) + 2
        if self._num_framing_bytes > _MAX_FRAMING_BYTES:
            raise too_large()
        if self._expected == "trailers":
            self._num_trailer_bytes += len(line)
            if self._num_trailer_bytes > _MAX_LINE_BYTES:
                raise headers_too_large()
            if not line:
                self._expected = "nothing"
        elif self._expected == "end":
            if line:
                raise incomplete()
            self._expected = "size"
        else:
            match = _CHUNK_SIZE.fullmatch(line)
            if match is None:
                raise incomplete()
            size = int(match[1], 16)
            self._chunk_end = len(self.content) + size
            if self._chunk_end > MAX_BODY_BYTES:
                raise too_large()
            self._expected = "data" if size else "trailers"


def _move(source: bytearray, target: bytearray, size_bytes: int) -> None:
    """Move so many bytes, or all there are, from the front of `source` to the end of `target`."""
    taken = source[:size_bytes]
    target += taken
    del source[: len(taken)]
