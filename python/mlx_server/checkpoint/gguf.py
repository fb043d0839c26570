"""A bounded reader of GGUF headers (versions 2 and 3): metadata and where each tensor's data lies.

MLX's own reader trusts the file, so nothing of a file reaches it, or is allocated, before everything here was checked:
counts, lengths, types, nesting, alignment, and that each tensor's bytes are inside the file and nobody else's.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeAlias, TypeVar

import msgspec

from mlx_server.errors import ModelLoadError

MAX_HEADER_BYTES = 100 << 20
MAX_METADATA_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_ARRAY_ITEMS = 1 << 22  # in all arrays of a file together; the largest vocabularies have 0.3 million entries
MAX_ARRAY_DEPTH = 4
MAX_KEY_BYTES = 1024
MAX_NAME_BYTES = 1024
MAX_RANK = 4
MAX_DIM = (1 << 63) - 1

# GGML type number -> (name, values in a block, bytes of a block)
BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
BLOCK_SIZES = {name: (num_values, num_bytes) for name, num_values, num_bytes in BLOCK_TYPES.values()}

# GGUF metadata type number -> struct format; 7 bool, 8 string and 9 array are read by hand
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

MetadataValue: TypeAlias = "bool | int | float | str | list[MetadataValue]"
_T = TypeVar("_T", bool, int, float, str)


class GGUFTensor(msgspec.Struct, frozen=True):
    """Where a tensor's data is. `shape` is in row-major order, the reverse of GGUF's: a matrix is [rows, columns]."""

    shape: tuple[int, ...]
    type: str  # a name of BLOCK_TYPES
    offset: int  # bytes from the start of the file
    size_bytes: int


class GGUF(msgspec.Struct, frozen=True):
    """A checked GGUF header."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """The metadata value of `key`, None if there is none; ModelLoadError if it has another type."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not _is_a(value, kind):
            raise ModelLoadError(f"{self.path}: metadata {key} must be {kind.__name__} but is {type(value).__name__}")
        return kind(value)  # type: ignore[arg-type]

    def require(self, key: str, kind: type[_T]) -> _T:
        """As `get`, but ModelLoadError if the file has no such key."""
        value = self.get(key, kind)
        if value is None:
            raise ModelLoadError(f"{self.path}: metadata {key} is missing")
        return value

    def get_list(self, key: str, kind: type[_T]) -> list[_T] | None:
        """The metadata array of `key`, None if there is none; ModelLoadError if it is no array of that type."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(_is_a(item, kind) for item in value):
            raise ModelLoadError(f"{self.path}: metadata {key} must be an array of {kind.__name__}")
        return value  # type: ignore[return-value]

    def require_list(self, key: str, kind: type[_T]) -> list[_T]:
        """As `get_list`, but ModelLoadError if the file has no such key."""
        value = self.get_list(key, kind)
        if value is None:
            raise ModelLoadError(f"{self.path}: metadata {key} is missing")
        return value


def read_gguf(path: Path) -> GGUF:
    """Read and check the header of a GGUF file. ModelLoadError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            return _parse(_Cursor(path, file, path.stat().st_size))
    except OSError as error:
        raise ModelLoadError(f"{path} can't be read: {error.strerror}") from error


