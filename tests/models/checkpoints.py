"""Small llama checkpoints with random weights, and saved ones in half precision."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_server.models.base import Model
from mlx_server.models.loader import load_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, mx.array]:
    """float32 weights under the names of transformers."""
    key = mx.random.key(seed)
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // num_heads)
    q_size, kv_size = num_heads * head_dim, config.get("num_key_value_heads", num_heads) * head_dim
    linears: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    weights = {}
    for name, shape in shapes.items():
        key, subkey = mx.random.split(key)
        noise = mx.random.normal(shape, key=subkey)
        weights[name] = 1 + 0.2 * noise if "norm" in name else noise * (2 / shape[-1]) ** 0.5
    return weights


def quantized(weights: dict[str, mx.array], layer: str, **how: Any) -> dict[str, mx.array]:
    """The weights with one layer's matrix quantized, as `mx.quantize` does."""
    weight, scales, *biases = mx.quantize(weights[f"{layer}.weight"], **how)
    parts = {f"{layer}.weight": weight, f"{layer}.scales": scales}
    return weights | parts | ({f"{layer}.biases": biases[0]} if biases else {})


def dequantized(weights: dict[str, mx.array], layer: str, **how: Any) -> mx.array:
    """The float32 matrix that such a layer holds."""
    biases = weights.get(f"{layer}.biases")
    return mx.dequantize(weights[f"{layer}.weight"], weights[f"{layer}.scales"], biases, **how).astype(mx.float32)


def stacked_experts(weights: dict[str, mx.array], num_experts: int) -> dict[str, mx.array]:
    """The weights with experts as MLX checkpoints hold them: in one tensor."""
    plain = {name: weight for name, weight in weights.items() if ".experts." not in name}
    firsts = [name for name in weights if ".experts.0." in name]
    return plain | {
        name.replace("experts.0", "switch_mlp"): mx.stack(
            [weights[name.replace("experts.0", f"experts.{expert}")] for expert in range(num_experts)]
        )
        for name in firsts
    }


def save(directory: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> str:
    """Write config.json and model.safetensors; the directory, as `load_model` takes it."""
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    return str(directory)


def load_half(saved: Path, dtype: mx.Dtype, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model that is saved in float32, in half precision as a GPU loads it; `directory` holds the checkpoint."""
    config, weights = json.loads((saved / "config.json").read_text()), mx.load(str(saved / "model.safetensors"))
    half = {name: x.astype(dtype) if x.dtype == mx.float32 else x for name, x in weights.items()}
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        return load_model(save(directory, config, half))
