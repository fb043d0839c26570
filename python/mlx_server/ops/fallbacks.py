"""The ops' specifications in MLX's own ops, on any device: what their kernels are compared with. Slow."""

from mlx_server._ext import (
    Scoring,
    gated_delta_fallback,
    gelu_mul_fallback,
    moe_mlp_fallback,
    paged_attention_fallback,
    qkv_rope_fallback,
    route_fallback,
    silu_mul_fallback,
    write_kv_fallback,
)

__all__ = [
    "Scoring",
    "gated_delta_fallback",
    "gelu_mul_fallback",
    "moe_mlp_fallback",
    "paged_attention_fallback",
    "qkv_rope_fallback",
    "route_fallback",
    "silu_mul_fallback",
    "write_kv_fallback",
]
