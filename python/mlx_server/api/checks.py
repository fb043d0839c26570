"""What both APIs ask of a field's value, beyond its type."""

from collections.abc import Mapping
from typing import Any

from mlx_server.errors import InvalidRequestError


def refuse_nul(text: str, path: str) -> None:
    """InvalidRequestError if a text holds a NUL character."""
    if "\0" in text:
        raise InvalidRequestError(f"`{path}` holds a NUL character.", param=path)


def check_parameters(schema: Mapping[str, Any], path: str) -> None:
    """InvalidRequestError if a tool's arguments would not be an object."""
    if schema.get("type", "object") != "object":
        fault = f"`{path}.type` must be 'object', as a call's arguments are one."
        raise InvalidRequestError(fault, param=f"{path}.type")
