"""What holds for each field of each endpoint."""

from typing import Any

import falcon.testing
import msgspec
import pytest

from mlx_server.api.anthropic.types import CountTokensRequest, MessagesRequest
from mlx_server.api.openai.completions import CompletionBody
from mlx_server.api.openai.embeddings import EmbeddingRequest
from mlx_server.api.openai.responses_types import ResponsesRequest
from mlx_server.api.openai.types import ChatCompletionRequest
from mlx_server.api.tokenize import DetokenizeRequest, TemplateRequest, TokenizeRequest

MESSAGES = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"model": "tiny", "messages": MESSAGES}),
    "/v1/completions": (CompletionBody, {"model": "tiny", "prompt": "hi"}),
    "/v1/responses": (ResponsesRequest, {"model": "tiny", "input": "hi"}),
    "/v1/embeddings": (EmbeddingRequest, {"model": "tiny", "input": "hi"}),
    "/v1/messages": (MessagesRequest, {"model": "tiny", "messages": MESSAGES, "max_tokens": 5}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"model": "tiny", "messages": MESSAGES}),
    "/tokenize": (TokenizeRequest, {"messages": MESSAGES}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    "/apply-template": (TemplateRequest, {"messages": MESSAGES}),
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_null_is_as_if_it_were_absent(client: falcon.testing.TestClient, path: str) -> None:
    body_type, body = ENDPOINTS[path]
    optional = {field.encode_name: None for field in msgspec.structs.fields(body_type) if not field.required}
    result = client.simulate_post(path, json=optional | body)
    assert result.status_code == 200, result.text


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_wrong_type_is_refused_by_name(client: falcon.testing.TestClient, path: str) -> None:
    """Also where the field has no effect. No field takes all of these."""
    body_type, body = ENDPOINTS[path]
    for field in msgspec.structs.fields(body_type):
        name = field.encode_name
        for value in ([["x"]], "wrong", 5):
            result = client.simulate_post(path, json=body | {name: value})
            if result.status_code != 200:
                break
        assert result.status_code == 400, name
        error = result.json["error"]
        assert f"`{name}" in error["message"]
        assert "param" not in error or error["param"].startswith(name)
