"""The one place where errors become HTTP: status, headers and OpenAI's error envelope."""

import logging
from typing import Any

import falcon
import msgspec

from mlx_server.errors import (
    GenerationError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    ServerError,
)

log = logging.getLogger(__name__)

_INVALID = "invalid_request_error"
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's and Anthropic's clients repeat a 5xx otherwise


class HttpError(ServerError):
    """A request that HTTP's own rules refuse: its path, key, headers, size or rate."""

    def __init__(self, status: int, code: str, message: str, *, kind: str = _INVALID, **headers: str) -> None:
        """`kind` is the envelope's `type`; `headers` have _ for -."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.kind = kind
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads an answer."""


class ErrorReply(msgspec.Struct, frozen=True):
    """An error as clients see it."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = {}

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


_INTERNAL_ERROR = ErrorReply(
    500, "server_error", "The server failed to handle this request.", None, "internal_error", _NO_RETRY
)


def describe(error: ServerError) -> ErrorReply:
    """How an error looks on the wire."""
    reply = _INTERNAL_ERROR
    match error:
        case HttpError():
            reply = ErrorReply(error.status, error.kind, error.message, None, error.code, error.headers)
        case InvalidRequestError():
            status = 404 if isinstance(error, ModelNotFoundError) else 400
            reply = ErrorReply(status, _INVALID, error.message, error.param, error.code)
        case OverloadedError():
            headers = {"retry-after": str(error.retry_after_s)}
            reply = ErrorReply(503, "server_error", error.message, None, error.code, headers)
        case RequestTimeoutError():
            reply = ErrorReply(504, "timeout", error.message, None, "request_timeout", _NO_RETRY)
        case GenerationError():
            reply = ErrorReply(500, "server_error", error.message, None, error.code, _NO_RETRY)
    return reply


def add_error_handlers(app: falcon.App[falcon.Request, falcon.Response]) -> None:
    """Let every error leave `app` in the envelope, falcon's own (404, 405) too."""
    app.add_error_handler(Exception, _handle_unexpected)
    app.add_error_handler(ServerError, _handle_server_error)
    app.add_error_handler(falcon.HTTPError, _handle_falcon_error)
    app.add_error_handler(ClientGoneError, _handle_client_gone)


def _handle_server_error(_req: falcon.Request, resp: falcon.Response, error: ServerError, _params: Any) -> None:
    _send(resp, describe(error))


def _handle_falcon_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: Any) -> None:
    resp.set_headers(error.headers or {})
    path = req.path[:200]
    if error.status_code == 404:
        reply = ErrorReply(404, _INVALID, f"There is no {path}.", None, "unknown_url")
    elif error.status_code == 405:
        message = f"{path} does not take {req.method}; it takes {resp.get_header('allow')}."
        reply = ErrorReply(405, _INVALID, message, None, "method_not_allowed")
    else:
        reply = ErrorReply(error.status_code, _INVALID, error.title or "Bad request.", None, "bad_request")
    _send(resp, reply)


def _handle_client_gone(_req: falcon.Request, resp: falcon.Response, _error: Exception, _params: Any) -> None:
    resp.status = "499 Client Closed Request"  # for the access log only


def _handle_unexpected(_req: falcon.Request, resp: falcon.Response, error: Exception, _params: Any) -> None:
    log.error("request %s failed", resp.get_header("x-request-id"), exc_info=error)
    _send(resp, _INTERNAL_ERROR)


def _send(resp: falcon.Response, reply: ErrorReply) -> None:
    resp.status = falcon.code_to_http_status(reply.status)
    resp.set_headers(reply.headers)
    resp.content_type = "application/json"
    resp.stream = None
    resp.data = reply.body()
