"""Whatever a body holds, it becomes a request or an error that names the client's mistake."""

import json
from typing import Any

import falcon
import falcon.testing
import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import fake_model
from mlx_server.api.body import decode_body
from mlx_server.api.openai.chat_request import to_chat_request
from mlx_server.api.openai.types import ChatCompletionRequest
from mlx_server.chat.types import ChatRequest
from mlx_server.errors import InvalidRequestError
from mlx_server.wire import EngineInfo, Submit

MODEL = fake_model()
INFO = EngineInfo(100, 257, 1000, limited_by_memory=False)
DECODER = msgspec.json.Decoder(ChatCompletionRequest)
FIELDS = st.sampled_from(ChatCompletionRequest.__struct_fields__)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "refusal", "image_url", ""]), "text": st.text(max_size=5)}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "robot"]),
            "content": st.none() | st.text(max_size=5) | st.lists(PARTS, max_size=2),
        }
    ),
    max_size=3,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def translate(body: bytes) -> ChatRequest | None:
    """The neutral request, or None if the body was refused; any other error is a fault of ours."""
    try:
        decoded = decode_body(
            falcon.testing.create_req(method="POST", body=body), falcon.Response(), DECODER, strict=False
        )
        return to_chat_request(decoded, MODEL, INFO, 64)
    except InvalidRequestError:
        return None


@given(fields=st.dictionaries(FIELDS, VALUES, max_size=4), messages=MESSAGES)
def test_any_fields(fields: dict[str, Any], messages: list[Any]) -> None:
    body = json.dumps({"model": "m", "messages": messages} | fields)
    request = translate(body.encode())
    if request is not None:
        sampling = request.sampling
        assert 0 <= sampling.temperature <= 2 and 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
        assert 0 <= sampling.top_k < 2**31 and 0 <= sampling.seed < 2**64
        assert request.max_tokens >= 1 and all(request.stop) and request.messages
        msgspec.msgpack.encode(Submit("id", [1], request.max_tokens, [2], sampling))


@given(body=st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    assert translate(body) is None


@given(position=st.integers(0, 200), piece=st.binary(max_size=3), length=st.integers(0, 3))
def test_any_damage(position: int, piece: bytes, length: int) -> None:
    body = (
        b'{"model":"m","messages":[{"role":"user","content":"h\\u00e9"}],"seed":-5,"top_p":1e-3,"stop":["a","b"],"n":1}'
    )
    translate(body[:position] + piece + body[position + length :])
