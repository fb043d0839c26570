"""Errors in the envelope of the API that a request is for, and CORS on every answer."""

from typing import Any

import falcon.testing
import pytest
from anthropic._exceptions import OverloadedError
from anthropic.types import ErrorResponse

from fake_engine import END, Backend, ByteTokenizer
from mlx_server.api.errors import ErrorReply, speaks_anthropic
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.template import ChatTemplate
from mlx_server.sampling_params import SamplingParams

NOWHERE = "/v1/messages/nowhere"
ORIGIN = "http://localhost:3000"


def make_client(backend: Backend, **deps: Any) -> falcon.testing.TestClient:
    return falcon.testing.TestClient(backend.app(**deps), headers={"host": "localhost"})


def check_anthropic(result: falcon.testing.Result, status: int, kind: str, code: str) -> str:
    """The error's message."""
    assert result.status_code == status, result.text
    assert result.json.keys() == {"type", "error", "request_id"}
    assert result.json["type"] == "error"
    assert result.json["request_id"] == result.headers["request-id"] == result.headers["x-request-id"]
    error = result.json["error"]
    assert (error["type"], error["details"]) == (kind, {"error_code": code})
    ErrorResponse.model_validate(result.json)
    message: str = error["message"]
    return message


# --- which envelope ---


@pytest.mark.parametrize(
    "path, headers, expected",
    [
        ("/v1/messages", {}, True),
        ("/v1/messages/count_tokens", {}, True),
        ("/v1/messages/", {}, True),
        ("/v1/messagesx", {}, False),
        ("/v1/models", {}, False),
        ("/v1/models", {"ANTHROPIC-VERSION": "2023-06-01"}, True),
        ("/v1/models/a/b", {"ANTHROPIC-VERSION": ""}, True),
        ("/v1/chat/completions", {"ANTHROPIC-VERSION": "2023-06-01"}, False),
        ("/", {"ANTHROPIC-VERSION": "2023-06-01"}, False),
    ],
)
def test_the_path_tells_the_api(path: str, headers: dict[str, str], expected: bool) -> None:
    assert speaks_anthropic(path, headers) is expected


def test_unknown_paths_of_anthropics(client: falcon.testing.TestClient) -> None:
    message = check_anthropic(client.simulate_post(NOWHERE, json={}), 404, "not_found_error", "unknown_url")
    assert NOWHERE in message


def test_wrong_keys_at_anthropics(backend: Backend) -> None:
    client = make_client(backend, api_key="sesame")
    for path in ("/v1/messages", NOWHERE):
        check_anthropic(client.simulate_post(path), 401, "authentication_error", "invalid_api_key")
    headers = {"anthropic-version": "2026-10-21"}
    check_anthropic(client.simulate_get("/v1/models", headers=headers), 401, "authentication_error", "invalid_api_key")


def test_wrong_methods_at_anthropics(client: falcon.testing.TestClient) -> None:
    result = client.simulate_put("/v1/models", headers={"anthropic-version": "2023-06-01"})
    check_anthropic(result, 405, "invalid_request_error", "method_not_allowed")
    assert "GET" in result.headers["allow"]


@pytest.mark.parametrize(
    "status, kind, anthropics_status",
    [
        (400, "invalid_request_error", 400),
        (403, "permission_error", 403),
        (408, "timeout_error", 408),
        (409, "conflict_error", 409),
        (413, "request_too_large", 413),
        (415, "invalid_request_error", 415),
        (421, "invalid_request_error", 421),
        (429, "rate_limit_error", 429),
        (500, "api_error", 500),
        (503, "overloaded_error", 529),
        (504, "timeout_error", 504),
    ],
)
def test_anthropics_types(status: int, kind: str, anthropics_status: int) -> None:
    reply = ErrorReply(status, "x", "text", "field", "code", {"retry-after": "5"}).for_anthropic()
    assert (reply.status, reply.details.type, reply.headers) == (anthropics_status, kind, {"retry-after": "5"})


def test_anthropics_client_knows_the_overload() -> None:
    """The status that its client has a class for."""
    assert OverloadedError.status_code == 529


# --- what the model's chat template refuses ---

REFUSING = """{% for message in messages %}{{ message.content }}
    {%- if message.content == "no" %}{{ raise_exception("Not this") }}{% endif %}{% endfor %}"""
ASKED = {"messages": [{"role": "user", "content": "no"}]}


