"""A mixture-of-experts block, router and experts: ours, the same in MLX's own ops, and mlx-lm's.

In float32 on the CPU, in bfloat16 on a GPU.
"""

from collections.abc import Callable
from itertools import cycle

import mlx.core as mx
import pytest

from mlx_server import _ext
from mlx_server.ops.linear import quantized_linear
from mlx_server.ops.moe import ExpertMatrix, moe_mlp, route

# A block takes x [T, D] and returns [T, D], not yet evaluated.
Block = Callable[[mx.array], mx.array]
Arrays = tuple[mx.array, mx.array, mx.array]

GROUP_SIZE, BITS = 64, 4
SIZES = {"64 experts, 8 of them": (64, 8, 1024, 512), "Qwen3-30B-A3B": (128, 8, 2048, 768)}  # E, k, D, N
TOKENS = {"decode of 1": 1, "decode of 8": 8, "decode of 16": 16, "prefill of 256": 256}
DTYPE = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def random_weights(num_experts: int, n: int, d: int) -> dict[str, Arrays]:
    """The matrices as mx.quantize stores them, by their names in mlx-lm."""
    shapes = {
        "router": (num_experts, d),
        "gate_proj": (num_experts, n, d),
        "up_proj": (num_experts, n, d),
        "down_proj": (num_experts, d, n),
    }
    weights = {}
    for name, shape in shapes.items():
        dense = (mx.random.normal(shape) * shape[-1] ** -0.5).astype(DTYPE)
        weights[name] = mx.quantize(dense, GROUP_SIZE, BITS)
        mx.eval(weights[name])
    return weights


def ours(weights: dict[str, Arrays], top_k: int, mlp: Callable[..., mx.array] = moe_mlp) -> Block:
    matrices = {
        name: ExpertMatrix(*weights[f"{name}_proj"], group_size=GROUP_SIZE, bits=BITS)
        for name in ("gate", "up", "down")
    }

    def block(x: mx.array) -> mx.array:
        logits = quantized_linear(x, *weights["router"], group_size=GROUP_SIZE, bits=BITS)
        return mlp(x, *route(logits, top_k=top_k, scoring="softmax", normalize=True), **matrices)

    return block


def fallback(weights: dict[str, Arrays], top_k: int) -> Block:
    """Experts by `mx.gather_qmm`."""
    return ours(weights, top_k, _ext.moe_mlp_fallback)


def mlx_lm(weights: dict[str, Arrays], top_k: int) -> Block:
    """As in its Qwen3MoeSparseMoeBlock."""
    switch_layers = pytest.importorskip("mlx_lm.models.switch_layers")
    experts = switch_layers.SwitchGLU(1, 1, 1)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = switch_layers.QuantizedSwitchLinear(GROUP_SIZE, 1, 1, False, GROUP_SIZE, BITS)
        layer.weight, layer.scales, layer.biases = weights[name]
        setattr(experts, name, layer)

    def block(x: mx.array) -> mx.array:
        logits = mx.quantized_matmul(x, *weights["router"], group_size=GROUP_SIZE, bits=BITS)
        gates = mx.softmax(logits, axis=-1, precise=True)
        ids = mx.argpartition(gates, kth=-top_k, axis=-1)[..., -top_k:]
        scores = mx.take_along_axis(gates, ids, axis=-1)
        scores /= mx.sum(scores, axis=-1, keepdims=True)
        return (experts(x, ids) * scores[..., None]).sum(axis=-2)

    return block


@pytest.mark.parametrize("make", [ours, fallback, mlx_lm], ids=["mlx-server", "mlx", "mlx-lm"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def bench_moe(benchmark, make, tokens, size):
    num_experts, top_k, d, n = SIZES[size]
    mx.random.seed(0)
    weights = random_weights(num_experts, n, d)
    inputs = [
        mx.random.normal((TOKENS[tokens], d)).astype(DTYPE) for _ in range(20)
    ]  # other experts each time: not from the cache
    x = cycle(inputs)
    block = make(weights, top_k)
    mx.eval(inputs, block(next(x)))
    mx.reset_peak_memory()
    benchmark.group = f"MoE block, {size}: {tokens}"
    benchmark.pedantic(lambda: mx.eval(block(next(x))), rounds=3 if TOKENS[tokens] > 8 else 20, warmup_rounds=1)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() / 1e6
