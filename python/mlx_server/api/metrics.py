"""GET /metrics: the engine's counters for Prometheus."""

from typing import ClassVar

import falcon

from mlx_server.api.deps import Deps
from mlx_server.api.openapi import Operation

_TIMEOUT_S = 10.0  # the engine answers between two steps


class Metrics:
    """Needs the key, as everything that tells of other people's requests."""

    operations: ClassVar = {"GET": Operation(summary="The engine's counters, for Prometheus", media_type="text/plain")}

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.text = self._deps.engine.metrics(_TIMEOUT_S)

    on_head = on_get
