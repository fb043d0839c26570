import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_server.checkpoint.safetensors import INDEX_NAME, read_header, weight_files
from mlx_server.errors import ModelLoadError


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: object, data_bytes: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


HEADER = {
    "__metadata__": {"format": "mlx"},
    "weight": entry("U32", [4, 2], 8, 40),
    "scales": entry("F16", [4], 0, 8),
    "scalar": entry("BF16", [], 40, 42),
    "empty": entry("F32", [0, 3], 42, 42),
}
GOOD = safetensors(HEADER, 42)


def test_reads_a_header(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    tensors = read_header(path)
    assert sorted(tensors) == ["empty", "scalar", "scales", "weight"]
    assert (tensors["weight"].dtype, tensors["weight"].shape) == ("U32", (4, 2))


def changed(name: str, *fields: Any) -> bytes:
    return safetensors(HEADER | {name: entry(*fields)}, 42)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "shorter than a header"),
        (GOOD[:7], "shorter than a header"),
        (GOOD[:50], "ends inside its header"),
        (struct.pack("<Q", 1 << 62) + GOOD[8:], "said to be 4611686018427387904 bytes long"),
        (GOOD[:-1], "its tensors take 42 bytes, but 41 are there"),
        (GOOD + b"\0", "its tensors take 42 bytes, but 43 are there"),
        (b"<!DOCTYPE html><html></html>", "is said to be"),
        (safetensors(b"\xff" * 10, 0), "no JSON description"),
        (safetensors(b"[1]", 0), "no JSON description"),
        (safetensors(b'{"a":' * 100_000, 0), "no JSON description"),
        (safetensors(b'{"a":' + b"[" * 100_000, 0), "no JSON description"),
        (safetensors({"a": 1}, 0), "no JSON description"),
        (safetensors({"a": {"dtype": "F32", "shape": [1]}}, 4), "no JSON description"),
        (safetensors({"a": entry("F32", [True], 0, 4)}, 4), "no JSON description"),
        (safetensors({"a": entry("F32", [-1], 0, 4)}, 4), "no JSON description"),
        (safetensors({"a": entry("F32", [1], -4, 0)}, 4), "no JSON description"),
        (changed("weight", "Q4", [4, 2], 8, 40), "unsupported type 'Q4'"),
        (changed("weight", "F64", [2, 2], 8, 40), "unsupported type 'F64'"),
        (changed("weight", "U32", [1] * 7 + [4, 2], 8, 40), "has 9 dimensions"),
        (changed("weight", "U32", [1 << 62, 1 << 62], 8, 40), "impossible shape"),
        (changed("weight", "U32", [2**61 + 8], 8, 40), "impossible shape"),  # 32 bytes, if counted in 64 bits
        (changed("weight", "U32", [4, 3], 8, 40), "takes 32 bytes, but its shape and type take 48"),
        (changed("weight", "U32", [4, 2], 4, 36), "begins at byte 4 of the data, not at 8"),
        (changed("weight", "U32", [4, 2], 12, 44), "begins at byte 12 of the data, not at 8"),
        (changed("empty", "F32", [0], 1 << 63, 1 << 63), "begins at byte 9223372036854775808"),
    ],
)
def test_refuses(tmp_path, data, fault):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelLoadError) as caught:
        read_header(path)
    assert fault in caught.value.message
    assert "model.safetensors" in caught.value.message


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 43), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_fuzz_changed_bytes(fuzzed, changes):
    data = bytearray(GOOD)
    for index, value in changes:
        data[index] = value
    fuzzed.write_bytes(data)
    try:
        tensors = read_header(fuzzed)
    except ModelLoadError:
        return
    assert max((tensor.data_offsets[1] for tensor in tensors.values()), default=0) <= len(data)


# --- Directories ---


def make_directory(directory: Path, files: dict[str, list[str]], index: dict[str, object] | None = None) -> Path:
    """Files with a scalar for each name; with an index if one is given."""
    for name, tensors in files.items():
        header = {tensor: entry("F32", [], 4 * i, 4 * i + 4) for i, tensor in enumerate(tensors)}
        (directory / name).write_bytes(safetensors(header, 4 * len(tensors)))
    if index is not None:
        (directory / INDEX_NAME).write_text(json.dumps({"weight_map": index}))
    return directory


def names(directory: Path) -> dict[str, list[str]]:
    return {path.name: sorted(tensors) for path, tensors in weight_files(directory).items()}


def test_files_of_an_index(tmp_path):
    files = {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}
    index = {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    make_directory(tmp_path, files | {"other.safetensors": ["x"]}, index)
    assert names(tmp_path) == files


def test_files_without_an_index(tmp_path):
    files = {"model-1.safetensors": ["x"], "model-2.safetensors": ["y"]}
    make_directory(tmp_path, files | {"consolidated.safetensors": ["x"]})
    assert names(tmp_path) == files


def test_a_file_of_any_name(tmp_path):
    assert names(make_directory(tmp_path, {"weights.safetensors": ["x"]})) == {"weights.safetensors": ["x"]}


@pytest.mark.parametrize(
    ("files", "index", "fault"),
    [
        ({}, None, "has no *.safetensors files"),
        ({"model-1.safetensors": ["x"], "model-2.safetensors": ["x"]}, None, "'x' twice, in model-1"),
        ({"a.safetensors": ["x"]}, {}, "has no weight_map"),
        ({"a.safetensors": ["x"]}, {"x": 1}, "names 1, which is not the plain name"),
        ({"a.safetensors": ["x"]}, {"x": "../a.safetensors"}, "not the plain name of a safetensors file"),
        ({"a.safetensors": ["x"]}, {"x": "/etc/a.safetensors"}, "not the plain name of a safetensors file"),
        ({"a.safetensors": ["x"]}, {"x": "a.bin"}, "not the plain name of a safetensors file"),
        ({"a.safetensors": ["x"]}, {"x": "b.safetensors"}, "b.safetensors can't be read: No such file"),
        ({"a.safetensors": ["x"]}, {"x": "a.safetensors", "y": "a.safetensors"}, "tensor 'y' is missing, which"),
    ],
)
def test_refuses_directories(tmp_path, files, index, fault):
    make_directory(tmp_path, files, index)
    with pytest.raises(ModelLoadError) as caught:
        weight_files(tmp_path)
    assert fault in caught.value.message
