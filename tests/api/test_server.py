"""gunicorn's workers on a real socket, with real clients: what only shows there."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from api_process import CHAT, Process, request, running
from fake_engine import END, answer, endless, silent, until
from mlx_server.api.incoming import ClientLimits
from mlx_server.wire import Finished, RequestOutput, Submit, Tokens

MESSAGES: Any = request()["messages"]


# --- OpenAI's client ---


def test_openai_client(process: Process) -> None:
    client = process.openai()
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, seed=3)
    assert reply.choices[0].message.content == "Hello!"
    assert reply.usage is not None and reply.usage.total_tokens == 16
    assert reply._request_id is not None and reply._request_id.startswith("req_")
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"


def test_openai_client_streaming(process: Process) -> None:
    process.engine.script = answer("Hello, wörld 😀")
    options: Any = {"include_usage": True}
    stream = process.openai().chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, wörld 😀"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 19


def test_openai_client_accumulates_the_stream(process: Process) -> None:
    with process.openai().chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        reply = stream.get_final_completion()
    message = reply.choices[0].message
    assert (message.role, message.content, reply.choices[0].finish_reason) == ("assistant", "Hello!", "stop")


def test_openai_async_client(process: Process) -> None:
    async def talk() -> tuple[str, list[str]]:
        url = f"http://127.0.0.1:{process.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=20, max_retries=0) as client:
            whole = await client.chat.completions.create(model="tiny", messages=MESSAGES)
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content or "", deltas

    whole, deltas = asyncio.run(talk())
    assert whole == "".join(deltas) == "Hello!"


def test_openai_client_leaves_a_stream(process: Process) -> None:
    process.engine.script = endless
    stream = process.openai().chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    next(iter(stream))
    stream.close()
    until(lambda: process.engine.cancelled)


@pytest.mark.parametrize("stream", [False, True])
def test_openai_async_client_is_cancelled(process: Process, stream: bool) -> None:
    async def leave() -> None:
        url = f"http://127.0.0.1:{process.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=20, max_retries=0) as client:
            call = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)
            task = asyncio.ensure_future(call)
            await asyncio.to_thread(until, lambda: process.engine.running)
            task.cancel()
            await asyncio.to_thread(until, lambda: process.engine.cancelled)  # before the client is closed

    process.engine.script = silent
    asyncio.run(leave())
    assert not process.engine.running


def test_openai_client_errors(process: Process) -> None:
    client = process.openai()
    with pytest.raises(openai.BadRequestError) as bad_request:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=5)
    assert (bad_request.value.param, bad_request.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# --- the client's end ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_ends_the_work(process: Process, stream: bool, reset: bool) -> None:
    process.engine.script = silent
    connection = process.send(stream=stream)
    until(lambda: process.engine.running)
    if reset:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    until(lambda: process.engine.cancelled)
    assert not process.engine.running


def test_a_client_that_leaves_in_the_middle_of_a_stream(process: Process) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        yield Tokens(submit.request_id, [ord("x")])
        yield from silent(submit)

    process.engine.script = script
    assert b"assistant" in process.post(stream=True).readline()
    process.disconnect()
    until(lambda: process.engine.cancelled)


def test_a_client_that_never_reads_ends_the_work(tmp_path: Path) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput]:
        while True:
            yield Tokens(submit.request_id, [END + 100_000])

    with running(tmp_path, ClientLimits(send_s=1)) as process:
        process.engine.script = script
        connection = process.connect()
        connection.sock = socket.socket()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the kernel takes many megabytes
        connection.sock.connect(("127.0.0.1", process.port))
        connection.request("POST", CHAT, json.dumps(request(stream=True)), {"content-type": "application/json"})
        until(lambda: process.engine.cancelled, timeout_s=30)


# --- HTTP ---


def raw(process: Process, *pieces: bytes) -> bytes:
    """Everything the server answers to these bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    return answer


BODY = json.dumps(request()).encode()
HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n".encode()


def test_chunked_bodies(process: Process) -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(BODY[i : i + 7]), BODY[i : i + 7]) for i in range(0, len(BODY), 7))
    reply = raw(process, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks, b"0\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 200 ") and b"Hello!" in reply


def test_expect_100_continue(process: Process) -> None:
    head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    reply = raw(process, head, BODY)
    assert reply.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(process: Process) -> None:
    with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_that_is_too_large(process: Process) -> None:
    reply = raw(process, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"900000\r\n", b" " * 0x900000, b"\r\n0\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 413 ") and reply.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("rest", [b"Content-Length: 500\r\n\r\n" + BODY, b"Transfer-Encoding: chunked\r\n\r\n5\r\n{"])
def test_a_body_that_ends_early(process: Process, rest: bytes) -> None:
    with socket.create_connection(("127.0.0.1", process.port), timeout=20) as connection:
        connection.sendall(HEAD + rest)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert not process.engine.submits


def test_errors_keep_the_connection(process: Process) -> None:
    connection = process.connect()
    for body, status in [(b"{", 400), (BODY, 200), (json.dumps(request(n=0)).encode(), 400), (BODY, 200)]:
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert response.headers["connection"] == "keep-alive"


