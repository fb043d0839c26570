from typing import Any

import falcon.testing
import pytest

from fake_engine import Backend, Post


@pytest.fixture
def client(backend: Backend) -> falcon.testing.TestClient:
    return falcon.testing.TestClient(backend.app(), headers={"host": "localhost:8000"})


@pytest.fixture
def post(client: falcon.testing.TestClient) -> Post:
    def post(**fields: Any) -> falcon.testing.Result:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
        return client.simulate_post("/v1/chat/completions", json=body)

    return post
