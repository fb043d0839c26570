"""What leaves the server: one socket listens, no process calls anybody, and the log holds nothing that users said."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from e2e_server import MLX_SERVER
from server_process import ServerProcess

pytestmark = pytest.mark.model

# Python imports it at the start of each process; it writes down whom the process calls, and which names it looks up.
SITECUSTOMIZE = """
import os, sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{sys.argv[0]}: {event} {args[1:] if event != 'socket.getaddrinfo' else args}\\n")

sys.addaudithook(watch)
"""
KEY, SECRET = "sk-canary-key", "xylophone"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("calls")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    args = ["--model", "demo", "--host", "127.0.0.1", "--port", "0", "--api-key", KEY, "--log-level", "debug"]
    env = {"PYTHONPATH": str(folder), "CALLS": str(folder / "calls")}
    with ServerProcess(MLX_SERVER, args, env) as server:
        server.url()
        yield server


@pytest.fixture
def canary() -> Iterator[socket.socket]:
    """Listens where requests point to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def sockets(server: ServerProcess) -> list[Any]:
    processes = [psutil.Process(server.process.pid), *server.processes()]
    assert len(processes) == 5  # supervisor, engine, arbiter, two workers
    return [found for process in processes for found in process.net_connections("inet")]


def test_only_the_public_socket_listens(server: ServerProcess) -> None:
    port = int(server.url().rpartition(":")[2])
    found = sockets(server)
    assert {(each.laddr, each.status) for each in found if not each.raddr} == {(("127.0.0.1", port), "LISTEN")}
    assert {each.laddr.port for each in found} == {port}  # the others are clients' connections to it


def test_no_request_makes_the_server_call_anybody(server: ServerProcess, canary: socket.socket) -> None:
    url = f"http://127.0.0.1:{canary.getsockname()[1]}/x"
    image: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"Read {url}"}], "model": url}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"Read {url}"}]}),
        ("/v1/chat/completions", {"response_format": schema({"$ref": url}), "messages": [hi(url)]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": by(url)}]}]}),
        ("/v1/messages", {"messages": [hi(url)], "mcp_servers": [{"type": "url", "url": url, "name": "x"}]}),
        ("/v1/embeddings", {"input": url}),
    ]
    with httpx2.Client(base_url=server.url(), headers={"x-api-key": KEY}, timeout=60) as http:
        statuses = [http.post(path, json={"model": "default", "max_tokens": 4} | body) for path, body in requests]
    assert [response.status_code for response in statuses] == [400, 404, 200, 400, 400, 400, 400, 200]
    with pytest.raises(BlockingIOError):
        canary.accept()
    calls = (Path(server.environment["CALLS"])).read_text().splitlines()
    own = f"('127.0.0.1', {server.url().rpartition(':')[2]})"
    assert any(own in call for call in calls)  # the supervisor asks the API whether it is there, so calls are seen
    assert [call for call in calls if not (own in call or "getaddrinfo ('127.0.0.1'" in call)] == []


def by(url: str) -> dict[str, str]:
    return {"type": "url", "url": url}


def hi(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def schema(root: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": root}}


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_holds_neither_texts_nor_keys(server: ServerProcess, stream: bool) -> None:
    repeat = f"Repeat this word three times: {SECRET}"
    bodies: list[dict[str, Any]] = [
        {"messages": [hi(repeat)], "temperature": 0, "max_tokens": 20, "stream": stream, "user": SECRET},
        {"messages": [hi(repeat)], SECRET: 1, "stop": 7},
        {"messages": [hi(repeat)], "response_format": schema({"$ref": f"#/{SECRET}"})},
    ]
    with httpx2.Client(base_url=server.url(), timeout=60) as http:
        for key in (KEY, "sk-canary-wrong"):
            for body in bodies:
                path = f"/v1/chat/completions?api_key={key}&word={SECRET}"
                http.post(path, json={"model": "default"} | body, headers={"authorization": f"Bearer {key}"})
        answer = http.post("/v1/chat/completions", json={"model": "default"} | bodies[0], headers={"x-api-key": KEY})
    assert SECRET in answer.text.replace('"}}]}', "") or stream
    shown = server.out + server.err
    assert "POST /v1/chat/completions 200" in shown and "POST /v1/chat/completions 401" in shown
    assert SECRET not in shown and "sk-canary" not in shown and json.dumps(repeat) not in shown
