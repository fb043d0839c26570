"""The WSGI application: middleware and routes, no state of its own."""

from typing import Any

import falcon

from mlx_server.api.anthropic.messages import CountTokens, Messages
from mlx_server.api.deps import Deps
from mlx_server.api.errors import add_error_handlers
from mlx_server.api.health import Health, Root
from mlx_server.api.metrics import Metrics
from mlx_server.api.middleware import AccessLog, Auth, Cors, HostCheck, RateLimit, RequestId
from mlx_server.api.models import ModelById, Models
from mlx_server.api.openai.chat import ChatCompletions
from mlx_server.api.openai.completions import Completions
from mlx_server.api.openai.embeddings import Embeddings
from mlx_server.api.openai.responses import ResponseById, Responses
from mlx_server.api.openapi import Docs, OpenApi
from mlx_server.api.tokenize import ApplyTemplate, DescribeTokenizer, Detokenize, Tokenize


def create_app(deps: Deps) -> AccessLog:
    """The application for one served model."""
    middleware: list[Any] = [
        RequestId(),
        Cors(deps.allowed_origins),
        HostCheck(deps.host_names, any_name=deps.api_key is not None),
    ]
    if deps.api_key is not None:
        middleware.append(Auth(deps.api_key))
    if deps.rate_limiter is not None:
        middleware.append(RateLimit(deps.rate_limiter))
    app = falcon.App(middleware=middleware)
    add_error_handlers(app)
    routes = make_routes(deps)
    for path, resource in routes.items():
        app.add_route(path, resource)
    return AccessLog(app)


def make_routes(deps: Deps) -> dict[str, Any]:
    """Each path's resource."""
    openapi = OpenApi()
    routes = {
        "/": Root(),
        "/health": Health(deps),
        "/health/ready": Health(deps),
        "/metrics": Metrics(deps),
        "/v1/models": Models(deps),
        "/v1/models/{name:path}": ModelById(deps),
        "/v1/chat/completions": ChatCompletions(deps),
        "/v1/completions": Completions(deps),
        "/v1/responses": Responses(deps),
        "/v1/responses/{response_id}": ResponseById(deps),
        "/v1/messages": Messages(deps),
        "/v1/messages/count_tokens": CountTokens(deps),
        "/v1/embeddings": Embeddings(deps),
        "/tokenize": Tokenize(deps),
        "/detokenize": Detokenize(deps),
        "/tokenizer_info": DescribeTokenizer(deps),
        "/apply-template": ApplyTemplate(deps),
        "/openapi.json": openapi,
        "/docs": Docs(),
    }
    openapi.describe(routes, has_key=deps.api_key is not None)
    return routes