def test_head_and_encoded_slash(process: Process) -> None:
    assert raw(process, b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").endswith(b"\r\n\r\n")
    assert process.get("/v1/models/org%2Ftiny") == 200
    assert process.get("/v1/models/org/tiny") == 200


@pytest.mark.parametrize(
    "head",
    [b"HEAD / HTTP/1.1\r\n" + b"a: b\r\n" * 200, b"HEAD / HTTP/1.1\r\nContent-Length: x\r\n"],
    ids=["431", "400"],
)
def test_a_refused_head_has_no_body(process: Process, head: bytes) -> None:
    reply = raw(process, head + b"\r\n")
    assert reply.startswith(b"HTTP/1.1 4") and reply.endswith(b"\r\n\r\n")
    assert b"content-length: 0" not in reply  # what it would be for GET


def test_http_1_0_and_missing_host(process: Process) -> None:
    assert raw(process, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200 ")
    assert raw(process, b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_half_sent_requests_block_nobody(process: Process) -> None:
    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", process.port))
        process.clients.append(connection)
        connection.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
    assert process.post().status == 200


def test_64_at_once(process: Process) -> None:
    statuses: list[int] = []

    def work() -> None:
        statuses.append(process.post().status)

    threads = [threading.Thread(target=work) for _ in range(64)]
    for thread in threads:
        thread.start()
    assert process.get("/health") == 200
    for thread in threads:
        thread.join()
    assert statuses == [200] * 64


def test_a_stream_arrives_step_by_step(process: Process) -> None:
    go = threading.Event()

    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        yield Tokens(submit.request_id, list(b"first"))
        while not go.is_set():
            yield None
        yield Finished(submit.request_id, list(b"second"), "length", 0, 11)

    process.engine.script = script
    response = process.post(stream=True)
    assert response.headers["transfer-encoding"] == "chunked"
    while b"first" not in response.readline():
        pass
    go.set()
    rest = response.read()
    assert b"second" in rest and rest.endswith(b"data: [DONE]\n\n")


# --- the engine's end ---


def test_the_engine_dies_in_the_middle(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        process.engine.script = endless
        response = process.post(stream=True)
        response.readline()
        waiting = process.send()
        until(lambda: len(process.engine.running) == 2)
        process.restart_engine()
        last = response.read().decode().rstrip().rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "engine_died"
        whole = waiting.getresponse()
        assert (whole.status, whole.headers["retry-after"]) == (503, "5")
        assert json.loads(whole.read())["error"]["code"] == "engine_died"
        assert process.post().status == 200


# --- several workers, start and stop ---


def test_workers_limit_the_rate_together(tmp_path: Path) -> None:
    with running(tmp_path, rate_limit=2, api_key="sesame") as process:
        statuses = [process.get("/v1/models", authorization="Bearer sesame") for _ in range(30)]
        assert statuses[:2] == [200, 200]
        assert set(statuses[2:]) == {429}
        assert process.get("/health") == 200


def test_a_stop_refuses_the_new_and_finishes_the_old(tmp_path: Path) -> None:
    go = threading.Event()

    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        yield Tokens(submit.request_id, list(b"begin"))
        while not go.is_set():
            yield None
        yield Finished(submit.request_id, list(b"end"), "length", 0, 8)

    with running(tmp_path) as process:
        process.engine.script = script
        response = process.post(stream=True)
        response.readline()
        process.process.send_signal(signal.SIGTERM)
        until(lambda: _is_refused(process.port))
        go.set()
        assert response.read().endswith(b"data: [DONE]\n\n")
        assert process.process.wait(20) == 0


def test_a_stop_ends_what_takes_too_long_with_an_error(tmp_path: Path) -> None:
    with running(tmp_path, ClientLimits(drain_s=1)) as process:
        process.engine.script = endless
        response = process.post(stream=True)
        response.readline()
        process.process.send_signal(signal.SIGTERM)
        last = response.read().decode().rstrip().rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "server_stopping"
        assert process.process.wait(20) == 0


def test_the_supervisors_death_ends_the_process(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        process.engine.script = endless
        process.post(stream=True).readline()
        lifeline = process.lifeline
        process.lifeline = os.open(os.devnull, os.O_RDONLY)
        os.close(lifeline)
        process.process.wait(20)


def test_kept_responses_go_with_the_supervisor(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        response = process.openai().responses.create(model="tiny", input="Hi")
        kept = tmp_path / "responses"
        assert [path.name for path in kept.iterdir()] == [response.id]
        lifeline = process.lifeline
        process.lifeline = os.open(os.devnull, os.O_RDONLY)
        os.close(lifeline)
        until(lambda: not kept.exists())


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        process.engine.script = silent
        connection = process.send()
        until(lambda: process.engine.running)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.process.pid)], capture_output=True, text=True, check=True
        )
        for pid in children.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(ConnectionError):
            connection.getresponse()
        process.engine.script = answer()
        until(lambda: process.log.read_text().count("connected to the engine") == 4, timeout_s=30)
        assert process.post().status == 200


def _is_refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return False
    except ConnectionRefusedError:
        return True


def test_the_process_never_loads_mlx() -> None:
    code = (
        "import sys, mlx_server.api.__main__; print([name for name in sys.modules if name.partition('.')[0] == 'mlx'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
