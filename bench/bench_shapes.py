"""Models of real shapes with random 4-bit weights from prompt to answer: our engine, the same in its batch-invariant
mode, and mlx-lm, for GPUs."""

import importlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from bench.completers import Complete, mlx_lm, ours
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_server.models.loader import ARCHITECTURES
from mlx_server.models.quantize import read_plan
from mlx_server.models.weights import Weights
from mlx_server.ops.kernels import set_batch_invariant

pytestmark = pytest.mark.skipif(mx.default_device() == mx.Device(mx.cpu), reason="gigabytes of weights, for GPUs")

QUANTIZATION = {"group_size": 64, "bits": 4}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128_256,
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}
QWEN = {
    "hidden_size": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151_936,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = QWEN | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1e6,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "max_position_embeddings": 40_960,
}
QWEN3_NEXT_16_LAYERS = QWEN | {
    "model_type": "qwen3_next",
    "num_hidden_layers": 16,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "rope_theta": 1e7,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "max_position_embeddings": 262_144,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_value_heads": 32,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA_8B,
    "Qwen3-30B-A3B": QWEN3_30B_A3B,
    "Qwen3-Next, 16 layers": QWEN3_NEXT_16_LAYERS,
}
# Requests at once, prompt and answer tokens of each.
LOADS = [(1, 2048, 1), (1, 16, 128), (8, 16, 128), (32, 16, 128)]


def random_model(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's, in bfloat16 and QUANTIZATION, of random bits: quantizing random matrices would take minutes."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, **QUANTIZATION)  # not evaluated

    def random(path: str, x: mx.array) -> mx.array:
        if x.dtype == mx.uint32:
            return mx.random.randint(0, 256, (*x.shape[:-1], 4 * x.shape[-1]), mx.uint8).view(mx.uint32)
        if not path.endswith(("scales", "biases")):
            return x
        scale = (x.shape[-1] * QUANTIZATION["group_size"]) ** -0.5 / 4.6  # products of about the inputs' size
        return mx.full(x.shape, scale if path.endswith("scales") else -7.5 * scale, x.dtype)

    model.update(tree_map_with_path(random, model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module", params=SHAPES)
def peer(request) -> tuple[str, nn.Module]:
    pytest.importorskip("mlx_lm")
    mx.random.seed(0)
    return request.param, random_model(SHAPES[request.param])


@pytest.fixture(scope="module", params=["mlx-server", "batch-invariant", "mlx-lm"])
def complete(request, peer) -> Iterator[Complete]:
    shape, model = peer
    if request.param == "mlx-lm":
        yield mlx_lm(model)
        return
    config = SHAPES[shape] | {"quantization": QUANTIZATION}
    tensors: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    weights = Weights(shape, tensors, read_plan(config, shape), mx.bfloat16)
    set_batch_invariant(request.param == "batch-invariant")
    yield ours(ARCHITECTURES[config["model_type"]](config, weights))
    set_batch_invariant(False)


@pytest.mark.parametrize(("num_streams", "prompt_tokens", "answer_tokens"), LOADS)
def bench_shape(benchmark, complete, peer, num_streams, prompt_tokens, answer_tokens):
    shape = peer[0]
    benchmark.group = f"{shape}: {num_streams} at once, {prompt_tokens} prompt tokens, {answer_tokens} answer tokens"
    rng = np.random.default_rng(0)

    def setup():
        return (rng.integers(1000, 120_000, (num_streams, prompt_tokens)).tolist(), answer_tokens), {}

    benchmark.pedantic(complete, setup=setup, rounds=2, warmup_rounds=1)
    num_tokens = num_streams * (prompt_tokens + answer_tokens - 1)
    benchmark.extra_info["tokens_per_s"] = round(num_tokens / benchmark.stats.stats.min, 1)