@pytest.fixture
def refusing(backend: Backend) -> falcon.testing.TestClient:
    model = ServedModel("tiny", ByteTokenizer(), ChatTemplate(REFUSING), [END], SamplingParams())
    return make_client(backend, model=model)


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/v1/chat/completions", ASKED, "messages"),
        ("/v1/chat/completions", ASKED | {"stream": True}, "messages"),
        ("/v1/responses", {"input": "no"}, "input"),
        ("/v1/responses", {"input": "no", "stream": True}, "input"),
        ("/apply-template", ASKED, "messages"),
        ("/tokenize", ASKED, "messages"),
    ],
)
def test_a_template_refuses_in_openais_envelope(
    backend: Backend, refusing: falcon.testing.TestClient, path: str, body: dict[str, Any], param: str
) -> None:
    result = refusing.simulate_post(path, json={"model": "tiny"} | body)
    assert result.status_code == 400
    assert result.headers["content-type"] == "application/json"
    error = {
        "message": "Not this",
        "type": "invalid_request_error",
        "param": param,
        "code": "chat_template_error",
    }
    assert result.json == {"error": error}
    assert not backend.engine.submits


@pytest.mark.parametrize(
    "path, fields",
    [
        ("/v1/messages", {"max_tokens": 9}),
        ("/v1/messages", {"max_tokens": 9, "stream": True}),
        ("/v1/messages/count_tokens", {}),
    ],
)
def test_a_template_refuses_in_anthropics_envelope(
    backend: Backend, refusing: falcon.testing.TestClient, path: str, fields: dict[str, Any]
) -> None:
    result = refusing.simulate_post(path, json={"model": "tiny"} | ASKED | fields)
    assert result.headers["content-type"] == "application/json"
    message = check_anthropic(result, 400, "invalid_request_error", "chat_template_error")
    assert message == "Not this"
    assert not backend.engine.submits


# --- CORS ---


def preflight(client: falcon.testing.TestClient, origin: str, **headers: str) -> falcon.testing.Result:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    return client.simulate_options("/v1/chat/completions", headers=asked | headers)


def test_without_allowed_origins_there_are_no_cors_headers(client: falcon.testing.TestClient) -> None:
    for result in (preflight(client, ORIGIN), client.simulate_get("/v1/models", headers={"origin": ORIGIN})):
        assert not [name for name in result.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", [(ORIGIN,), ("https://a", ORIGIN), ("*",)])
def test_preflights_need_no_key(backend: Backend, allowed: tuple[str, ...]) -> None:
    client = make_client(backend, api_key="sesame", allowed_origins=allowed)
    asked = "authorization,x-stainless-lang,content-type"
    result = preflight(client, ORIGIN, **{"access-control-request-headers": asked})
    assert (result.status_code, result.content) == (204, b"")
    assert result.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in result.headers["access-control-allow-methods"]
    assert result.headers["access-control-allow-headers"] == asked
    assert result.headers["vary"] == "Origin"
    assert "access-control-allow-private-network" not in result.headers
    assert "authorization" in preflight(client, ORIGIN).headers["access-control-allow-headers"]
    private = preflight(client, ORIGIN, **{"access-control-request-private-network": "true"})
    assert private.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("stream", [False, True])
def test_answers_streams_and_errors_may_be_read_by_allowed_pages(backend: Backend, stream: bool) -> None:
    client = make_client(backend, api_key="sesame", allowed_origins=(ORIGIN,))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    for key, status in [("sesame", 200), ("wrong", 401)]:
        headers = {"origin": ORIGIN, "x-api-key": key}
        result = client.simulate_post("/v1/chat/completions", json=body, headers=headers)
        assert result.status_code == status
        assert result.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-credentials" not in result.headers
        assert {"x-request-id", "request-id", "retry-after"} <= set(
            result.headers["access-control-expose-headers"].split(", ")
        )


@pytest.mark.parametrize("origin", ["http://localhost:3001", "https://localhost:3000", "null", f"{ORIGIN}.evil", ""])
def test_other_pages_get_no_leave(backend: Backend, origin: str) -> None:
    client = make_client(backend, allowed_origins=(ORIGIN,))
    result = client.simulate_get("/v1/models", headers={"origin": origin})
    assert "access-control-allow-origin" not in result.headers
    assert "access-control-allow-origin" not in preflight(client, origin).headers


def test_options_without_a_question_for_cors_need_the_key(backend: Backend) -> None:
    client = make_client(backend, api_key="sesame", allowed_origins=(ORIGIN,))
    assert client.simulate_options("/v1/models", headers={"origin": ORIGIN}).status_code == 401
