"""POST /v1/embeddings on a fake engine: shapes, encodings, limits, order, faults."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import falcon.testing
import numpy as np
import pytest
from openai.types import CreateEmbeddingResponse

from api_process import Process
from fake_engine import Backend, embedding, fake_model, fake_vector, until
from mlx_server.wire import Embed, Failed, RequestOutput

PATH = "/v1/embeddings"


def post(client: falcon.testing.TestClient, value: Any, **fields: Any) -> falcon.testing.Result:
    return client.simulate_post(PATH, json={"model": "tiny", "input": value} | fields)


def check_error(result: falcon.testing.Result, param: str, code: str | None = None, status: int = 400) -> str:
    assert (result.status_code, result.json["error"]["param"]) == (status, param), result.text
    assert result.json["error"]["code"] == code
    message: str = result.json["error"]["message"]
    return message


@pytest.mark.parametrize(
    "value, texts",
    [
        ("hi", [b"hi"]),
        (["hi"], [b"hi"]),
        (["a", "wörld", "a"], [b"a", "wörld".encode(), b"a"]),
        ([104, 105], [b"hi"]),
        ([[104, 105], [97]], [b"hi", b"a"]),
        ([f"text {i}" for i in range(100)], [b"text %d" % i for i in range(100)]),
    ],
)
def test_every_form_of_input(
    backend: Backend, client: falcon.testing.TestClient, value: Any, texts: list[bytes]
) -> None:
    reply = post(client, value).json
    parsed = CreateEmbeddingResponse.model_validate(reply, strict=True)
    assert (parsed.object, parsed.model) == ("list", "tiny")
    assert [(item.object, item.index) for item in parsed.data] == [("embedding", i) for i in range(len(texts))]
    for item, text in zip(parsed.data, texts, strict=True):
        assert item.embedding == fake_vector(text).tolist()
    num_tokens = sum(map(len, texts))
    assert reply["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    assert {message.pooling for message in backend.engine.embeds} == {"last"}


def test_base64_is_little_endian_float32(client: falcon.testing.TestClient) -> None:
    (item,) = post(client, "hi", encoding_format="base64").json["data"]
    assert np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() == fake_vector(b"hi").tolist()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_fewer_dimensions_are_of_length_1_again(client: falcon.testing.TestClient, encoding: str) -> None:
    (item,) = post(client, "hi", encoding_format=encoding, dimensions=2).json["data"]
    vector = item["embedding"]
    if encoding == "base64":
        vector = np.frombuffer(base64.b64decode(vector), "<f4").tolist()
    cut = fake_vector(b"hi")[:2]
    np.testing.assert_allclose(vector, cut / np.linalg.norm(cut), rtol=1e-6)


def test_more_dimensions_than_there_are(client: falcon.testing.TestClient) -> None:
    assert len(post(client, "hi", dimensions=4).json["data"][0]["embedding"]) == 4
    assert "5" in check_error(post(client, "hi", dimensions=5), "dimensions")


@pytest.mark.parametrize(
    "value, param, code",
    [
        ("", "input", None),
        ([], "input", None),
        (["a", ""], "input[1]", None),
        ([[1], []], "input[1]", None),
        (["a", 1], "input", None),
        (["a", [1]], "input", None),
        ([1, 2.5], "input[1]", None),
        ([True], "input[0]", None),
        ([-1], "input", None),
        ([257], "input", None),
        ([[5], [257]], "input[1]", None),
        ([10**30], "input", None),
        (["a"] * 2049, "input", None),
        ("x" * 101, "input", "context_length_exceeded"),
        (["a", "x" * 101], "input[1]", "context_length_exceeded"),
        ("x" * 801, "input", "context_length_exceeded"),
        ([5] * 101, "input", "context_length_exceeded"),
        (None, "input", None),
        (5, "input", None),
        ({"a": 1}, "input", None),
    ],
)
def test_wrong_inputs(
    backend: Backend, client: falcon.testing.TestClient, value: Any, param: str, code: str | None
) -> None:
    check_error(post(client, value), param, code)
    assert not backend.engine.embeds


@pytest.mark.parametrize(
    "fields",
    [{"encoding_format": "int8"}, {"dimensions": 0}, {"dimensions": -1}, {"dimensions": 1.5}, {"dimensions": True}],
)
def test_wrong_fields(client: falcon.testing.TestClient, fields: dict[str, Any]) -> None:
    check_error(post(client, "hi", **fields), next(iter(fields)))


def test_null_is_absent_and_unknown_fields_are_named(client: falcon.testing.TestClient) -> None:
    result = post(client, "hi", encoding_format=None, dimensions=None, user=None, truncate="END")
    assert (result.status_code, result.headers["x-mlx-server-ignored"]) == (200, "truncate")


def test_a_text_may_fill_the_context(client: falcon.testing.TestClient) -> None:
    assert post(client, "x" * 100).status_code == 200


def test_unknown_models(client: falcon.testing.TestClient) -> None:
    check_error(post(client, "hi", model="other"), "model", "model_not_found", 404)


def test_the_models_pooling(backend: Backend) -> None:
    for pooling, status in [("mean", 200), (None, 400)]:
        app = backend.app(model=fake_model(pooling=pooling))
        result = post(falcon.testing.TestClient(app, headers={"host": "localhost"}), "hi")
        assert result.status_code == status
    assert [message.pooling for message in backend.engine.embeds] == ["mean"]


# --- the engine ---


def test_few_texts_run_at_once(backend: Backend, client: falcon.testing.TestClient) -> None:
    most = 0

    def script(message: Embed) -> Iterator[RequestOutput | None]:
        nonlocal most
        most = max(most, len(backend.engine.running))
        yield None
        yield from embedding(message)

    backend.engine.embed_script = script
    assert len(post(client, ["a"] * 200).json["data"]) == 200
    assert most <= 16


@pytest.mark.parametrize("code, status", [("queue_full", 503), ("engine_error", 500), ("deadline_exceeded", 504)])
def test_failures_end_the_other_texts_too(
    backend: Backend, client: falcon.testing.TestClient, code: str, status: int
) -> None:
    def script(message: Embed) -> Iterator[RequestOutput | None]:
        while message.token_ids != [ord("b")]:
            yield None
        yield Failed(message.request_id, code, "It failed.")

    backend.engine.embed_script = script
    assert post(client, ["a", "a", "b"]).status_code == status
    until(lambda: not backend.engine.running)
    assert len(backend.engine.cancelled) == 2


def test_without_an_engine(backend: Backend, client: falcon.testing.TestClient) -> None:
    backend.client.fail_streams("engine_died", "")
    assert post(client, "hi").status_code == 503


def test_a_timeout(backend: Backend) -> None:
    backend.engine.embed_script = lambda _: iter(lambda: None, 1)
    client = falcon.testing.TestClient(backend.app(timeout_s=0.05), headers={"host": "localhost"})
    assert post(client, "hi").status_code == 504
    until(lambda: not backend.engine.running)


def test_openais_client_and_a_client_that_leaves(process: Process, tmp_path: Path) -> None:
    reply = process.openai().embeddings.create(model="tiny", input=["hi", "a"])  # it asks for base64
    assert [item.embedding for item in reply.data] == [fake_vector(text).tolist() for text in (b"hi", b"a")]
    process.engine.embed_script = lambda _: iter(lambda: None, 1)
    connection = process.connect()
    connection.request("POST", PATH, b'{"model":"tiny","input":"hi"}', {"content-type": "application/json"})
    until(lambda: process.engine.running)
    connection.close()
    until(lambda: process.engine.cancelled)
    process.engine.embed_script = embedding
