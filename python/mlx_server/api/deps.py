"""What the resources need, handed in by whoever builds the app."""

from dataclasses import dataclass

from mlx_server.api.openai.responses_store import ResponseStore
from mlx_server.api.rate_limit import RateLimiter
from mlx_server.chat.served_model import ServedModel
from mlx_server.engine_client import EngineClient
from mlx_server.errors import ModelNotFoundError
from mlx_server.pulse import Pulse

_DEFAULT_NAME = "default"


@dataclass(frozen=True)
class Deps:
    model: ServedModel
    engine: EngineClient
    max_tokens: int  # where a request names none
    completion_tokens: int  # the same for raw prompts
    timeout_s: float
    created: int  # seconds since 1970
    fingerprint: str  # what answers can depend on beside the request: changes with the version
    api_key: str | None = None
    host_names: tuple[str, ...] = ()  # own names, beside the machine's
    allowed_origins: tuple[str, ...] = ()  # of web pages
    strict: bool = False  # a field that the API does not have is an error
    rate_limiter: RateLimiter | None = None
    responses: ResponseStore | None = None  # that later requests may refer to; None: nothing is kept
    pulse: Pulse | None = None  # of the engine's loop

    def check_model(self, name: str) -> None:
        """ModelNotFoundError unless `name` is the served name, its last path part or "default"."""
        served = self.model.name
        if name not in (served, served.rpartition("/")[2], _DEFAULT_NAME):
            raise ModelNotFoundError(
                f"The model {name[:256]!r} is not served here; served is {served!r}, also as {_DEFAULT_NAME!r}."
            )
