"""Typed reading of a model's configuration."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from mlx_server.errors import ModelLoadError

_T = TypeVar("_T")


def convert(fields: Mapping[str, object], kind: type[_T], where: str) -> _T:
    """The typed form of `fields`; unknown ones are ignored. ModelLoadError, beginning with `where`, if one is wrong."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{where}: {error}") from error
