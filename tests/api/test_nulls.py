"""An explicit null is as if the field were absent, for each optional field of each endpoint: clients send both."""

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
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    "/apply-template": (TemplateRequest, {"messages": MESSAGES}),
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_nulls(client: falcon.testing.TestClient, path: str) -> None:
    body_type, body = ENDPOINTS[path]
    optional = {field.encode_name: None for field in msgspec.structs.fields(body_type) if not field.required}
    result = client.simulate_post(path, json=optional | body)
    assert result.status_code == 200, result.text
