"""The one place where errors become HTTP: status, headers and the error envelope of OpenAI or Anthropic."""

import logging
from collections.abc import Mapping
from typing import Any

import falcon
import msgspec

from mlx_server.errors import (
    ClientLimitError,
    ContextLengthError,
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
# Anthropic's name for each status; any other is an invalid_request_error below 500, an api_error from there.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
THREAD_UNSUPPORTED = "thread_unsupported_request"  # on it Anthropic's clients send the whole conversation
_ANTHROPIC_OVERLOADED = 529  # where others say 503


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


class OpenAIErrorDetails(msgspec.Struct):
    message: str
    type: str
    param: str | None  # the field's path, such as `messages[0].content`
    code: str | None  # stable, for programs


class OpenAIError(msgspec.Struct):
    """OpenAI's envelope."""

    error: OpenAIErrorDetails


class AnthropicErrorCode(msgspec.Struct):
    error_code: str  # stable, for programs
    unsupported: list[str] | msgspec.UnsetType = msgspec.UNSET  # with thread_unsupported_request: the fields


class AnthropicErrorDetails(msgspec.Struct):
    type: str
    message: str
    details: AnthropicErrorCode | msgspec.UnsetType = msgspec.UNSET


class AnthropicError(msgspec.Struct, tag_field="type", tag="error"):
    """Anthropic's envelope."""

    error: AnthropicErrorDetails
    request_id: str


class ErrorReply(msgspec.Struct, frozen=True):
    """An error as clients see it. `type` is OpenAI's; Anthropic's follows from the status."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = {}
    anthropic_message: str | None = None  # None: the same

    def body(self) -> bytes:
        """In OpenAI's envelope."""
        return msgspec.json.encode(OpenAIError(OpenAIErrorDetails(self.message, self.type, self.param, self.code)))

    def for_anthropic(self) -> "AnthropicErrorReply":
        status = _ANTHROPIC_OVERLOADED if self.status == 503 else self.status
        kind = _ANTHROPIC_TYPES.get(status, _INVALID if status < 500 else "api_error")
        details: AnthropicErrorCode | msgspec.UnsetType = msgspec.UNSET
        if self.code is not None:
            fields = [self.param] if self.param is not None and self.code == THREAD_UNSUPPORTED else msgspec.UNSET
            details = AnthropicErrorCode(self.code, fields)
        message = self.anthropic_message or self.message
        return AnthropicErrorReply(status, AnthropicErrorDetails(kind, message, details), self.headers)


class AnthropicErrorReply(msgspec.Struct, frozen=True):
    """An error as Anthropic's clients see it, in an answer or in a stream."""

    status: int
    details: AnthropicErrorDetails
    headers: dict[str, str]

    def body(self, request_id: str) -> bytes:
        """In Anthropic's envelope."""
        return msgspec.json.encode(AnthropicError(self.details, request_id))


def speaks_anthropic(path: str, headers: Mapping[str, str]) -> bool:
    """Whether a request is one of Anthropic's API. `headers` have upper-case names."""
    if _is_or_is_below(path, "/v1/models"):  # both APIs have it
        return "ANTHROPIC-VERSION" in headers
    return _is_or_is_below(path, "/v1/messages")


def _is_or_is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}/")


_INTERNAL_ERROR = ErrorReply(
    500, "server_error", "The server failed to handle this request.", None, "internal_error", _NO_RETRY
)


def describe(error: Exception) -> ErrorReply:
    """How an error looks on the wire. Of one that is a fault of ours nothing is told."""
    reply = _INTERNAL_ERROR
    match error:
        case HttpError():
            reply = ErrorReply(error.status, error.kind, error.message, None, error.code, error.headers)
        case InvalidRequestError():
            status = 404 if isinstance(error, ModelNotFoundError) else 400
            reply = ErrorReply(status, _INVALID, error.message, error.param, error.code)
            if isinstance(error, ContextLengthError):
                reply = msgspec.structs.replace(reply, anthropic_message=error.anthropic_message)
        case OverloadedError():
            headers = {"retry-after": str(error.retry_after_s)}
            is_limit = isinstance(error, ClientLimitError)
            status, kind = (429, "rate_limit_error") if is_limit else (503, "server_error")
            reply = ErrorReply(status, kind, error.message, None, error.code, headers)
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


def answer(
    reply: ErrorReply, path: str, request_headers: Mapping[str, str], request_id: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an error, as the API that the request was for has them."""
    if speaks_anthropic(path, request_headers):
        anthropic = reply.for_anthropic()
        status, headers, body = anthropic.status, anthropic.headers, anthropic.body(request_id)
    else:
        status, headers, body = reply.status, reply.headers, reply.body()
    return status, {"content-type": "application/json", **headers}, body


def _handle_server_error(req: falcon.Request, resp: falcon.Response, error: ServerError, _params: Any) -> None:
    _send(req, resp, describe(error))


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
    _send(req, resp, reply)


def _handle_client_gone(_req: falcon.Request, resp: falcon.Response, _error: Exception, _params: Any) -> None:
    resp.status = "499 Client Closed Request"  # for the access log only


def _handle_unexpected(req: falcon.Request, resp: falcon.Response, error: Exception, _params: Any) -> None:
    log.error("request %s failed", resp.get_header("x-request-id"), exc_info=error)
    _send(req, resp, _INTERNAL_ERROR)


def _send(req: falcon.Request, resp: falcon.Response, reply: ErrorReply) -> None:
    status, headers, resp.data = answer(reply, req.path, req.headers, resp.get_header("x-request-id") or "")
    resp.status = falcon.code_to_http_status(status)
    resp.set_headers(headers)
    resp.stream = None
