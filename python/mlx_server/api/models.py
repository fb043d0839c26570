"""GET /v1/models and /v1/models/{id}, in OpenAI's shape, and in Anthropic's for its clients."""

from datetime import datetime, timezone
from typing import Annotated, ClassVar, Literal

import falcon
import msgspec
from msgspec import Meta, Struct

from mlx_server.api.body import decode_query
from mlx_server.api.deps import Deps
from mlx_server.api.errors import speaks_anthropic
from mlx_server.api.openapi import Operation
from mlx_server.errors import OverloadedError

_SUMMARY = "With an anthropic-version header in Anthropic's shape"


class Model(Struct, kw_only=True):
    """OpenAI's shape. The context's length has no field there, so it stands where clients of other servers look."""

    id: str
    created: int  # seconds since 1970: when this server's process started
    object: Literal["model"] = "model"
    owned_by: str = "mlx-server"
    max_model_len: int | None  # vLLM's; null while the engine starts, as in the others
    context_length: int | None  # OpenRouter's
    context_window: int | None  # Groq's


class ModelList(Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class AnthropicModel(Struct, kw_only=True):
    """Anthropic's shape."""

    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: datetime
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int | None
    max_tokens: int | None


class AnthropicModelList(Struct, kw_only=True):
    data: list[AnthropicModel]
    has_more: bool = False
    first_id: str | None
    last_id: str | None


class Page(Struct):
    """Which part of the list to give. OpenAI's clients send none of them."""

    limit: Annotated[int, Meta(ge=1, le=1000)] | None = None
    after_id: str | None = None
    before_id: str | None = None


class Models:
    """The list: one model, by its served name."""

    operations: ClassVar = {
        "GET": Operation(summary=f"The served model. {_SUMMARY}", query=Page, answer=(ModelList, AnthropicModelList))
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        page = decode_query(req, Page)
        resp.content_type = "application/json"
        name = self._deps.model.name
        if not speaks_anthropic(req.path, req.headers):
            resp.data = msgspec.json.encode(ModelList([_model(self._deps, name)]))
            return
        models = [] if name in (page.after_id, page.before_id) else [_anthropic_model(self._deps, name)]
        only_id = models[0].id if models else None
        resp.data = msgspec.json.encode(AnthropicModelList(data=models, first_id=only_id, last_id=only_id))

    on_head = on_get


class ModelById:
    """One model, by any name that requests may use. The name may hold slashes, encoded in the URL or not."""

    operations: ClassVar = {"GET": Operation(summary=f"A model. {_SUMMARY}", answer=(Model, AnthropicModel))}

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        self._deps.check_model(name)
        resp.content_type = "application/json"
        make = _anthropic_model if speaks_anthropic(req.path, req.headers) else _model
        resp.data = msgspec.json.encode(make(self._deps, name))

    on_head = on_get


def _model(deps: Deps, name: str) -> Model:
    length = _context_length(deps)
    return Model(id=name, created=deps.created, max_model_len=length, context_length=length, context_window=length)


def _anthropic_model(deps: Deps, name: str) -> AnthropicModel:
    length = _context_length(deps)
    created_at = datetime.fromtimestamp(deps.created, timezone.utc)
    return AnthropicModel(id=name, display_name=name, created_at=created_at, max_input_tokens=length, max_tokens=length)


def _context_length(deps: Deps) -> int | None:
    """Tokens, prompt and answer together; None while the engine starts."""
    try:
        return deps.engine.info().context_length
    except OverloadedError:
        return None
