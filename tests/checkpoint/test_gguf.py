import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gguf_writer import Q, write_gguf
from mlx_server.checkpoint.gguf import MAX_ARRAY_ITEMS, read_gguf
from mlx_server.errors import ModelLoadError

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "Ġa", "é"],
    "nested": [[1, 2], [3]],
    "empty": [],
}
TENSORS: dict[str, np.ndarray | Q] = {
    "norm": np.arange(6, dtype=np.float32),
    "weight": Q((2, 64), 3, bytes(2 * 2 * 20)),
    "half": np.ones((3, 2), np.float16),
}
GOOD = write_gguf(METADATA, TENSORS)


@pytest.fixture
def write(tmp_path: Path):
    def write(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_reads_metadata_and_tensor_places(write, version):
    gguf = read_gguf(write(write_gguf(METADATA, TENSORS, version)))
    assert gguf.metadata == METADATA
    assert gguf.tensors["weight"].shape == (2, 64)
    assert gguf.tensors["weight"].type == "Q4_1"
    assert gguf.tensors["weight"].size_bytes == 80
    norm = gguf.tensors["norm"]
    data = gguf.path.read_bytes()[norm.offset : norm.offset + norm.size_bytes]
    assert np.frombuffer(data, np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def test_typed_access(write):
    gguf = read_gguf(write(GOOD))
    assert gguf.require("llama.block_count", int) == 2
    assert gguf.require("llama.rope.freq_base", float) == 10000.0
    assert gguf.get("no.such.key", int) is None
    assert gguf.require_list("tokenizer.ggml.tokens", str) == ["<s>", "Ġa", "é"]
    for key, kind in [("general.architecture", int), ("tokenizer.ggml.add_bos_token", int), ("no.such.key", str)]:
        with pytest.raises(ModelLoadError, match=key):
            gguf.require(key, kind)
    with pytest.raises(ModelLoadError, match="array of int"):
        gguf.require_list("tokenizer.ggml.tokens", int)


def patch(old: bytes, new: bytes) -> bytes:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def info(name: str, *dims: int, kind: int, offset: int) -> bytes:
    return name.encode() + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


WEIGHT = info("weight", 64, 2, kind=3, offset=32)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "ends after byte 0"),
        (b"PK\x03\x04" + GOOD[4:], "does not begin with GGUF"),
        (GOOD[:4] + struct.pack("<I", 1) + GOOD[8:], "version 1 is unknown"),
        (GOOD[:4] + struct.pack(">I", 3) + GOOD[8:], "version 50331648 is unknown"),
        (GOOD[:8] + struct.pack("<Q", 1 << 60) + GOOD[16:], "too many"),
        (GOOD[:16] + struct.pack("<Q", 1 << 60) + GOOD[24:], "too many"),
        (GOOD[:-32], "download incomplete"),
        (patch(b"llama.block_count", b"llama.block_coun\xff"), "not UTF-8"),
        (patch(WEIGHT, info("weight", 64, 2, kind=4, offset=32)), "unknown type 4"),
        (patch(WEIGHT, info("weight", 48, 2, kind=3, offset=32)), "rows of 48"),
        (patch(WEIGHT, info("weight", 1 << 60, 1 << 60, kind=3, offset=32)), "impossible shape"),
        (patch(WEIGHT, info("weight", 64, 0, kind=3, offset=32)), "impossible shape"),
        (patch(WEIGHT, info("weight", 1 << 40, 2, kind=3, offset=32)), "download incomplete"),
        (patch(WEIGHT, info("weight", 64, 2, kind=3, offset=33)), "no multiple of 32"),
        (patch(WEIGHT, info("weight", 64, 2, kind=3, offset=0)), "overlaps"),
        (patch(WEIGHT, info("weight", 64, 2, kind=3, offset=(1 << 64) - 32)), "download incomplete"),
        (write_gguf({"general.alignment": 0}, {}), "general.alignment"),
        (write_gguf({"general.alignment": 48}, {}), "general.alignment"),
        (write_gguf({"general.alignment": "32"}, {}), "general.alignment"),
        (write_gguf({"deep": [[[[[1]]]]]}, {}), "more than 4 deep"),
        (write_gguf({}, {"t": np.ones((1,) * 5, np.float32)}), "5 dimensions"),
        (patch(b"norm", b"half"), "'half' appears twice"),
        (write_gguf({"first": 1, "other": 2}, {}).replace(b"other", b"first"), "'first' appears twice"),
        (write_gguf({"first": 1}, {}).replace(b"first\x04", b"first\x0d"), "unknown type 13"),
        (write_gguf({"first": [1]}, {}).replace(b"\x01\0\0\0\0\0\0\0\x01", b"\xff" * 9), "too many"),
    ],
)
def test_refuses(write, data, fault):
    with pytest.raises(ModelLoadError, match=fault) as caught:
        read_gguf(write(data))
    assert "model.gguf" in caught.value.message and "\n" not in caught.value.message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"absent\.gguf can't be read: No such file"):
        read_gguf(tmp_path / "absent.gguf")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="can't be read: Is a directory"):
        read_gguf(tmp_path)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


def read_or_refuse(path: Path) -> None:
    """Reading gives a header that holds within the file, or ModelLoadError; nothing else."""
    try:
        gguf = read_gguf(path)
    except ModelLoadError:
        return
    for tensor in gguf.tensors.values():
        assert 0 < tensor.offset <= tensor.offset + tensor.size_bytes <= path.stat().st_size


@given(st.integers(0, len(GOOD) - 1))
def test_fuzz_truncated(fuzzed, size):
    fuzzed.write_bytes(GOOD[:size])
    read_or_refuse(fuzzed)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=500)
def test_fuzz_changed_bytes(fuzzed, changes):
    data = bytearray(GOOD)
    for index, value in changes:
        data[index] = value
    fuzzed.write_bytes(data)
    read_or_refuse(fuzzed)


@given(st.binary(max_size=200))
@example(struct.pack("<IQ", 9, MAX_ARRAY_ITEMS) * 3)
def test_fuzz_metadata(fuzzed, payload):
    fuzzed.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + struct.pack("<Q", 1) + b"k" + payload)
    read_or_refuse(fuzzed)


def test_memory_stays_small_for_a_huge_count(write):
    data = GOOD[:24] + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 10, MAX_ARRAY_ITEMS)
    path = write(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadError, match="download incomplete"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
