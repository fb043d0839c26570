"""What holds for every request: ids, keys, Host, limits, bodies, errors, the small endpoints."""

import json
import logging
from typing import Any

import falcon.testing
import msgspec
import pytest

from fake_engine import Backend, Post, failing, fake_model, silent
from mlx_server.api.body import MAX_BODY_BYTES
from mlx_server.api.rate_limit import RateLimiter

CHAT = "/v1/chat/completions"
BODY = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'
PATHS = [
    "/",
    "/v1/models",
    "/v1/models/tiny",
    CHAT,
    "/openapi.json",
    "/nowhere",
    "/v1",
    "/health/",
    "//health",
    "/docs/",
]


def make_client(backend: Backend, host_header: str = "localhost", **deps: Any) -> falcon.testing.TestClient:
    return falcon.testing.TestClient(backend.app(**deps), headers={"host": host_header})


def check_error(result: falcon.testing.Result, status: int, code: str) -> dict[str, Any]:
    assert result.status_code == status, result.text
    assert result.headers["content-type"] == "application/json"
    assert result.json.keys() == {"error"}
    error: dict[str, Any] = result.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(isinstance(error[key], str) and error[key] for key in ("message", "type"))
    assert error["code"] == code
    return error


# --- the small endpoints ---


def test_health(backend: Backend, client: falcon.testing.TestClient) -> None:
    result = client.simulate_get("/health")
    assert (result.status_code, result.json) == (200, {"status": "ok"})
    backend.engine.stop()
    backend.client.fail_streams("engine_died", "")
    result = client.simulate_get("/health")
    check_error(result, 503, "engine_starting")
    assert result.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/health", "/health/ready", "/metrics", "/openapi.json", "/docs"),
        *("/v1/models", "/v1/models/tiny", "/v1/models/x", "/v1/responses/x"),
    ],
)
def test_head_is_get_without_its_body(client: falcon.testing.TestClient, path: str) -> None:
    whole, head = client.simulate_get(path), client.simulate_head(path)
    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert head.status_code == (404 if path.endswith("x") else 200)


# --- ids and the log ---


def test_every_answer_has_an_id_of_its_own(client: falcon.testing.TestClient) -> None:
    ids = set()
    for path in PATHS * 2:
        headers = client.simulate_get(path, headers={"x-client-request-id": "mine"}).headers
        assert headers["x-request-id"] == headers["request-id"]
        ids.add(headers["x-request-id"])
    assert len(ids) == 2 * len(PATHS)


def test_the_log_has_a_line_for_each_request_without_its_contents(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    client = make_client(backend, api_key="sesame")
    with caplog.at_level(logging.DEBUG):
        headers = {"authorization": "Bearer sesame"}
        body = BODY.replace(b"hi", b"my secret").replace(b"{", b'{"stream":true,', 1)
        result = client.simulate_post(f"{CHAT}?api_key=sesame", body=body, headers=headers)
        client.simulate_get("/a%0Ab", headers=headers)
    first, second = caplog.messages[-2:]
    assert first.startswith(f"{result.headers['x-request-id']} POST {CHAT} 200 ") and first.endswith(" ms")
    assert " GET /a%0Ab 404 " in second
    assert "secret" not in caplog.text and "sesame" not in caplog.text and "Hello" not in caplog.text


# --- keys ---


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_every_path_but_health_needs_the_key(backend: Backend, path: str, method: str) -> None:
    client = make_client(backend, api_key="sesame")
    result = client.simulate_request(method, path, body=b"no json")
    assert result.status_code == 401
    if method != "HEAD":
        error = check_error(result, 401, "invalid_api_key")
        assert error["type"] == "authentication_error"
        assert error["message"].startswith("Incorrect API key provided: ")  # LiteLLM looks for it
    assert result.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"authorization": "Bearer sesame"}, 200),
        ({"authorization": "bearer sesame"}, 200),
        ({"authorization": "BEARER  sesame "}, 200),
        ({"x-api-key": "sesame"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": "sesame"}, 200),
        ({"authorization": "Bearer sesame", "x-api-key": "wrong"}, 200),
        ({}, 401),
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "sesame"}, 401),
        ({"authorization": "Basic sesame"}, 401),
        ({"authorization": "Bearer sesam"}, 401),
        ({"authorization": "Bearer sesame1"}, 401),
        ({"authorization": "Bearer Sesame"}, 401),
        ({"authorization": "Bearer s\xe9same"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "wrong"}, 401),
    ],
)
def test_keys(backend: Backend, headers: dict[str, str], status: int) -> None:
    client = make_client(backend, api_key="sesame")
    assert client.simulate_get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_health_needs_no_key(backend: Backend, path: str) -> None:
    assert make_client(backend, api_key="sesame").simulate_get(path).status_code == 200


