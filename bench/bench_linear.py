"""Linear layers on quantized weights: ours beside MLX's, with float32 activations and scales and groups of 32."""

from collections.abc import Callable
from itertools import cycle

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.linear import quantized_linear

GROUP_SIZE = 32
CACHE_BYTES = 64_000_000  # more than a processor's cache: as in a model, each weight comes from memory
# K, N, bits
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
}

Arrays = tuple[mx.array, mx.array, mx.array]


def make_weights(k: int, n: int, bits: int) -> list[Arrays]:
    weight = mx.quantize(mx.random.normal((n, k)), GROUP_SIZE, bits)
    copies = CACHE_BYTES // sum(a.nbytes for a in weight) + 1
    weights = [tuple(mx.array(np.array(a)) for a in weight) for _ in range(copies)]
    mx.eval(weights)
    return weights  # type: ignore[return-value]


def ours(x: mx.array, weight: Arrays, bits: int) -> mx.array:
    return quantized_linear(x, *weight, group_size=GROUP_SIZE, bits=bits)


def mlx(x: mx.array, weight: Arrays, bits: int) -> mx.array:
    return mx.quantized_matmul(x, *weight, transpose=True, group_size=GROUP_SIZE, bits=bits)


@pytest.mark.parametrize("op", [ours, mlx], ids=["mlx-server", "mlx"])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 8, 128])
def bench_linear(benchmark, op: Callable[[mx.array, Arrays, int], mx.array], name: str, rows: int):
    """As in a model, each evaluation holds several products: 16 of one row, 2 of 8, 1 of 128."""
    k, n, bits = WEIGHTS[name]
    weights = cycle(make_weights(k, n, bits))
    products = max(1, 16 // rows)
    x = mx.random.normal((rows, k))
    mx.eval(x)
    benchmark.group = f"linear {name} [{n}, {k}]: {rows} rows"
    mx.reset_peak_memory()
    benchmark.pedantic(
        lambda: mx.eval([op(x, next(weights), bits) for _ in range(products)]),
        rounds=3 if op is mlx else 30,
        warmup_rounds=1,
    )
    seconds = benchmark.stats.stats.min / products
    benchmark.extra_info["us_per_product"] = round(seconds * 1e6, 1)
    benchmark.extra_info["gflops"] = round(2e-9 * rows * k * n / seconds, 1)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() // 1_000_000
