"""The WSGI application: middleware and routes, no state of its own."""

from typing import Any

import falcon

from mlx_server.api.deps import Deps
from mlx_server.api.errors import add_error_handlers
from mlx_server.api.health import Health, Root
from mlx_server.api.middleware import AccessLog, Auth, Cors, HostCheck, RateLimit, RequestId
from mlx_server.api.openai.chat import ChatCompletions
from mlx_server.api.openai.models import ModelById, Models


def create_app(deps: Deps) -> AccessLog:
    """The application for one served model."""
    middleware: list[Any] = [RequestId()]
    if deps.allowed_origins:
        middleware.append(Cors(deps.allowed_origins))
    middleware.append(HostCheck(deps.host_names, any_name=deps.api_key is not None))
    if deps.api_key is not None:
        middleware.append(Auth(deps.api_key))
    if deps.rate_limiter is not None:
        middleware.append(RateLimit(deps.rate_limiter))
    app = falcon.App(middleware=middleware)
    add_error_handlers(app)
    app.add_route("/", Root())
    for path in ("/health", "/health/ready"):
        app.add_route(path, Health(deps))
    app.add_route("/v1/models", Models(deps))
    app.add_route("/v1/models/{name:path}", ModelById(deps))
    app.add_route("/v1/chat/completions", ChatCompletions(deps))
    return AccessLog(app)
