"""Writes small GGUF files for tests, right or wrong ones."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ALIGNMENT = 32


class Q:
    """A quantized tensor: its row-major shape, GGML type number and raw blocks."""

    def __init__(self, shape: Sequence[int], type_number: int, data: bytes) -> None:
        self.shape, self.type_number, self.data = shape, type_number, data


def write_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, "np.ndarray[Any, Any] | Q"], version: int = 3
) -> bytes:
    """A GGUF file. Python's ints become uint32, floats float32; arrays are float32 or float16."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, payload = _value(value)
        header += _string(key) + struct.pack("<I", kind) + payload
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = Q(tensor.shape, {"float32": 0, "float16": 1}[tensor.dtype.name], tensor.tobytes())
        header += _string(name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", tensor.type_number, len(data))
        data += _pad(tensor.data)
    return _pad(header) + data


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return _BOOL, struct.pack("<?", value)
        case int():
            return _UINT32, struct.pack("<I", value)
        case float():
            return _FLOAT32, struct.pack("<f", value)
        case str():
            return _STRING, _string(value)
        case list():
            items = [_value(item) for item in value]
            kind = items[0][0] if items else _UINT32
            return _ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(payload for _, payload in items)
    raise TypeError(type(value))
