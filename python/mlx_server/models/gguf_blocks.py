"""GGML's block types, turned into the arrays in which `mx.quantize` stores a matrix.

A weight of such a block is an integer times a scale plus a bias, as in MLX's affine form: only the order of the bits
differs, and scales that are products in the file are multiplied out in float32, which is exact. Q6_K alone, with
groups of 16, has no counterpart in MLX.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, and dequantize_row_* in ggml-quants.c there.
"""

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_server.checkpoint.gguf import BLOCK_SIZES, GGUFTensor

GROUP_SIZE = 32  # of every quantized type here

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# blocks [B, bytes of a block] -> q [B, groups, 32], scales and biases [B, groups]: a weight is q * scale + bias
Unpack = Callable[[Bytes], tuple[Bytes, Floats, Floats]]

_CHUNK_VALUES = 1 << 17  # unpacked at a time: they stay in the processor's cache


class BlockType(NamedTuple):
    """How MLX holds a type of quantized blocks."""

    bits: int
    unpack: Unpack
    is_exact: bool = True


def read_matrix(file: BinaryIO, tensor: GGUFTensor) -> tuple[mx.array, mx.array, mx.array]:
    """A quantized tensor [..., K] as weight uint32 [..., K * bits / 32], scales and biases float32 [..., K / 32].

    EOFError if the file ends before the tensor, ValueError if its data is no numbers.
    """
    kind, (block_values, block_bytes) = QUANTIZED_TYPES[tensor.type], BLOCK_SIZES[tensor.type]
    num_blocks = tensor.size_bytes // block_bytes
    groups = block_values // GROUP_SIZE  # in a block
    weight = np.empty((num_blocks, block_values * kind.bits // 8), np.uint8)
    scales = np.empty((num_blocks, groups), np.float32)
    biases = np.empty((num_blocks, groups), np.float32)
    file.seek(tensor.offset)
    for begin, end in _chunks(num_blocks, _CHUNK_VALUES // block_values):
        blocks = np.fromfile(file, np.uint8, (end - begin) * block_bytes)
        if len(blocks) < (end - begin) * block_bytes:
            raise EOFError
        q, scales[begin:end], biases[begin:end] = kind.unpack(blocks.reshape(-1, block_bytes))
        weight[begin:end] = _pack(q, kind.bits).reshape(end - begin, -1)
    rows = tensor.shape[:-1]
    return (
        mx.array(weight.view(np.uint32).reshape(*rows, -1)),
        mx.array(scales.reshape(*rows, -1)),
        mx.array(biases.reshape(*rows, -1)),
    )


def read_floats(file: BinaryIO, tensor: GGUFTensor) -> mx.array:
    """A tensor of type F32, F16 or BF16. EOFError if the file ends before it."""
    dtype = FLOAT_TYPES[tensor.type]
    file.seek(tensor.offset)
    values: NDArray[Any] = np.fromfile(file, dtype, tensor.size_bytes // dtype.itemsize)
    if values.nbytes < tensor.size_bytes:
        raise EOFError
    array = mx.array(values.reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.type == "BF16" else array


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, count, size):
        yield begin, min(begin + size, count)


def _pack(q: Bytes, bits: int) -> Bytes:
    """q [..., 32] of so many bits -> [..., 4 * bits]: a stream of bits, the lowest first."""
    if bits == 8:
        return q
    words, slot = q.view("<u8"), 8  # bits that a value has room in: the upper one of each pair closes ranks
    while bits % 8:
        lower = sum((1 << bits) - 1 << at for at in range(0, 64, 2 * slot))
        words = words & np.uint64(lower) | words >> np.uint64(slot - bits) & np.uint64(lower << bits)
        bits, slot = 2 * bits, 2 * slot
    packed: Bytes = words.view(np.uint8).reshape(*q.shape[:-1], -1, slot // 8)[..., : bits // 8]
    return packed.reshape(*q.shape[:-1], -1)


def _halves(blocks: Bytes) -> Bytes:
    """[..., n] -> [..., 2n]: the low four bits of all bytes, then the high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=-1)


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of each block. [B, 1]"""
    values = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("a scale is infinite or not a number")
    return values


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """Bit i of the 32 from byte `at` on, as 16 or 0. [B, 32]"""
    fifth: Bytes = np.unpackbits(blocks[:, at : at + 4], axis=-1, bitorder="little") << np.uint8(4)
    return fifth


def _q4_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    scale = _float16(blocks, 0)
    return _halves(blocks[:, 2:])[:, None], scale, -8 * scale


def _q4_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return _halves(blocks[:, 4:])[:, None], _float16(blocks, 0), _float16(blocks, 2)


def _q5_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    scale = _float16(blocks, 0)
    return (_halves(blocks[:, 6:]) | _fifth_bits(blocks, 2))[:, None], scale, -16 * scale


def _q5_1(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    return (_halves(blocks[:, 8:]) | _fifth_bits(blocks, 4))[:, None], _float16(blocks, 0), _float16(blocks, 2)


def _q8_0(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    scale = _float16(blocks, 0)
    return (blocks[:, 2:] ^ np.uint8(128))[:, None], scale, -128 * scale  # the sign bit flipped: the integer plus 128


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """The scales and biases [B, 8] of Q4_K and Q5_K: products of a block's float16 and a group's six bits."""
    low, high, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, mixed & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([high & 63, mixed >> 4 | high >> 6 << 4], axis=-1)
    return _float16(blocks, 0) * scales, -(_float16(blocks, 2) * minima)


def _q4_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    q = _halves(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return q, *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    q = _halves(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth: Bytes = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(
        1
    )  # bit g of byte i: group g, weight i
    q |= fifth << np.uint8(4)
    return q, *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> tuple[Bytes, Floats, Floats]:
    """The 32 weights of two groups of 16, rounded to 256 even steps from the least to the greatest."""
    low = _halves(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    q = (low | high.reshape(-1, 8, 32) << 4).astype(np.float32) - 32
    scales = _float16(blocks, 208) * blocks[:, 192:208].view(np.int8)  # [B, 16]
    weights = (q.reshape(-1, 16, 16) * scales[..., None]).reshape(-1, 8, 32)
    minimum = weights.min(-1)
    step = (weights.max(-1) - minimum) / np.float32(255)
    digits = (weights - minimum[..., None]) / np.where(step > 0, step, 1)[..., None]
    return np.rint(digits).astype(np.uint8), step, minimum


QUANTIZED_TYPES = {
    "Q4_0": BlockType(4, _q4_0),
    "Q4_1": BlockType(4, _q4_1),
    "Q5_0": BlockType(5, _q5_0),
    "Q5_1": BlockType(5, _q5_1),
    "Q8_0": BlockType(8, _q8_0),
    "Q4_K": BlockType(4, _q4_k),
    "Q5_K": BlockType(5, _q5_k),
    "Q6_K": BlockType(8, _q6_k, is_exact=False),
}
FLOAT_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
