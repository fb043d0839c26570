"""A real server on the demo model, as a user starts it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from server_process import ServerProcess

MLX_SERVER = [str(Path(sys.executable).with_name("mlx-server"))]


def start(*args: str) -> ServerProcess:
    """`mlx-server` on the demo model and a free port; `args` win."""
    return ServerProcess(MLX_SERVER, ["--model", "demo", "--host", "127.0.0.1", "--port", "0", *args])


def connect(server: ServerProcess, api_key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{server.url()}/v1", api_key=api_key, max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """For tests that leave it as it was."""
    with start("--log-level", "debug") as server:
        server.url()
        yield server
        print(server.err)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with connect(server) as client:
        yield client
