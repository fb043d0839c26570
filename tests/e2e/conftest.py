"""One server for all tests that leave it as it was."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from e2e_server import connect, start
from server_process import ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    with start("--log-level", "debug") as server:
        server.url()
        yield server
        print(server.err)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with connect(server) as client:
        yield client
