"""GGML's quantized blocks, weight by weight from their definition (ggml-common.h, dequantize_row_* in ggml-quants.c).

Many blocks are taken at once: `b[i]` is byte i of each of them, an int32 array.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int32]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


def half(b: Ints, at: int) -> Floats:
    """The float16 at byte `at`."""
    return (b[at] | b[at + 1] << 8).astype(np.uint16).view(np.float16).astype(np.float32)


def signed(byte: Ints) -> Ints:
    return byte - 256 * (byte > 127)


def nibble(bytes_: Ints, i: int) -> Ints:
    """Four bits: those of the first half of the weights are the low ones of the bytes, then come the high ones."""
    n = len(bytes_)
    return bytes_[i] & 15 if i < n else bytes_[i - n] >> 4


def bit(bytes_: Ints, i: int) -> Ints:
    return bytes_[i // 8] >> i % 8 & 1


def scale_and_min(packed: Ints, group: int) -> tuple[Ints, Ints]:
    """Six bits each, of eight groups, in 12 bytes (get_scale_min_k4)."""
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
    return scale, packed[group + 4] >> 4 | (packed[group] >> 6) << 4


def float32(integer: Ints) -> Floats:
    return integer.astype(np.float32)


def q4_0(b: Ints, i: int) -> Floats:
    return float32(nibble(b[2:], i) - 8) * half(b, 0)


def q4_1(b: Ints, i: int) -> Floats:
    return float32(nibble(b[4:], i)) * half(b, 0) + half(b, 2)


def q5_0(b: Ints, i: int) -> Floats:
    return float32((nibble(b[6:], i) | bit(b[2:6], i) << 4) - 16) * half(b, 0)


def q5_1(b: Ints, i: int) -> Floats:
    return float32(nibble(b[8:], i) | bit(b[4:8], i) << 4) * half(b, 0) + half(b, 2)


def q8_0(b: Ints, i: int) -> Floats:
    return float32(signed(b[2 + i])) * half(b, 0)


def q4_k(b: Ints, i: int) -> Floats:
    scale, minimum = scale_and_min(b[4:16], i // 32)
    low = 16 + i // 64 * 32
    q = nibble(b[low : low + 32], i % 64)
    return half(b, 0) * float32(scale) * float32(q) - half(b, 2) * float32(minimum)


def q5_k(b: Ints, i: int) -> Floats:
    scale, minimum = scale_and_min(b[4:16], i // 32)
    low = 48 + i // 64 * 32
    q = nibble(b[low : low + 32], i % 64) | (b[16 + i % 32] >> i // 32 & 1) << 4
    return half(b, 0) * float32(scale) * float32(q) - half(b, 2) * float32(minimum)


def q6_k(b: Ints, i: int) -> Floats:
    part, j = divmod(i, 128)
    low = nibble(b[64 * part : 64 * part + 64], j)
    high = b[128 + 32 * part + j % 32] >> j // 32 * 2 & 3
    return half(b, 208) * float32(signed(b[192 + i // 16])) * float32((low | high << 4) - 32)


# type -> number in files, weights and bytes of a block, where its float16 numbers are, one weight of a block
TYPES: dict[str, tuple[int, int, int, tuple[int, ...], Callable[[Ints, int], Floats]]] = {
    "Q4_0": (2, 32, 18, (0,), q4_0),
    "Q4_1": (3, 32, 20, (0, 2), q4_1),
    "Q5_0": (6, 32, 22, (0,), q5_0),
    "Q5_1": (7, 32, 24, (0, 2), q5_1),
    "Q8_0": (8, 32, 34, (0,), q8_0),
    "Q4_K": (12, 256, 144, (0, 2), q4_k),
    "Q5_K": (13, 256, 176, (0, 2), q5_k),
    "Q6_K": (14, 256, 210, (208,), q6_k),
}


def dequantize(kind: str, blocks: np.ndarray[Any, Any]) -> Floats:
    """blocks [B, bytes of a block] uint8 -> [B, weights of a block] float32, each operation rounded to float32."""
    _, num_weights, num_bytes, _, weight = TYPES[kind]
    assert blocks.shape[1] == num_bytes
    columns = blocks.T.astype(np.int32)
    return np.stack([weight(columns, i) for i in range(num_weights)], axis=1)


def random_blocks(kind: str, count: int, seed: int = 0, magnitude: float = 1.0) -> np.ndarray[Any, Any]:
    """[count, bytes of a block]: any bits, with float16 numbers below `magnitude`."""
    _, _, num_bytes, halves, _ = TYPES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, num_bytes), np.uint8)
    for at in halves:
        values = rng.uniform(-magnitude, magnitude, (count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = values.view(np.uint8)
    return blocks
