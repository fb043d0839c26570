"""Fields of a request's body that its type does not have: OpenAI and Anthropic ignore them, this server says so."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from msgspec import inspect

MAX_NAMED = 20  # fields; one answer names no more

_MAX_NAME_LENGTH = 64
_JsonObject = dict[str, Any]


@dataclass
class _Shape:
    """Where a JSON value of some type holds objects with known fields. None stands for a value that may be anything."""

    # An object's fields. Of several types of objects, a field tells which: its value is the key here.
    objects: "dict[Any, dict[str, _Shape | None]]" = field(default_factory=dict)
    tag_field: str | None = None
    items: "_Shape | None" = None  # of an array
    values: "_Shape | None" = None  # of an object with any keys

    def fields(self, value: _JsonObject) -> "dict[str, _Shape | None] | None":
        tag = value.get(self.tag_field) if self.tag_field is not None else None
        return self.objects.get(tag if isinstance(tag, str | int) else None)


def unknown_fields(value: object, type_: Any) -> list[str]:
    """Paths of the fields in `value`, decoded JSON that is valid as a `type_`, which that type does not have.

    Such as `messages[0].foo`; the first `MAX_NAMED` of them, those nearer to the top first.
    """
    found: list[str] = []
    queue: deque[tuple[Any, _Shape, str]] = deque()
    shape = _shape_of_type(type_)
    if shape is not None:
        queue.append((value, shape, ""))
    while queue and len(found) < MAX_NAMED:
        value, shape, path = queue.popleft()
        for name, child, child_shape in _children(value, shape):
            child_path = f"{path}{name}" if path or name[0] == "[" else name[1:]
            if child_shape is _UNKNOWN:
                found.append(child_path)
            elif isinstance(child, dict | list):
                queue.append((child, child_shape, child_path))
    return found[:MAX_NAMED]


_UNKNOWN = _Shape()


def _children(value: Any, shape: _Shape) -> Iterator[tuple[str, Any, _Shape]]:
    """What in a value has a shape, or is an unknown field: its name in a path, value and shape."""
    if isinstance(value, list):
        if shape.items is not None:
            yield from ((f"[{i}]", item, shape.items) for i, item in enumerate(value))
    elif shape.values is not None:
        yield from ((_key(name), item, shape.values) for name, item in value.items())
    elif (fields := shape.fields(value)) is not None:
        for name, item in value.items():
            child_shape = fields.get(name, _UNKNOWN)
            if child_shape is not None:
                yield _key(name), item, child_shape


def _key(name: str) -> str:
    return f".{name[:_MAX_NAME_LENGTH]}"


@cache
def _shape_of_type(type_: Any) -> _Shape | None:
    return _shape(inspect.type_info(type_), {})


def _shape(info: inspect.Type, known: dict[type, _Shape]) -> _Shape | None:
    """The shape of a type, None if no struct can be inside. `known`: shapes of structs, which may hold themselves."""
    match info:
        case inspect.Metadata():
            return _shape(info.type, known)
        case inspect.StructType():
            return _struct_shape(info, known)
        case inspect.ListType() | inspect.VarTupleType():
            items = _shape(info.item_type, known)
            return None if items is None else _Shape(items=items)
        case inspect.DictType():
            values = _shape(info.value_type, known)
            return None if values is None else _Shape(values=values)
        case inspect.UnionType():
            return _union_shape([shape for part in info.types if (shape := _shape(part, known)) is not None])
    return None


def _struct_shape(info: inspect.StructType, known: dict[type, _Shape]) -> _Shape:
    if info.cls in known:
        return known[info.cls]
    fields: dict[str, _Shape | None] = {} if info.tag_field is None else {info.tag_field: None}
    shape = known[info.cls] = _Shape({info.tag: fields}, info.tag_field)
    fields.update({part.encode_name: _shape(part.type, known) for part in info.fields})
    return shape


def _union_shape(shapes: list[_Shape]) -> _Shape | None:
    """One shape for all parts of a union: JSON tells arrays from objects, a tag one object from another."""
    if len(shapes) < 2:
        return shapes[0] if shapes else None
    union = _Shape()
    for shape in shapes:
        union.objects |= shape.objects
        union.tag_field = union.tag_field or shape.tag_field
        union.items = union.items or shape.items
        union.values = union.values or shape.values
    return union
