"""Llama in NumPy and float64, one token and one head at a time: what the real model must compute."""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def llama_logits(config: dict[str, Any], weights: dict[str, Array], token_ids: list[int]) -> Array:
    """Logits [T, V] of a prompt; `config` and the weights' names as transformers 4 saves them, nothing quantized."""
    weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
    x = weights["model.embed_tokens.weight"][token_ids]  # [T, hidden]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = x + attention(config, weights, prefix, rms_norm(config, x, weights[f"{prefix}.input_layernorm.weight"]))
        x = x + mlp(weights, prefix, rms_norm(config, x, weights[f"{prefix}.post_attention_layernorm.weight"]))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms_norm(config, x, weights["model.norm.weight"]) @ head.T


def attention(config: dict[str, Any], weights: dict[str, Array], prefix: str, x: Array) -> Array:
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads", num_heads)
    head_dim = config.get("head_dim", config["hidden_size"] // num_heads)
    num_tokens = len(x)
    q, k, v = (
        linear(weights, f"{prefix}.self_attn.{name}_proj", x).reshape(num_tokens, -1, head_dim) for name in "qkv"
    )
    inverse_freqs = rope_inverse_freqs(config, head_dim)
    y = np.zeros((num_tokens, num_heads, head_dim))
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        keys = np.stack([rotate(k[t, kv_head], t * inverse_freqs) for t in range(num_tokens)])  # [T, D]
        for t in range(num_tokens):
            scores = keys[: t + 1] @ rotate(q[t, head], t * inverse_freqs) / math.sqrt(head_dim)
            probabilities = np.exp(scores - scores.max())
            y[t, head] = probabilities / probabilities.sum() @ v[: t + 1, kv_head]
    return linear(weights, f"{prefix}.self_attn.o_proj", y.reshape(num_tokens, -1))


def mlp(weights: dict[str, Array], prefix: str, x: Array) -> Array:
    gate = linear(weights, f"{prefix}.mlp.gate_proj", x)
    return linear(
        weights, f"{prefix}.mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(weights, f"{prefix}.mlp.up_proj", x)
    )


def linear(weights: dict[str, Array], name: str, x: Array) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def rms_norm(config: dict[str, Any], x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight


def rotate(head: Array, angles: Array) -> Array:
    """One head [D], its features taken as complex numbers with the imaginary parts in the second half."""
    turned = (head[: len(angles)] + 1j * head[len(angles) :]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def rope_inverse_freqs(config: dict[str, Any], head_dim: int) -> Array:
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    inverse_freqs = np.array([config["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)])
    match scaling["rope_type"]:
        case "default":
            return inverse_freqs
        case "linear":
            return inverse_freqs / scaling["factor"]
        case "llama3":
            return np.array([llama3_inverse_freq(scaling, inverse_freq) for inverse_freq in inverse_freqs])
    raise NotImplementedError(scaling["rope_type"])


def llama3_inverse_freq(scaling: dict[str, Any], inverse_freq: float) -> float:
    wavelength = 2 * math.pi / inverse_freq
    context = scaling["original_max_position_embeddings"]
    if wavelength < context / scaling["high_freq_factor"]:
        return inverse_freq
    if wavelength > context / scaling["low_freq_factor"]:
        return inverse_freq / scaling["factor"]
    smooth = (context / wavelength - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
    return (1 - smooth) * inverse_freq / scaling["factor"] + smooth * inverse_freq
