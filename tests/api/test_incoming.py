"""Heads and bodies that come in pieces."""

import contextlib
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.api.body import MAX_BODY_BYTES
from mlx_server.api.errors import HttpError
from mlx_server.api.incoming import MAX_HEAD_BYTES, MAX_URI_BYTES, Body, ChunkedBody, LengthBody, take_head

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def feed(body: Body, data: bytes, cuts: list[int]) -> bytes | None:
    """What is left of `data` when it came in pieces; None if the body needs more."""
    received = bytearray()
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(bounds):
        received += data[start:end]
        if body.feed(received):
            return bytes(received) + data[end:]
    return None


def status(call: Callable[[], object]) -> int:
    with pytest.raises(HttpError) as error:
        call()
    return error.value.status


# --- heads ---


@given(cut=st.integers(0, len(HEAD)), rest=st.binary(max_size=9))
def test_a_head_ends_with_its_empty_line(cut: int, rest: bytes) -> None:
    data = bytearray(HEAD[:cut])
    if cut < len(HEAD):
        assert take_head(data) is None and data == HEAD[:cut]
    data += HEAD[cut:] + rest
    assert take_head(data) == HEAD
    assert data == rest


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: a\n\n", b"\n"])
def test_a_bare_line_feed_is_not_waited_on(data: bytes) -> None:
    assert take_head(bytearray(data)) == data


@pytest.mark.parametrize("end", [b"", b" HTTP/1.1", b" HTTP/1.1\r\n", b" HTTP/1.1\r\n\r\n"])
def test_long_first_lines(end: bytes) -> None:
    assert status(lambda: take_head(bytearray(b"GET /" + b"a" * MAX_URI_BYTES + end))) == 414


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_large_heads(end: bytes) -> None:
    lines = b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000
    assert len(lines + end) < MAX_HEAD_BYTES
    assert (take_head(bytearray(lines + end)) is None) is (not end)
    assert status(lambda: take_head(bytearray(lines + b"a: b\r\n" * 1000 + end))) == 431


# --- bodies ---


@given(content=st.binary(max_size=50), rest=st.binary(max_size=9), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_bodies_of_known_length(content: bytes, rest: bytes, cuts: list[int]) -> None:
    body = LengthBody(len(content))
    assert feed(body, content + rest, cuts) == rest
    assert bytes(body.content) == content
    if content:
        assert feed(LengthBody(len(content)), content[:-1], cuts) is None


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=20), max_size=4),
    extension=st.sampled_from([b"", b";a", b' ; a="b;c"']),
    trailers=st.sampled_from([b"", b"a: b\r\n", b"a: b\r\nc: d\r\n"]),
    rest=st.binary(max_size=9),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_chunked_bodies(chunks: list[bytes], extension: bytes, trailers: bytes, rest: bytes, cuts: list[int]) -> None:
    coded = b"".join(b"%X%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    coded += b"0%s\r\n%s\r\n" % (extension, trailers)
    body = ChunkedBody()
    assert feed(body, coded + rest, cuts) == rest
    assert bytes(body.content) == b"".join(chunks)
    assert feed(ChunkedBody(), coded[:-1], cuts) is None


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n", b"-1\r\n", b"\r\n", b" 1\r\na\r\n", b"0x1\r\na\r\n", b"1\r\nab\r\n", b"1 a\r\n", b"1;\0\r\n",
        b"1\n\r\n", b"f" * 9 + b"\r\n", b"1" * 9000, b"1;" + b"a" * 9000, b"1\r\na" + b"b" * 9000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("cuts", [[], [1], [2, 3, 4]])
def test_malformed_chunks(data: bytes, cuts: list[int]) -> None:
    assert status(lambda: feed(ChunkedBody(), data, cuts)) == 400


def test_bodies_have_a_size() -> None:
    assert status(lambda: LengthBody(MAX_BODY_BYTES + 1)) == 413
    assert status(lambda: feed(ChunkedBody(), b"%x\r\n" % (MAX_BODY_BYTES + 1), [])) == 413
    half = b"%x\r\n%s\r\n" % (MAX_BODY_BYTES // 2, b"a" * (MAX_BODY_BYTES // 2))
    assert status(lambda: feed(ChunkedBody(), half + half + b"1\r\n", [])) == 413
    body = ChunkedBody()
    assert feed(body, half + half + b"0\r\n\r\n", []) == b""
    assert len(body.content) == MAX_BODY_BYTES


def test_tiny_chunks_have_a_number() -> None:
    assert feed(ChunkedBody(), b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n", []) == b""
    assert status(lambda: feed(ChunkedBody(), b"1\r\na\r\n" * 250_000, [])) == 413


def test_trailers_have_a_size() -> None:
    assert status(lambda: feed(ChunkedBody(), b"0\r\n" + b"a: b\r\n" * 5000, [])) == 431


@given(data=st.binary(max_size=60), cuts=st.lists(st.integers(0, 60), max_size=3))
def test_any_bytes_are_chunks_or_an_error(data: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(HttpError):
        feed(ChunkedBody(), data, cuts)
