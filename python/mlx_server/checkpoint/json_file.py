"""JSON files that come with a model: bounded, and never more than data."""

import json
from pathlib import Path

from mlx_server.errors import ModelLoadError

MAX_CONFIG_BYTES = 16 << 20
MAX_DEPTH = 32

JsonObject = dict[str, object]


def read_json(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> JsonObject:
    """The object in a JSON file. ModelLoadError if it is missing, too large, too deep or no JSON object.

    Takes NaN and Infinity, which published configs hold.
    """
    value = read_json_if_there(path, max_bytes=max_bytes)
    if value is None:
        raise is_missing(path)
    return value


def read_json_if_there(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> JsonObject | None:
    """As `read_json`, but None if there is no such file."""
    value = _read(path, max_bytes)
    if value is not None and not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value


def read_optional_json(path: Path) -> JsonObject:
    """As `read_json`, but {} if there is no such file."""
    return read_json_if_there(path) or {}


def read_optional_json_list(path: Path) -> list[object]:
    """The array in a JSON file, as `read_json` reads objects; [] if there is no such file."""
    value = _read(path, MAX_CONFIG_BYTES)
    if value is not None and not isinstance(value, list):
        raise ModelLoadError(f"{path} must hold a JSON array")
    return value or []


def read_text(path: Path, max_bytes: int) -> str | None:
    """A file's text, None if there is no such file. ModelLoadError if it is too large or can't be read."""
    try:
        if path.stat().st_size > max_bytes:
            raise ModelLoadError(f"{path} is larger than {max_bytes >> 20} MB")
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelLoadError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ModelLoadError(f"{path} is not UTF-8; download it again") from None


def is_missing(path: Path) -> ModelLoadError:
    return ModelLoadError(f"{path} is missing; is {path.parent} a complete model directory?")


def _read(path: Path, max_bytes: int) -> dict[str, object] | list[object] | None:
    text = read_text(path, max_bytes)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelLoadError(f"{path} is not valid JSON; download it again") from None
    if not isinstance(value, dict | list):
        raise ModelLoadError(f"{path} must hold a JSON object or array")
    _check_depth(path, value)
    return value


def _check_depth(path: Path, root: JsonObject | list[object]) -> None:
    level: list[object] = [root]
    for _ in range(MAX_DEPTH):
        level = [child for node in level if isinstance(node, (dict, list)) for child in _children(node)]
    if level:
        raise ModelLoadError(f"{path} is nested more than {MAX_DEPTH} deep")


def _children(node: dict[str, object] | list[object]) -> list[object]:
    return list(node.values()) if isinstance(node, dict) else node
