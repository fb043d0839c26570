"""GGML's block types in MLX's form, against their definition and against what the package `gguf` 0.19 made of them."""

import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from gguf_writer import Q, write_gguf
from mlx_server.checkpoint.gguf import GGUFTensor, read_gguf
from mlx_server.models.gguf_blocks import GROUP_SIZE, QUANTIZED_TYPES, read_floats, read_matrix
from reference.gguf_blocks import TYPES, dequantize, random_blocks
from reference.linear import dequantize as mlx_dequantize

EXACT = [name for name, kind in QUANTIZED_TYPES.items() if kind.is_exact]
GOLDEN = Path(__file__).parent / "gguf" / "blocks.npz"  # of each type two blocks, and gguf.quants.dequantize of them


def read_blocks(tmp_path: Path, kind: str, blocks: np.ndarray[Any, Any], rows: int = 1) -> np.ndarray[Any, Any]:
    """The weights [rows, K] float32 that the loader makes of blocks."""
    number, num_weights, *_ = TYPES[kind]
    shape = (rows, blocks.shape[0] // rows * num_weights)
    path = tmp_path / "blocks.gguf"
    path.write_bytes(write_gguf({}, {"before": np.zeros(5, np.float32), "t": Q(shape, number, blocks.tobytes())}))
    bits = QUANTIZED_TYPES[kind].bits
    with path.open("rb") as file:
        weight, scales, biases = read_matrix(file, read_gguf(path).tensors["t"])
    assert weight.dtype == mx.uint32 and weight.shape == (rows, shape[1] * bits // 32)
    assert scales.dtype == biases.dtype == mx.float32 and scales.shape == biases.shape == (rows, shape[1] // GROUP_SIZE)
    arrays = (np.array(array) for array in (weight, scales, biases))
    return mlx_dequantize(*arrays, group_size=GROUP_SIZE, bits=bits).astype(np.float32)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 60000.0])
def test_weights_are_those_of_the_definition(kind, magnitude, tmp_path):
    blocks = random_blocks(kind, 24, magnitude=magnitude)
    weights = read_blocks(tmp_path, kind, blocks, rows=3)
    np.testing.assert_array_equal(weights.reshape(24, -1), dequantize(kind, blocks))


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_those_of_another_reader(kind, tmp_path):
    golden = np.load(GOLDEN)
    blocks, expected = golden[f"{kind}.blocks"], golden[kind]
    np.testing.assert_array_equal(dequantize(kind, blocks), expected)
    if kind in EXACT:
        np.testing.assert_array_equal(read_blocks(tmp_path, kind, blocks).reshape(2, -1), expected)


def test_q6_k_is_off_by_at_most_half_a_step(tmp_path):
    blocks = random_blocks("Q6_K", 200)
    blocks[0, 192:208] = 0  # all weights of a block are zero
    expected = dequantize("Q6_K", blocks).reshape(-1, GROUP_SIZE)
    weights = read_blocks(tmp_path, "Q6_K", blocks, rows=5).reshape(-1, GROUP_SIZE)
    bound = np.ptp(expected, axis=1, keepdims=True) / 255 / 2 * (1 + 1e-4)
    assert (np.abs(weights - expected) <= bound).all()
    assert not weights[:8].any()


@pytest.mark.parametrize("kind", TYPES)
def test_one_chunk_gives_what_many_do(kind, tmp_path, monkeypatch):
    blocks = random_blocks(kind, 20)
    whole = read_blocks(tmp_path, kind, blocks)
    monkeypatch.setattr("mlx_server.models.gguf_blocks._CHUNK_VALUES", 3 * 256)
    np.testing.assert_array_equal(read_blocks(tmp_path, kind, blocks), whole)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_read_as_they_are(kind, tmp_path):
    dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[kind]
    values = mx.random.normal((3, 5), key=mx.random.key(0)).astype(dtype)
    data = bytes(np.array(values.view(mx.uint8)))
    path = tmp_path / "floats.gguf"
    path.write_bytes(write_gguf({}, {"t": Q((3, 5), {"F32": 0, "F16": 1, "BF16": 30}[kind], data)}))
    with path.open("rb") as file:
        read = read_floats(file, read_gguf(path).tensors["t"])
    assert read.dtype == dtype and mx.array_equal(read, values)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused(kind, number, tmp_path):
    blocks = random_blocks(kind, 4)
    for at in TYPES[kind][3]:
        broken = blocks.copy()
        broken[2, at : at + 2] = np.array([number], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match="a scale is infinite or not a number"):
            read_blocks(tmp_path, kind, broken)


@pytest.mark.parametrize(("kind", "read"), [("Q4_0", read_matrix), ("F32", read_floats)])
def test_a_file_that_became_shorter_is_noticed(kind, read, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(bytes(10 * 18 - 1))
    tensor = GGUFTensor((1, 320), "Q4_0", 0, 180) if kind == "Q4_0" else GGUFTensor((45,), "F32", 0, 180)
    with path.open("rb") as file, pytest.raises(EOFError):
        read(file, tensor)


def test_reading_takes_little_more_memory_than_the_result(tmp_path):
    path = tmp_path / "large"
    num_blocks = 1 << 14
    path.write_bytes(random_blocks("Q6_K", num_blocks).tobytes())
    with path.open("rb") as file:
        tracemalloc.start()
        read_matrix(file, GGUFTensor((64, num_blocks * 4), "Q6_K", 0, num_blocks * 210))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < num_blocks * 256 * 10 / 8 + (6 << 20)  # 8 bits and 2 for scale and bias a weight, and a chunk
