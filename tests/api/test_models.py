"""GET /v1/models and /v1/models/{id}, in both shapes."""

import falcon.testing
import pytest
from anthropic.types import ModelInfo
from openai.types import Model

from api.test_http import check_error
from fake_engine import Backend


def test_models(client: falcon.testing.TestClient) -> None:
    reply = client.simulate_get("/v1/models?limit=5&after_id=x").json
    assert (reply["object"], len(reply["data"])) == ("list", 1)
    model = Model.model_validate(reply["data"][0], strict=True)
    assert (model.id, model.created, model.owned_by) == ("org/tiny", 1_700_000_000, "mlx-server")


@pytest.mark.parametrize("path", ["org/tiny", "org%2Ftiny", "tiny", "default"])
def test_model_by_id(client: falcon.testing.TestClient, path: str) -> None:
    result = client.simulate_get(f"/v1/models/{path}")
    assert Model.model_validate(result.json, strict=True).id == path.replace("%2F", "/")


@pytest.mark.parametrize("path", ["other", "org", "org/tiny/x", "x" * 5000])
def test_unknown_model(client: falcon.testing.TestClient, path: str) -> None:
    error = check_error(client.simulate_get(f"/v1/models/{path}"), 404, "model_not_found")
    assert error["param"] == "model" and "org/tiny" in error["message"]


def test_models_tell_their_context(backend: Backend, client: falcon.testing.TestClient) -> None:
    names = ("max_model_len", "context_length", "context_window")
    assert [client.simulate_get("/v1/models/tiny").json[name] for name in names] == [100] * 3
    backend.client.fail_streams("engine_died", "")
    assert [client.simulate_get("/v1/models").json["data"][0][name] for name in names] == [None] * 3


def test_models_in_anthropics_shape(client: falcon.testing.TestClient) -> None:
    headers = {"anthropic-version": "2026-10-21"}
    reply = client.simulate_get("/v1/models", headers=headers).json
    assert (reply["has_more"], reply["first_id"], reply["last_id"]) == (False, "org/tiny", "org/tiny")
    (listed,) = reply["data"]
    for model in (listed, client.simulate_get("/v1/models/org%2Ftiny", headers=headers).json):
        parsed = ModelInfo.model_validate(model)
        assert (parsed.id, parsed.type, parsed.lifecycle) == ("org/tiny", "model", "active")
        assert (model["created_at"], parsed.max_input_tokens) == ("2023-11-14T22:13:20Z", 100)
    for end in ("after_id", "before_id"):
        reply = client.simulate_get(f"/v1/models?{end}=org/tiny", headers=headers).json
        assert (reply["data"], reply["has_more"], reply["first_id"], reply["last_id"]) == ([], False, None, None)


@pytest.mark.parametrize("limit", ["0", "1001", "x", ""])
def test_a_page_has_a_size(client: falcon.testing.TestClient, limit: str) -> None:
    result = client.simulate_get(f"/v1/models?limit={limit}")
    assert (result.status_code, result.json["error"]["param"]) == (400, "limit")
