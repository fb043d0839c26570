"""Linear layers: ours beside MLX's, with float32 activations and scales."""

from collections.abc import Callable
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.linear import linear, quantized_linear

CACHE_BYTES = 64_000_000  # more than a processor's cache: as in a model, each weight comes from memory
PLAIN = "plain"
# K, N, bits and the mode, affine in groups of 32 if none is said
WEIGHTS = {
    "SmolLM2 q, o": (576, 576, 4),
    "SmolLM2 k, v": (576, 192, 4),
    "SmolLM2 gate, up": (576, 1536, 4),
    "SmolLM2 down": (1536, 576, 4),
    "SmolLM2 head": (576, 49152, 8),
    "2048": (2048, 2048, 4),
    "2048, 2 bits": (2048, 2048, 2),
    "2048, 3 bits": (2048, 2048, 3),
    "2048, 5 bits": (2048, 2048, 5),
    "2048, 6 bits": (2048, 2048, 6),
    "4096": (4096, 4096, 4),
    "4096, 8 bits": (4096, 4096, 8),
    "2048, mxfp4": (2048, 2048, 4, "mxfp4"),
    "2048, mxfp8": (2048, 2048, 8, "mxfp8"),
    "2048, nvfp4": (2048, 2048, 4, "nvfp4"),
    "SmolLM2 q, o, plain": (576, 576, 32, PLAIN),
    "SmolLM2 gate, up, plain": (576, 1536, 32, PLAIN),
    "2048, plain": (2048, 2048, 32, PLAIN),
}
GROUP_SIZES = {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}

Arrays = tuple[mx.array, ...]


def make_weights(k: int, n: int, bits: int, mode: str) -> list[Arrays]:
    dense = mx.random.normal((n, k))
    weight = (dense,) if mode == PLAIN else mx.quantize(dense, GROUP_SIZES[mode], bits, mode)
    copies = CACHE_BYTES // sum(a.nbytes for a in weight) + 1
    weights = [tuple(mx.array(np.array(a)) for a in weight) for _ in range(copies)]
    mx.eval(weights)
    return weights  # type: ignore[return-value]


def ours(x: mx.array, weight: Arrays, bits: int, mode: str) -> mx.array:
    if mode == PLAIN:
        return linear(x, *weight)
    packed, scales, biases = weight if mode == "affine" else (*weight, None)
    return quantized_linear(x, packed, scales, biases, group_size=GROUP_SIZES[mode], bits=bits, mode=mode)


def mlx(x: mx.array, weight: Arrays, bits: int, mode: str) -> mx.array:
    if mode == PLAIN:
        return x @ weight[0].T
    packed, scales, biases = weight if mode == "affine" else (*weight, None)
    return mx.quantized_matmul(x, packed, scales, biases, True, GROUP_SIZES[mode], bits, mode)


@pytest.mark.parametrize("op", [ours, mlx], ids=["mlx-server", "mlx"])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 8, 128])
def bench_linear(benchmark, op: Callable[[mx.array, Arrays, int, str], mx.array], name: str, rows: int):
    """As in a model, each evaluation holds several products: 16 of one row, 2 of 8, 1 of 128."""
    k, n, bits, *modes = WEIGHTS[name]
    mode = modes[0] if modes else "affine"
    weights = cycle(make_weights(k, n, bits, mode))
    products = max(1, 16 // rows)
    x = mx.random.normal((rows, k))
    mx.eval(x)
    benchmark.group = f"linear {name} [{n}, {k}]: {rows} rows"
    mx.reset_peak_memory()
    benchmark.pedantic(
        lambda: mx.eval([op(x, next(weights), bits, mode) for _ in range(products)]),
        rounds=3 if op is mlx else 30,
        warmup_rounds=1,
    )
    seconds = benchmark.stats.stats.min / products
    benchmark.extra_info["us_per_product"] = round(seconds * 1e6, 1)
    benchmark.extra_info["gflops"] = round(2e-9 * rows * k * n / seconds, 1)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() // 1_000_000
