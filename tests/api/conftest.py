from collections.abc import Iterator
from typing import Any

import falcon.testing
import httpx2
import openai
import pytest

from api_process import Process, running
from fake_engine import Backend, Post, answer


@pytest.fixture
def client(backend: Backend) -> falcon.testing.TestClient:
    return falcon.testing.TestClient(backend.app(), headers={"host": "localhost:8000"})


@pytest.fixture
def post(client: falcon.testing.TestClient) -> Post:
    def post(**fields: Any) -> falcon.testing.Result:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
        return client.simulate_post("/v1/chat/completions", json=body)

    return post


def sdk_client(backend: Backend, *, strict: bool = True, **deps: Any) -> openai.OpenAI:
    """openai's client of an app. `strict`: it checks answers against its types."""
    return openai.OpenAI(
        api_key="none",
        base_url="http://localhost:8000/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.WSGITransport(app=backend.app(**deps))),
        _strict_response_validation=strict,
    )


@pytest.fixture
def sdk(backend: Backend) -> Iterator[openai.OpenAI]:
    with sdk_client(backend) as client:
        yield client


@pytest.fixture(scope="session")
def shared_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(tmp_path_factory.mktemp("api")) as process:
        yield process


@pytest.fixture
def process(shared_process: Process) -> Iterator[Process]:
    shared_process.engine.script = answer()
    shared_process.engine.submits.clear()
    shared_process.engine.cancelled.clear()
    yield shared_process
    shared_process.disconnect()
