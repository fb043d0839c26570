"""A check of safetensors headers, to be passed before MLX opens the file: MLX trusts the sizes in it.

Format: https://github.com/huggingface/safetensors#format
"""

import math
import struct
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec

from mlx_server.checkpoint.json_file import read_json_if_there
from mlx_server.errors import ModelLoadError

MAX_HEADER_BYTES = 100 << 20
MAX_RANK = 8
MAX_DIM = (1 << 63) - 1
INDEX_NAME = "model.safetensors.index.json"

# The types that MLX reads, with their size in bytes
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "C64": 8,
}

_Size = Annotated[int, msgspec.Meta(ge=0)]


class TensorInfo(msgspec.Struct, frozen=True):
    """One entry of a header."""

    dtype: str  # a key of DTYPE_BYTES
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]  # first byte and end, from the start of the data


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, all of its header checked. ModelLoadError says what is wrong."""
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            length_bytes = file.read(8)
            if len(length_bytes) < 8:
                _fail(path, "it is shorter than a header (is the download incomplete?)")
            (header_bytes,) = struct.unpack("<Q", length_bytes)
            if header_bytes > MAX_HEADER_BYTES:
                _fail(path, f"its header is said to be {header_bytes} bytes long")
            data_bytes = file_bytes - 8 - header_bytes
            if data_bytes < 0:
                _fail(path, "it ends inside its header (is the download incomplete?)")
            header = file.read(header_bytes)
    except OSError as error:
        raise ModelLoadError(f"{path} can't be read: {error.strerror}") from error
    tensors = _decode(path, header)
    _check(path, tensors, data_bytes)
    return tensors


def weight_files(directory: Path) -> dict[Path, dict[str, TensorInfo]]:
    """The checked headers of all weight files of a model directory: those of its index, else all *.safetensors.

    With an index, each tensor must be in the file that the index names.
    """
    shards = _index(directory / INDEX_NAME)
    if shards is None:
        paths = sorted(directory.glob("model*.safetensors")) or sorted(directory.glob("*.safetensors"))
        if not paths:
            raise ModelLoadError(
                f"{directory} has no *.safetensors files; only safetensors and GGUF weights are supported"
            )
        headers = {path: read_header(path) for path in paths}
        _check_unique(directory, headers)
        return headers
    headers = {directory / name: read_header(directory / name) for name in sorted(set(shards.values()))}
    for tensor, name in shards.items():
        if tensor not in headers[directory / name]:
            _fail(directory / name, f"tensor {tensor!r} is missing, which {INDEX_NAME} says is there")
    _check_unique(directory, headers)
    return headers


def _index(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name, all of them plain names of safetensors files; None if there is no index."""
    index = read_json_if_there(path, max_bytes=MAX_HEADER_BYTES)
    if index is None:
        return None
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelLoadError(f"{path} has no weight_map")
    for name in shards.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or name != Path(name).name or "\\" in name:
            raise ModelLoadError(f"{path} names {name!r}, which is not the plain name of a safetensors file")
    return shards


def _check_unique(directory: Path, headers: dict[Path, dict[str, TensorInfo]]) -> None:
    seen: dict[str, Path] = {}
    for path, tensors in headers.items():
        for tensor in tensors:
            if tensor in seen:
                raise ModelLoadError(f"{directory} has tensor {tensor!r} twice, in {seen[tensor].name} and {path.name}")
            seen[tensor] = path


def _decode(path: Path, header: bytes) -> dict[str, TensorInfo]:
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        return {name: msgspec.json.decode(entry, type=TensorInfo) for name, entry in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        _fail(path, "its header is no JSON description of tensors")


def _check(path: Path, tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """The tensors' bytes follow each other without gap or overlap, from the first byte of the data to the last."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        if tensor.dtype not in DTYPE_BYTES:
            _fail(path, f"tensor {name!r} has the unsupported type {tensor.dtype!r}")
        if len(tensor.shape) > MAX_RANK:
            _fail(path, f"tensor {name!r} has {len(tensor.shape)} dimensions")
        size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        if size > MAX_DIM:
            _fail(path, f"tensor {name!r} has the impossible shape {tensor.shape}")
        begin, tensor_end = tensor.data_offsets
        if begin != end:
            _fail(path, f"tensor {name!r} begins at byte {begin} of the data, not at {end}, where the one before ends")
        if tensor_end - begin != size:
            _fail(path, f"tensor {name!r} takes {tensor_end - begin} bytes, but its shape and type take {size}")
        end = tensor_end
    if end != data_bytes:
        _fail(path, f"its tensors take {end} bytes, but {data_bytes} are there (is the download incomplete?)")


def _fail(path: Path, fault: str) -> NoReturn:
    raise ModelLoadError(f"{path} is not a usable safetensors file: {fault}")
