"""GET /health and GET /: is the server able to answer, and what is it."""

import falcon

from mlx_server.api.deps import Deps


class Health:
    """200 when a request would be taken now; 503 while the engine starts."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._deps.engine.info()
        resp.content_type = "application/json"
        resp.data = b'{"status":"ok"}'

    on_head = on_get


class Root:
    """Agents ask for it before anything else to see whether the address answers."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "application/json"
        resp.data = b'{"name":"mlx-server"}'

    on_head = on_get
