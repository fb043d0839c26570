"""GET /openapi.json and GET /docs, made of the types that decode requests and encode answers."""

from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, ClassVar

import falcon
import msgspec

from mlx_server import __version__
from mlx_server.api.errors import AnthropicError, OpenAIError, speaks_anthropic

_REF = "#/components/schemas/{name}"
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_PAGE_HEADERS = {
    # The page is one file; it fetches nothing but /openapi.json and what its user sends from it.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """What one method of a resource takes and gives.

    A resource holds one for each of its methods in `operations`, by the method's name; `document` finds it there. The
    types are those that msgspec decodes and encodes.
    """

    summary: str
    request: Any = None  # type of the JSON body
    query: type[msgspec.Struct] | None = None  # type of the query's parameters, by name
    answer: Any = None  # type of the JSON answer; a tuple: it has one of these types
    events: Any = None  # type of each event's data, where the answer may be streamed
    media_type: str = "application/json"  # of an answer that is no JSON
    needs_key: bool = True


class OpenApi:
    """The description of a server's routes, itself included."""

    operations: ClassVar = {
        "GET": Operation(summary="This description of the API, as OpenAPI 3.1", answer=dict[str, Any])
    }

    def __init__(self) -> None:
        self._document = b""

    def describe(self, routes: Mapping[str, Any], *, has_key: bool) -> None:
        """Set the routes: URI templates and resources."""
        self._document = msgspec.json.encode(document(routes, has_key=has_key))

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "application/json"
        resp.data = self._document

    on_head = on_get


class Docs:
    """The same as a page to read, and to try requests with."""

    operations: ClassVar = {
        "GET": Operation(summary="The API as a page to read and try", media_type="text/html", needs_key=False)
    }

    def __init__(self) -> None:
        self._page = resources.files("mlx_server.api").joinpath("docs.html").read_bytes()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "text/html; charset=utf-8"
        resp.set_headers(_PAGE_HEADERS)
        resp.data = self._page

    on_head = on_get


def document(routes: Mapping[str, Any], *, has_key: bool) -> dict[str, Any]:
    """OpenAPI's description of resources by their URI templates. `has_key`: requests need the server's key."""
    operations = [
        (path, method, operation)
        for path, resource in routes.items()
        for method, operation in resource.operations.items()
    ]
    used = list(dict.fromkeys(type_ for _, _, operation in operations for type_ in _types(operation)))
    schemas, components = msgspec.json.schema_components([*used, OpenAIError, AnthropicError], ref_template=_REF)
    schema_of = dict(zip([*used, OpenAIError, AnthropicError], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for template, method, operation in operations:
        path = template.replace(":path}", "}")
        described = _describe(path, operation, schema_of, components)
        if has_key and operation.needs_key:
            described["security"] = [{name: []} for name in _SECURITY_SCHEMES]
        described["operationId"] = f"{method.lower()}{path}".translate(str.maketrans("/.-", "___", "{}"))
        paths.setdefault(path, {})[method.lower()] = described
    for name in {_name(schema_of[operation.query]) for _, _, operation in operations if operation.query is not None}:
        del components[name]  # its fields stand in the parameters
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-server", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": _SECURITY_SCHEMES},
    }


def _types(operation: Operation) -> Iterator[Any]:
    types = (operation.request, operation.query, *_alternatives(operation.answer), operation.events)
    return (type_ for type_ in types if type_ is not None)


def _alternatives(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def _any_of(types: Iterable[Any], schema_of: Mapping[Any, Any]) -> Any:
    schemas = [schema_of[type_] for type_ in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _name(reference: Mapping[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _describe(
    path: str, operation: Operation, schema_of: Mapping[Any, Any], components: Mapping[str, Any]
) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(path, operation, schema_of)}
    if operation.request is not None:
        content = {"application/json": {"schema": schema_of[operation.request]}}
        described["requestBody"] = {"required": True, "content": content}
    names = [part.partition("}")[0] for part in path.split("{")[1:]]
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if operation.query is not None:
        fields = components[_name(schema_of[operation.query])]["properties"]
        parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]
    if parameters:
        described["parameters"] = parameters
    return described


def _responses(path: str, operation: Operation, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": _any_of(_alternatives(operation.answer), schema_of)}
    else:
        content[operation.media_type] = {"schema": {"type": "string"}}
    if operation.events is not None:
        schema = {"type": "string", "contentMediaType": "application/json"}
        content["text/event-stream"] = {"schema": schema, "x-event-schema": schema_of[operation.events]}
    # A path that both APIs have answers in the envelope that the request's headers ask for.
    versions: list[dict[str, str]] = [{}, {"ANTHROPIC-VERSION": ""}]
    envelopes = {AnthropicError if speaks_anthropic(path, headers) else OpenAIError for headers in versions}
    error = _any_of(sorted(envelopes, key=str), schema_of)
    return {
        "200": {"description": "The answer.", "content": content},
        "default": {"description": "An error.", "content": {"application/json": {"schema": error}}},
    }
