"""Request bodies: size, type and strict JSON, checked before any field is looked at."""

import re
from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import falcon
import msgspec

from mlx_server.api.errors import HttpError
from mlx_server.api.unknown_fields import MAX_NAMED, unknown_fields
from mlx_server.errors import InvalidRequestError

MAX_BODY_BYTES = 8 << 20
IGNORED_HEADER = "x-mlx-server-ignored"

_MAX_DEPTH = 64  # of nested arrays and objects
_MAX_DESCRIPTION = 200  # it may quote the client's value

_T = TypeVar("_T")
_PATH = re.compile(r"(?P<message>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<field>[^`]*)`")


def decode_body(req: falcon.Request, resp: falcon.Response, decoder: msgspec.json.Decoder[_T], *, strict: bool) -> _T:
    """The request's JSON body. InvalidRequestError, with the field's path as `param`, if `decoder` refuses it.

    Fields that the decoder's type does not have are named in a header of the answer; with `strict` they are an error.
    A type names all fields that the API knows, also those that it accepts without effect.
    """
    _check_headers(req)
    body = _read(req)
    try:
        body.decode()  # the decoder does not look into strings that it skips
        value = decoder.decode(body)
        everything = msgspec.json.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequestError("The body is not valid JSON in UTF-8.", code="invalid_json") from None
    if _is_deep(everything):
        raise InvalidRequestError(f"The body nests more than {_MAX_DEPTH} levels deep.", code="invalid_json")
    name_ignored(resp, unknown_fields(everything, decoder.type), strict=strict)
    return value


def name_ignored(resp: falcon.Response, paths: Sequence[str], *, strict: bool) -> None:
    """Name in the answer's header what of the request is ignored; with `strict` it is an error."""
    if not paths:
        return
    if strict:
        raise InvalidRequestError(f"`{paths[0]}`: unknown field.", param=paths[0], code="unknown_field")
    names = [quote(path, safe="[]") for path in paths[:MAX_NAMED]]
    if (earlier := resp.get_header(IGNORED_HEADER)) is not None:
        names.insert(0, earlier)
    resp.set_header(IGNORED_HEADER, ", ".join(names))


def decode_query(req: falcon.Request, type_: type[_T]) -> _T:
    """The query's parameters as a struct. Those that it has no field for are ignored, as both APIs do."""
    try:
        return msgspec.convert(req.params, type_, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from None


def _check_headers(req: falcon.Request) -> None:
    # A browser sends other types, or none, across origins without asking first, but never without its origin.
    implied = "application/json" if req.get_header("origin") is None else ""
    media_type = (req.content_type or implied).partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(415, "unsupported_media_type", "The body must be sent as Content-Type: application/json.")
    if (req.get_header("content-encoding") or "identity").strip().lower() != "identity":
        raise HttpError(415, "unsupported_content_encoding", "Compressed bodies are not supported.")


def _read(req: falcon.Request) -> bytes:
    # Not falcon's bounded_stream: it is empty for chunked bodies. The server has read the body to its end, so that this
    # waits for nothing.
    body: bytes = req.env["wsgi.input"].read(MAX_BODY_BYTES + 1)
    if len(body) > MAX_BODY_BYTES:
        raise too_large()
    return body


def incomplete() -> HttpError:
    return HttpError(400, "incomplete_body", "The body could not be read to its end.")


def too_large() -> HttpError:
    return HttpError(413, "request_too_large", f"The body is larger than {MAX_BODY_BYTES} bytes.")


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        inside = [part.values() if isinstance(part, dict) else part for part in level]
        level = [child for children in inside for child in children if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _invalid_field(description: str) -> InvalidRequestError:
    """msgspec's description of a mismatch, such as "Expected `int`, got `str` - at `$.seed`", as an error of ours."""
    path = ""
    if match := _PATH.fullmatch(description):
        description, path = match["message"], match["path"]
    if match := _MISSING_FIELD.fullmatch(description):
        path = f"{path}.{match['field']}".lstrip(".")
    subject = f"`{path}`" if path else "The body"
    return InvalidRequestError(f"{subject}: {description[:_MAX_DESCRIPTION]}.", param=path or None)
