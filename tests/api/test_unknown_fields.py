"""Fields that the API does not have: named in a header, or refused with --strict."""

from typing import Annotated, Any

import falcon.testing
import msgspec
import pytest
from msgspec import Meta, Raw, Struct

from fake_engine import Backend
from mlx_server.api.unknown_fields import MAX_NAMED, unknown_fields

CHAT = "/v1/chat/completions"
HEADER = "x-mlx-server-ignored"


class Text(Struct, tag_field="type", tag="text"):
    text: str
    cache: dict[str, Any] | None = None


class Result(Struct, tag_field="type", tag="result"):
    content: "str | list[Text | Result]"


class Tool(Struct):
    schema: Raw
    name: Annotated[str, Meta(max_length=9)] = msgspec.field(default="", name="toolName")


class Request(Struct):
    model: str
    content: str | list[Text | Result] | None = None
    tools: tuple[Tool, ...] = ()
    named: dict[str, Tool] = {}
    bias: dict[str, float] = {}


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    "fields, unknown",
    [
        ({}, []),
        ({"a": 1}, ["a"]),
        ({"Model": 1, "": 2, "x.y": None}, ["Model", "", "x.y"]),
        ({"content": "a"}, []),
        ({"content": [TEXT, TEXT | {"b": [1]}]}, ["content[1].b"]),
        ({"content": [{"type": "result", "content": [TEXT, {"type": "result", "content": "x", "is": 1}]}]},
         ["content[0].content[1].is"]),
        ({"content": [TEXT | {"cache": {"anything": {"goes": 1}}}]}, []),
        ({"tools": [{"toolName": "f", "name": "f", "schema": {"any": 1}}]}, ["tools[0].name"]),
        ({"named": {"x": {"schema": 1, "y": 1}}, "bias": {"5": 1}}, ["named.x.y"]),
        ({"tools": [{"schema": 1, "z": 1}], "late": 1}, ["late", "tools[0].z"]),
        ({f"f{i}": i for i in range(99)}, [f"f{i}" for i in range(MAX_NAMED)]),
        ({"n" * 1000: 1}, ["n" * 64]),
    ],
)  # fmt: skip
def test_what_is_unknown(fields: dict[str, Any], unknown: list[str]) -> None:
    body = {"model": "m"} | fields
    msgspec.json.decode(msgspec.json.encode(body), type=Request)  # valid otherwise
    assert unknown_fields(body, Request) == unknown


def nest(depth: int) -> dict[str, Any]:
    block: dict[str, Any] = TEXT | {"deep": 1}
    for _ in range(depth):
        block = {"type": "result", "content": [block]}
    return block


def test_depth_costs_no_stack() -> None:
    assert unknown_fields({"model": "m", "content": [nest(1000)]}, Request)[0].endswith(".deep")


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi", "mood": 1}]} | fields


def test_answers_name_them(client: falcon.testing.TestClient) -> None:
    result = client.simulate_post(CHAT, json=body(temprature=1, **{"ü,\r\n": 1}))
    assert result.status_code == 200
    assert result.headers[HEADER] == "temprature, %C3%BC%2C%0D%0A, messages[0].mood"


def test_streams_and_errors_name_them_too(client: falcon.testing.TestClient) -> None:
    assert client.simulate_post(CHAT, json=body(stream=True)).headers[HEADER] == "messages[0].mood"
    error = client.simulate_post(CHAT, json=body(model="other"))
    assert (error.status_code, error.headers[HEADER]) == (404, "messages[0].mood")


def test_without_any_there_is_no_header(client: falcon.testing.TestClient) -> None:
    assert HEADER not in client.simulate_post(CHAT, json=body(messages=[{"role": "user", "content": "hi"}])).headers


def test_strict_servers_refuse_them(backend: Backend) -> None:
    client = falcon.testing.TestClient(backend.app(strict=True), headers={"host": "localhost"})
    result = client.simulate_post(CHAT, json=body())
    assert result.status_code == 400
    assert result.json["error"] == {
        "message": "`messages[0].mood`: unknown field.",
        "type": "invalid_request_error",
        "param": "messages[0].mood",
        "code": "unknown_field",
    }
    assert not backend.engine.submits


def test_strict_servers_refuse_them_in_each_envelope(backend: Backend) -> None:
    client = falcon.testing.TestClient(backend.app(strict=True), headers={"host": "localhost"})
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        result = client.simulate_post(path, json=body() | ({"max_tokens": 5} if path == "/v1/messages" else {}))
        assert (result.status_code, result.json["type"]) == (400, "error")
        assert result.json["error"]["message"] == "`messages[0].mood`: unknown field."
