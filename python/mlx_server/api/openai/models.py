"""GET /v1/models and /v1/models/{id}."""

from typing import Literal

import falcon
import msgspec

from mlx_server.api.deps import Deps


class Model(msgspec.Struct):
    id: str
    created: int  # seconds since 1970: when this server's process started
    object: Literal["model"] = "model"
    owned_by: str = "mlx-server"


class Models:
    """The list: one model, by its served name."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        model = Model(self._deps.model.name, self._deps.created)
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode({"object": "list", "data": [model]})


class ModelById:
    """One model, by any name that requests may use. The name may hold slashes, encoded in the URL or not."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        self._deps.check_model(name)
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(Model(name, self._deps.created))