def test_a_key_of_any_characters(backend: Backend) -> None:
    key = "schlüssel".encode().decode("latin-1")  # as WSGI hands headers on
    client = make_client(backend, api_key="schlüssel")
    assert client.simulate_get("/v1/models", headers={"x-api-key": key}).status_code == 200


# --- Host ---


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1:8000", "192.168.1.5", "[::1]:8000", "[fe80::1]", "a.localhost",
     "LOCALHOST.", "server:8000", "my.own.name:80"],
)  # fmt: skip
def test_own_hosts(backend: Backend, host: str) -> None:
    assert make_client(backend, host, host_names=("my.own.name",)).simulate_get("/health").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost.evil.com", "1.2.3", "[x.y]"]
)
def test_foreign_hosts_are_refused_where_no_key_stops_them(backend: Backend, host: str) -> None:
    check_error(make_client(backend, host).simulate_post(CHAT, body=BODY), 421, "unknown_host")
    with_key = make_client(backend, host, api_key="sesame")
    assert with_key.simulate_get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200


# --- rate ---


def test_the_rate_is_limited(backend: Backend, tmp_path: Any) -> None:
    limiter = RateLimiter(tmp_path / "rate", limit=3)
    client = make_client(backend, rate_limiter=limiter, api_key="sesame")
    key = {"x-api-key": "sesame"}
    for _ in range(5):
        client.simulate_get("/health")  # free
        client.simulate_get("/v1/models")  # refused for its key, so free too
    assert [client.simulate_get("/v1/models", headers=key).status_code for _ in range(3)] == [200] * 3
    result = client.simulate_get("/v1/models", headers=key)
    assert check_error(result, 429, "rate_limit_exceeded")["type"] == "rate_limit_error"
    assert 1 <= int(result.headers["retry-after"]) <= 20
    other = client.simulate_get("/v1/models", headers=key, remote_addr="10.0.0.9")
    assert other.status_code == 200
    limiter.close()