def _is_a(value: object, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and not isinstance(value, bool)


class _Cursor:
    """Reads forward through the first MAX_HEADER_BYTES of a file, never past its end."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.items_left = MAX_ARRAY_ITEMS
        self.pos = 0
        self._file = file
        self._buffer = bytearray()
        self._buffer_pos = 0  # of the buffer's first byte in the file

    def fail(self, fault: str) -> NoReturn:
        raise ModelLoadError(f"{self.path} is not a usable GGUF file: {fault}")

    def _at(self, size: int) -> int:
        """Make the next `size` bytes available and step over them; their index in the buffer."""
        if size > self.file_bytes - self.pos:
            self.fail(f"the header ends after byte {self.file_bytes} (is the download incomplete?)")
        if self.pos + size > MAX_HEADER_BYTES:
            self.fail(f"the header is larger than {MAX_HEADER_BYTES} bytes")
        start = self.pos - self._buffer_pos
        if start + size > len(self._buffer):
            del self._buffer[:start]
            self._buffer_pos, start = self.pos, 0
            self._buffer += self._file.read(max(size, 1 << 20))
            if len(self._buffer) < size:
                self.fail("it became shorter while it was read")
        self.pos += size
        return start

    def numbers(self, code: str, count: int = 1) -> tuple[int | float | bool, ...]:
        size = struct.calcsize(f"<{code}") * count  # Python ints: no overflow, and checked before anything is allocated
        start = self._at(size)
        return struct.unpack_from(f"<{count}{code}", self._buffer, start)

    def integer(self, code: str) -> int:
        return int(self.numbers(code)[0])

    def string(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.integer("Q")
        if length > max_bytes:
            self.fail(f"{what} is {length} bytes long")
        start = self._at(length)
        try:
            return self._buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")


def _parse(cursor: _Cursor) -> GGUF:
    magic = bytes(cursor.numbers("B", 4))  # type: ignore[arg-type]
    if magic != b"GGUF":
        cursor.fail("it does not begin with GGUF")
    version = cursor.integer("I")
    if version not in (2, 3):
        cursor.fail(f"version {version} is unknown (2 and 3 are supported)")
    num_tensors, num_keys = cursor.integer("Q"), cursor.integer("Q")
    if num_tensors > MAX_TENSORS or num_keys > MAX_METADATA_KEYS:
        cursor.fail(f"{num_tensors} tensors and {num_keys} metadata keys are too many")

    metadata: dict[str, MetadataValue] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            cursor.fail(f"metadata {key!r} appears twice")
        metadata[key] = _read_value(cursor, key, cursor.integer("I"), 0)
    tensors = dict[str, GGUFTensor]()
    for _ in range(num_tensors):
        name = cursor.string("a tensor's name", MAX_NAME_BYTES)
        if name in tensors:
            cursor.fail(f"tensor {name!r} appears twice")
        tensors[name] = _read_tensor_info(cursor, name)
    tensors = _place(cursor, tensors, _alignment(cursor, metadata))
    return GGUF(cursor.path, metadata, tensors)


def _read_value(cursor: _Cursor, key: str, kind: int, depth: int) -> MetadataValue:
    if kind == _STRING:
        return cursor.string(f"metadata {key!r}")
    if kind == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    if kind == _BOOL:
        return cursor.integer("B") != 0
    if kind not in _SCALARS:
        cursor.fail(f"metadata {key!r} has the unknown type {kind}")
    return cursor.numbers(_SCALARS[kind])[0]


def _read_array(cursor: _Cursor, key: str, depth: int) -> list[MetadataValue]:
    if depth > MAX_ARRAY_DEPTH:
        cursor.fail(f"metadata {key!r} nests arrays more than {MAX_ARRAY_DEPTH} deep")
    kind, count = cursor.integer("I"), cursor.integer("Q")
    if count > cursor.items_left:
        cursor.fail(f"metadata {key!r} has {count} entries, too many")
    cursor.items_left -= count
    if kind in _SCALARS:
        return list(cursor.numbers(_SCALARS[kind], count))
    return [_read_value(cursor, key, kind, depth) for _ in range(count)]


def _read_tensor_info(cursor: _Cursor, name: str) -> GGUFTensor:
    """A tensor's description; `offset` is still relative to the start of the data."""
    rank = cursor.integer("I")
    if not 1 <= rank <= MAX_RANK:
        cursor.fail(f"tensor {name!r} has {rank} dimensions")
    shape = tuple(int(dim) for dim in reversed(cursor.numbers("Q", rank)))
    kind, offset = cursor.integer("I"), cursor.integer("Q")
    if kind not in BLOCK_TYPES:
        cursor.fail(f"tensor {name!r} has the unknown type {kind}")
    type_name, block_values, block_bytes = BLOCK_TYPES[kind]
    num_values = 1
    for dim in shape:
        num_values *= dim
    if not 0 < num_values <= MAX_DIM:
        cursor.fail(f"tensor {name!r} has the impossible shape {shape}")
    if shape[-1] % block_values:
        cursor.fail(f"tensor {name!r} has rows of {shape[-1]} values, no multiple of {type_name}'s {block_values}")
    return GGUFTensor(shape, type_name, offset, num_values // block_values * block_bytes)


def _alignment(cursor: _Cursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not _is_a(alignment, int) or alignment not in {1 << shift for shift in range(3, 17)}:
        cursor.fail(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
    return int(alignment)


def _place(cursor: _Cursor, tensors: dict[str, GGUFTensor], alignment: int) -> dict[str, GGUFTensor]:
    """The tensors with offsets from the start of the file, each aligned, inside the file and apart from the others."""
    data_start = -(-cursor.pos // alignment) * alignment
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        start = data_start + tensor.offset
        if tensor.offset % alignment:
            cursor.fail(f"tensor {name!r} begins at {tensor.offset}, no multiple of {alignment}")
        if start < end:
            cursor.fail(f"tensor {name!r} overlaps the one before it")
        end = start + tensor.size_bytes
        if end > cursor.file_bytes:
            cursor.fail(f"tensor {name!r} ends at byte {end} of {cursor.file_bytes} (is the download incomplete?)")
    return {
        name: GGUFTensor(tensor.shape, tensor.type, data_start + tensor.offset, tensor.size_bytes)
        for name, tensor in tensors.items()
    }
