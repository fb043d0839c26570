"""GET /health and GET /: is the server able to answer, and what is it."""

from typing import ClassVar, Literal

import falcon
import msgspec

from mlx_server.api.deps import Deps
from mlx_server.api.openapi import Operation
from mlx_server.errors import OverloadedError

# An engine whose loop stands still for so long, and for that many of its slowest steps, may hang.
LATE_S = 4
LATE_STEPS = 4


class HealthAnswer(msgspec.Struct):
    status: Literal["ok"] = "ok"


class RootAnswer(msgspec.Struct):
    name: Literal["mlx-server"] = "mlx-server"


class Health:
    """200 when a request would be taken now; 503 while the engine starts or stands still."""

    operations: ClassVar = {
        "GET": Operation(summary="Whether a request would be taken now", answer=HealthAnswer, needs_key=False)
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._deps.engine.info()
        if self._deps.pulse is not None and self._deps.pulse.is_late(LATE_S, LATE_STEPS):
            raise OverloadedError("The engine does not respond.", code="engine_stuck", retry_after_s=LATE_S)
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(HealthAnswer())

    on_head = on_get


class Root:
    """Agents ask for it before anything else to see whether the address answers."""

    operations: ClassVar = {"GET": Operation(summary="What answers here", answer=RootAnswer)}

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(RootAnswer())

    on_head = on_get