# --- bodies ---


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"nul", b"{", BODY[:-1], BODY + b"x", BODY + BODY, b"\xef\xbb\xbf" + BODY,
        BODY.decode().encode("utf-16"),
        BODY.replace(b"hi", b"\xff"), BODY.replace(b"hi", b"\\ud800"), BODY.replace(b"hi", b"a\x00b"),
        BODY.replace(b"{", b'{"\xff":1,', 1), BODY.replace(b"{", b'{"unknown":"\xff",', 1),
        BODY.replace(b"{", b'{"unknown":NaN,', 1), BODY.replace(b"{", b'{"temperature":NaN,', 1),
        BODY.replace(b"{", b'{"unknown":' + nested(20_000) + b",", 1), b'{"a":' * 20_000,
        b"{'model':'tiny'}", b"model=tiny", b"\x00", b"\xff\xfe", b"Infinity",
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(client: falcon.testing.TestClient, body: bytes) -> None:
    check_error(client.simulate_post(CHAT, body=body), 400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"x"', b"{}", b"true", nested(20_000)])
def test_what_is_no_request_is_refused(client: falcon.testing.TestClient, body: bytes) -> None:
    result = client.simulate_post(CHAT, body=body)
    assert (result.status_code, result.json["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "number", ["1e400", "-1e400", "9" * 6000, "1" + "0" * 400, "NaN", "Infinity", "-Infinity", "0x1", "01"]
)
@pytest.mark.parametrize("field", ["temperature", "max_tokens", "seed", "top_k"])
def test_numbers_out_of_this_world(client: falcon.testing.TestClient, field: str, number: str) -> None:
    body = BODY.replace(b"{", f'{{"{field}":{number},'.encode(), 1)
    assert client.simulate_post(CHAT, body=body).status_code == 400


@pytest.mark.parametrize("content", ["\\u0000", "\\ud83d\\ude00", "\\u202e", "<|im_end|>", "{{ x }}", "\\\\", "\x7f"])
def test_odd_content_is_no_server_error(client: falcon.testing.TestClient, content: str) -> None:
    result = client.simulate_post(CHAT, body=BODY.replace(b"hi", content.encode()))
    assert result.status_code == (400 if content == "\\u0000" else 200)


@pytest.mark.parametrize(
    "content_type", [None, "application/json", "application/json; charset=utf-8", "Application/JSON"]
)
def test_content_types_that_are_served(client: falcon.testing.TestClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert client.simulate_post(CHAT, body=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "application/xml",
        "x",
    ],
)
def test_content_types_that_a_web_page_could_send_are_refused(
    client: falcon.testing.TestClient, content_type: str
) -> None:
    result = client.simulate_post(CHAT, body=BODY, headers={"content-type": content_type})
    check_error(result, 415, "unsupported_media_type")


def test_a_web_page_must_name_the_type(client: falcon.testing.TestClient) -> None:
    result = client.simulate_post(CHAT, body=BODY, headers={"origin": "http://evil.com"})
    check_error(result, 415, "unsupported_media_type")


@pytest.mark.parametrize("encoding, status", [("identity", 200), ("gzip", 415), ("br", 415), ("gzip, identity", 415)])
def test_compressed_bodies_are_refused(client: falcon.testing.TestClient, encoding: str, status: int) -> None:
    assert client.simulate_post(CHAT, body=BODY, headers={"content-encoding": encoding}).status_code == status


@pytest.mark.parametrize("depth, status", [(63, 200), (64, 400)])
def test_deep_bodies(client: falcon.testing.TestClient, depth: int, status: int) -> None:
    body = BODY.replace(b"{", b'{"unknown":' + nested(depth) + b",", 1)  # an object around that is a level too
    assert client.simulate_post(CHAT, body=body).status_code == status


def test_large_bodies(client: falcon.testing.TestClient) -> None:
    padding = b'{"unknown":"' + b"x" * (MAX_BODY_BYTES - len(BODY) - 13) + b'",'
    body = BODY.replace(b"{", padding, 1)
    assert len(body) == MAX_BODY_BYTES
    assert client.simulate_post(CHAT, body=body).status_code == 200
    check_error(client.simulate_post(CHAT, body=body + b" "), 413, "request_too_large")


# --- errors ---


def test_unknown_paths(client: falcon.testing.TestClient) -> None:
    error = check_error(client.simulate_get("/nowhere?x=secret"), 404, "unknown_url")
    assert "/nowhere" in error["message"] and "secret" not in error["message"]


@pytest.mark.parametrize(
    "method, path, allowed", [("GET", CHAT, "POST"), ("DELETE", "/v1/models", "GET"), ("POST", "/health", "GET")]
)
def test_wrong_methods(client: falcon.testing.TestClient, method: str, path: str, allowed: str) -> None:
    result = client.simulate_request(method, path)
    check_error(result, 405, "method_not_allowed")
    assert allowed in result.headers["allow"]


@pytest.mark.parametrize(
    "code, status, kind, headers",
    [
        ("engine_died", 503, "server_error", {"retry-after": "5"}),
        ("queue_full", 503, "server_error", {"retry-after": "2"}),
        ("client_queue_full", 429, "rate_limit_error", {"retry-after": "2"}),
        ("invalid_logits", 500, "server_error", {"x-should-retry": "false"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token_have_a_status(
    backend: Backend, post: Post, code: str, status: int, kind: str, headers: dict[str, str], stream: bool
) -> None:
    backend.engine.script = failing(code)
    result = post(stream=stream)
    assert check_error(result, status, code)["type"] == kind
    assert headers.items() <= dict(result.headers).items()


def test_a_timeout_is_a_504_that_is_not_repeated(backend: Backend) -> None:
    backend.engine.script = silent
    result = make_client(backend, timeout_s=0.05).simulate_post(CHAT, body=BODY)
    assert check_error(result, 504, "request_timeout")["type"] == "timeout"
    assert result.headers["x-should-retry"] == "false"


def test_a_fault_of_ours_tells_nothing(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def render(self, messages: object) -> str:
            raise RuntimeError("/secret/path 0xdeadbeef")

    model = fake_model()
    object.__setattr__(model, "template", Broken())
    result = make_client(backend, model=model).simulate_post(CHAT, body=BODY)
    error = check_error(result, 500, "internal_error")
    assert "secret" not in json.dumps(error) and "0x" not in json.dumps(error)
    assert result.headers["x-should-retry"] == "false"
    assert result.headers["x-request-id"] in caplog.text


def test_while_the_engine_starts_requests_are_refused_at_once(backend: Backend, post: Post) -> None:
    backend.client.fail_streams("engine_died", "")
    for stream in (False, True):
        result = post(stream=stream)
        check_error(result, 503, "engine_starting")
        assert result.headers["retry-after"] == "5"


def test_error_bodies_are_compact_json() -> None:
    from mlx_server.api.errors import ErrorReply  # noqa: PLC0415

    assert msgspec.json.decode(ErrorReply(400, "t", 'say "x"').body()) == {
        "error": {"message": 'say "x"', "type": "t", "param": None, "code": None}
    }
