"""The sampler's share of a step: 32 requests decode with a random 4-bit model of Qwen3-0.6B's shape, whose vocabulary
has 151,936 tokens, with each setting and with the first token of the vocabulary in place of a choice."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_server import wire
from mlx_server.engine import runner
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.models.loader import load_model
from mlx_server.ops.sampling import Sampled
from mlx_server.sampling_params import SamplingParams

NUM_STREAMS, ANSWER_TOKENS, GROUP_SIZE = 32, 12, 64
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "quantization": {"group_size": GROUP_SIZE, "bits": 4},
}
SETTINGS = {
    "none": None,
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.7),
    "top_p": SamplingParams(temperature=0.7, top_p=0.95),
    "min_p": SamplingParams(temperature=0.7, min_p=0.05),
    "typical_p": SamplingParams(temperature=0.7, typical_p=0.98),
    "top_k top_p": SamplingParams(temperature=0.7, top_k=20, top_p=0.95),
}


def random_linear(name: str, rows: int, columns: int) -> dict[str, mx.array]:
    """Quantized weights [rows, columns] with a mean of nearly 0."""
    scales = mx.full((rows, columns // GROUP_SIZE), 0.2 / columns**0.5)
    words = np.random.default_rng(rows).integers(0, 2**32, (rows, columns // 8), dtype=np.uint32)
    return {f"{name}.weight": mx.array(words), f"{name}.scales": scales, f"{name}.biases": -7.5 * scales}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("model")
    hidden, mlp, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q_size, kv_size = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    weights = random_linear("model.embed_tokens", CONFIG["vocab_size"], hidden)
    norms = {"model.norm": hidden}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in {"q": q_size, "k": kv_size, "v": kv_size}.items():
            weights |= random_linear(f"{at}.self_attn.{name}_proj", rows, hidden)
        weights |= random_linear(f"{at}.self_attn.o_proj", hidden, q_size)
        for name in ("gate", "up"):
            weights |= random_linear(f"{at}.mlp.{name}_proj", mlp, hidden)
        weights |= random_linear(f"{at}.mlp.down_proj", hidden, mlp)
        norms |= {f"{at}.input_layernorm": hidden, f"{at}.post_attention_layernorm": hidden}
        norms |= {f"{at}.self_attn.q_norm": head, f"{at}.self_attn.k_norm": head}
    weights |= {f"{name}.weight": mx.ones(size) for name, size in norms.items()}
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return load_model(str(path))


def first_token(logits: mx.array, *_: object) -> Sampled:
    """Reads one logit of each row, so that the model computes them."""
    ids = (logits[:, 0] * 0).astype(mx.uint32)
    return Sampled(ids, mx.zeros(ids.shape), mx.zeros((len(ids), 20), mx.uint32), mx.zeros((len(ids), 20)))


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def bench_step(benchmark, monkeypatch, model, params):
    if params is None:
        monkeypatch.setattr(runner, "sample", first_token)
    core = make_engine_core(model, plan_memory(model))
    prompts = np.random.default_rng(0).integers(1000, 40_000, (NUM_STREAMS, 4)).tolist()

    def start() -> None:
        while core.has_work:
            core.step()
        for i, prompt in enumerate(prompts):
            sampling = params or SamplingParams(temperature=0.0)
            assert core.submit(b"", wire.Submit(str(i), prompt, ANSWER_TOKENS, [], sampling)) is None
        core.step()
        core.step()

    start()
    benchmark.pedantic(core.step, rounds=8, warmup_rounds=1)
