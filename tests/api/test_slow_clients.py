"""Clients that are slow, too large, malformed or many, on real sockets: what they get, and that others don't notice."""

import http.client
import json
import re
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from api_process import CHAT, Process, request, running
from fake_engine import silent, until
from mlx_server.api.incoming import ClientLimits

BODY = json.dumps(request()).encode()
POST = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
WITH_LENGTH = POST + b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
MESSAGES = POST.replace(CHAT.encode(), b"/v1/messages")
ORIGIN = b"http://a:1"
FROM_A_PAGE = b"Origin: %s\r\n" % ORIGIN
OPENAI_KEYS = {"message", "type", "param", "code"}


def connect(process: Process, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", process.port), timeout=20)
    process.clients.append(connection)
    connection.sendall(data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    answer = b""
    while data := connection.recv(65536):
        answer += data
    return answer


def check_only_error(
    answer: bytes, status: int, code: str, *, anthropic: bool = False, origin: bytes | None = None
) -> None:
    """One answer, with an id, in an envelope. `origin`: of the page that may read it."""
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields[b"x-request-id"] == fields[b"request-id"] and fields[b"connection"] == b"close"
    assert fields.get(b"access-control-allow-origin") == origin
    assert (b"retry-after" in fields.get(b"access-control-expose-headers", b"")) is (origin is not None)
    error = json.loads(body)["error"]
    if anthropic:
        assert json.loads(body).keys() == {"type", "error", "request_id"}
        assert json.loads(body)["request_id"].encode() == fields[b"request-id"]
        assert error["details"]["error_code"] == code
    else:
        assert error.keys() == OPENAI_KEYS and error["code"] == code


# --- what is malformed or too large ---


@pytest.mark.parametrize(
    "head, status, code",
    [
        (b"GET /" + b"a" * 9000, 414, "uri_too_long"),
        (b"GET /" + b"a" * 8185 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "uri_too_long"),
        (GET + b"a: b\r\n" * 100 + b"\r\n", 431, "headers_too_large"),
        (GET + b"a: " + b"b" * 9000 + b"\r\n\r\n", 431, "headers_too_large"),
        (GET + b"a: %s\r\n" % (b"b" * 4000) * 9, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "malformed_request"),
        (b"\r\n\r\n", 400, "malformed_request"),
        (b"\x16\x03\x01\x02\x00\n", 400, "malformed_request"),
        (GET + b"Expect: magic\r\n\r\n", 417, "expectation_failed"),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: -5\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: +5\r\n\r\n", 400, "malformed_request"),
        (POST + b"Transfer-Encoding: magic\r\n\r\n", 400, "malformed_request"),
        (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 400, "malformed_request"),
        (POST + b"Content-Length: 8388609\r\n\r\n", 413, "request_too_large"),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400, "malformed_request"),
        (CHUNKED + b"800001\r\n", 413, "request_too_large"),
        (CHUNKED + b"5\r\n{\"a\":\r\nxyz\r\n", 400, "incomplete_body"),
        (CHUNKED + b"5\r\nabcdefghij", 400, "incomplete_body"),
    ],
)  # fmt: skip
def test_what_is_malformed_or_too_large_gets_one_answer(process: Process, head: bytes, status: int, code: str) -> None:
    check_only_error(read_all(connect(process, head)), status, code)
    assert not process.engine.submits


def test_malformed_requests_to_anthropics_paths(process: Process) -> None:
    for head in (b"POST /v1/messages?beta=true HTTP/1.1\r\nHost : a\r\n\r\n", b"POST /v1/messages HTTP/1.1\n"):
        check_only_error(read_all(connect(process, head)), 400, "malformed_request", anthropic=True)
    large = MESSAGES + b"Content-Length: 100000000\r\n\r\n"
    check_only_error(read_all(connect(process, large)), 413, "request_too_large", anthropic=True)


def test_no_host_is_refused_with_a_key_too(tmp_path: Path) -> None:
    with running(tmp_path, api_key="sesame") as process:
        head = b"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer sesame\r\nConnection: close\r\n\r\n"
        check_only_error(read_all(connect(process, head)), 400, "host_required")


def test_a_refusal_is_read_by_a_client_that_goes_on_sending(process: Process) -> None:
    connection = connect(process, POST + b"Content-Length: 100000000\r\n\r\n")
    connection.sendall(b" " * (4 << 20))
    check_only_error(read_all(connection), 413, "request_too_large")


def test_bodies_that_end_early(process: Process) -> None:
    for data in (WITH_LENGTH + BODY[:-1], CHUNKED + b"5\r\n{"):
        connection = connect(process, data)
        connection.shutdown(socket.SHUT_WR)
        check_only_error(read_all(connection), 400, "incomplete_body")


# --- pieces, pipelines, kept connections ---


def read_answers(connection: socket.socket, count: int) -> list[int]:
    """Statuses of so many answers with a Content-Length."""
    data = b""
    statuses: list[int] = []
    while len(statuses) < count:
        head, end, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if end and length and len(rest) >= int(length[1]):
            statuses.append(int(head.split(b" ")[1]))
            data = rest[int(length[1]) :]
        else:
            received = connection.recv(65536)
            assert received, (statuses, data)
            data += received
    assert data == b""
    return statuses


@pytest.mark.parametrize("piece_bytes", [1, 7, 100])
def test_requests_in_pieces(process: Process, piece_bytes: int) -> None:
    connection = connect(process)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    data = WITH_LENGTH + BODY
    for start in range(0, len(data), piece_bytes):
        connection.sendall(data[start : start + piece_bytes])
    assert read_answers(connection, 1) == [200]


def test_requests_one_behind_the_other(process: Process) -> None:
    chunked = CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection = connect(process, (WITH_LENGTH + BODY) * 2 + health * 3 + chunked + GET + b"\r\n" + health)
    assert read_answers(connection, 8) == [200] * 8
    connection.sendall(health * 500)
    assert read_answers(connection, 500) == [200] * 500


def test_the_body_of_a_refused_request_is_not_the_next_request(process: Process) -> None:
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    data = POST.replace(b"application/json", b"text/plain") + b"Content-Length: %d\r\n\r\n" % len(smuggled) + smuggled
    connection = connect(process, data + GET + b"Connection: close\r\n\r\n")
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", read_all(connection))
    assert statuses == [b"415", b"200"]


def test_expect_continue_is_answered_before_the_body_and_once(process: Process) -> None:
    connection = connect(process, POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
    assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(BODY)
    assert read_answers(connection, 1) == [200]


# --- time ---


@pytest.fixture(scope="module")
def impatient_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    limits = ClientLimits(idle_s=2, head_s=1.0, body_s=1.0, linger_s=0.5)
    with running(tmp_path_factory.mktemp("api"), limits, allowed_origins=(ORIGIN.decode(),)) as process:
        yield process


@pytest.fixture
def impatient(impatient_process: Process) -> Iterator[Process]:
    yield impatient_process
    impatient_process.disconnect()


@pytest.mark.parametrize("data", [b"G", GET, GET + b"a:", WITH_LENGTH, WITH_LENGTH + BODY[:9], CHUNKED + b"5\r\nabc"])
def test_slow_requests_end_with_a_408(impatient: Process, data: bytes) -> None:
    check_only_error(read_all(connect(impatient, data)), 408, "request_timeout")


@pytest.mark.parametrize(
    "head, status, code",
    [
        (GET.replace(b"/v1/models", b"/" + b"a" * 9000), 414, "uri_too_long"),
        (GET + FROM_A_PAGE + b"a: b\r\n" * 100 + b"\r\n", 431, "headers_too_large"),
        (GET + FROM_A_PAGE + b"a: %s\r\n" % (b"b" * 4000) * 9, 431, "headers_too_large"),
        (GET + FROM_A_PAGE + b"Expect: magic\r\n\r\n", 417, "expectation_failed"),
        (GET + FROM_A_PAGE + b"Host : a\r\n\r\n", 400, "malformed_request"),
        (POST + FROM_A_PAGE + b"Content-Length: 100000000\r\n\r\n", 413, "request_too_large"),
        (POST + FROM_A_PAGE + b"Content-Length: 9\r\n\r\n", 408, "request_timeout"),
        (MESSAGES + FROM_A_PAGE + b"a: b\r\n" * 100 + b"\r\n", 431, "headers_too_large"),
        (MESSAGES + FROM_A_PAGE + b"Content-Length: 100000000\r\n\r\n", 413, "request_too_large"),
        (MESSAGES + FROM_A_PAGE + b"a: b", 408, "request_timeout"),
        (GET + b"Anthropic-Version: 2026-10-21\r\n" + FROM_A_PAGE, 408, "request_timeout"),
    ],
)  # fmt: skip
def test_pages_may_read_what_reaches_no_resource(impatient: Process, head: bytes, status: int, code: str) -> None:
    origin = ORIGIN if FROM_A_PAGE in head else None
    is_anthropics = head.startswith(MESSAGES[:20]) or b"Anthropic" in head
    check_only_error(read_all(connect(impatient, head)), status, code, anthropic=is_anthropics, origin=origin)


@pytest.mark.parametrize("origin", [b"http://b:1", b"http://a:12", b"http://a:1\nset-cookie: a"])
def test_other_pages_may_not(impatient: Process, origin: bytes) -> None:
    head = GET + b"Origin: %s\r\nHost : a\r\n\r\n" % origin
    check_only_error(read_all(connect(impatient, head)), 400, "malformed_request")


def test_an_origin_that_is_cut_is_none(impatient: Process) -> None:
    check_only_error(read_all(connect(impatient, GET + FROM_A_PAGE[:-2])), 408, "request_timeout")


def test_a_trickle_does_not_move_the_deadline(impatient: Process) -> None:
    connection = connect(impatient, GET)
    start = time.monotonic()
    connection.settimeout(0.1)
    answer = b""
    while not answer:
        assert time.monotonic() < start + 10
        connection.sendall(b"a: b\r\n")
        try:
            answer = connection.recv(1000)
        except TimeoutError:
            continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_idle_connections_are_closed_without_a_word(impatient: Process) -> None:
    fresh, kept = connect(impatient), connect(impatient, GET + b"\r\n")
    assert read_answers(kept, 1) == [200]
    assert (read_all(fresh), read_all(kept)) == (b"", b"")


def test_clients_that_do_not_close_are_closed(impatient: Process) -> None:
    connection = connect(impatient, GET + b"Connection: close\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    until(lambda: _is_reset(connection))


def _is_reset(connection: socket.socket) -> bool:
    try:
        connection.sendall(b" ")
    except OSError:
        return True
    return False


# --- many ---


def seconds_to_answer(process: Process, path: str) -> float:
    start = time.monotonic()
    assert process.get(path) == 200
    return time.monotonic() - start


def test_slow_clients_cost_nobody_else(process: Process) -> None:
    for data in [b""] * 500 + [GET] * 64 + [WITH_LENGTH + b"{"] * 64:
        connect(process, data)
    for _ in range(64):  # polite ones that keep their socket open after the last answer
        connection = connect(process, GET + b"Connection: close\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")
    # The first of these clients is given up after 10 s; whoever had to wait for a thread would see that.
    assert max(seconds_to_answer(process, path) for path in ["/health", "/v1/models"] * 5) < 5
    assert process.post().status == 200


def test_health_answers_behind_a_full_pool(process: Process) -> None:
    process.engine.script = silent
    waiting: list[http.client.HTTPConnection] = []
    refused: list[http.client.HTTPResponse] = []
    while len(process.engine.running) < 512:  # 256 threads in each of two workers
        connection = process.send()
        waiting.append(connection)
        until(lambda: len(process.engine.running) + len(refused) == len(waiting) or _has_answer(waiting[-1]))
        if _has_answer(connection):
            refused.append(connection.getresponse())
            assert len(refused) < 5000
    assert max(seconds_to_answer(process, "/health") for _ in range(10)) < 5
    for response in refused:
        assert (response.status, response.headers["retry-after"]) == (503, "1")
        assert json.loads(response.read())["error"]["code"] == "server_busy"
    response = process.post()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "server_busy")
    process.disconnect()
    until(lambda: not process.engine.running, timeout_s=30)


def _has_answer(connection: http.client.HTTPConnection) -> bool:
    return bool(select.select([connection.sock], [], [], 0)[0])


@pytest.mark.parametrize("max_files", [24, 64])  # less than the least number of connections needs, and enough
def test_a_low_limit_of_files(tmp_path: Path, max_files: int) -> None:
    with running(tmp_path, max_files=max_files) as process:
        workers = psutil.Process(process.process.pid).children()
        before_s = [sum(worker.cpu_times()[:2]) for worker in workers]
        for _ in range(200):
            connect(process)
        for _ in range(20):
            assert process.get("/health") == 200
            time.sleep(0.05)
        for worker, busy_s in zip(workers, before_s, strict=True):  # they wait for files, they do not spin
            assert sum(worker.cpu_times()[:2]) - busy_s < 0.5
        process.disconnect()
        assert process.post().status == 200


def test_unfinished_requests_take_a_bounded_memory(tmp_path: Path) -> None:
    limits = ClientLimits(max_pending_bytes=4 << 20)
    with running(tmp_path, limits, allowed_origins=("*",)) as process:
        half = MESSAGES + FROM_A_PAGE + b"Content-Length: %d\r\n\r\n" % (3 << 20) + b" " * (2 << 20)
        connections = [connect(process, half) for _ in range(5)]  # of two workers, each holds two at most
        ready = select.select(connections, [], [], 20)[0]
        check_only_error(read_all(ready[0]), 529, "server_busy", anthropic=True, origin=ORIGIN)
        process.disconnect()
        assert process.post().status == 200


def test_a_stop_does_not_wait_for_slow_clients(tmp_path: Path) -> None:
    with running(tmp_path, ClientLimits(linger_s=0.5)) as process:
        for data in (b"", GET, WITH_LENGTH):
            connect(process, data)
        assert process.get("/health") == 200
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(20) == 0
