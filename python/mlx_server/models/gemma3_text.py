"""Gemma 3, text only (https://arxiv.org/abs/2503.19786): most layers see a window, each sixth all tokens.

Unlike Llama: RoPE with a base for each kind of layer, norms of each query and key, norms before and after each block,
GELU, embeddings scaled by sqrt(hidden_size), and checkpoints that hold the norms' weights less 1.
"""

import math
from typing import Annotated, Literal

import mlx.core as mx
import msgspec

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.errors import ModelLoadError
from mlx_server.models.base import StepContext
from mlx_server.models.config import Count, WindowedDecoderArgs, convert
from mlx_server.models.layers import Attention, CausalLM, JoinedLinear, Linear, RMSNorm, Rope
from mlx_server.models.rope import RopeParameters, read_rope_parameters
from mlx_server.models.weights import Weights
from mlx_server.ops.activation import gelu_mul


class Gemma3TextArgs(WindowedDecoderArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' Gemma3TextConfig."""

    max_position_embeddings: Count = 131072
    head_dim: Count = 256
    query_pre_attn_scalar: Annotated[float, msgspec.Meta(gt=0)] = 256
    sliding_window_pattern: Count = 6  # each so many-th layer sees all tokens
    attention_bias: bool = False
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    # Of earlier and later models of the family
    attn_logit_softcapping: None = None
    final_logit_softcapping: None = None
    use_bidirectional_attention: Literal[False] | None = None

    def is_sliding(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0


def read_ropes(config: JsonObject, source: str) -> tuple[RopeParameters, RopeParameters]:
    """RoPE of the layers that see all tokens, and of those with a window.

    transformers 5 writes both into `rope_parameters`; earlier versions wrote `rope_theta` and `rope_scaling` for the
    former alone, `rope_local_base_freq` for the latter.
    """
    both = config.get("rope_parameters") or {"full_attention": {}, "sliding_attention": {}}
    if not isinstance(both, dict) or not both.keys() & {"full_attention", "sliding_attention"}:
        raise ModelLoadError(f"{source}: rope_parameters must hold an object for each type of layer")
    full = {**config, "rope_parameters": both.get("full_attention")}
    sliding = {"rope_theta": config.get("rope_local_base_freq"), "rope_parameters": both.get("sliding_attention")}
    return read_rope_parameters(full, source, 1e6), read_rope_parameters(sliding, source, 1e4)


class GeGLU:
    """x [T, features] -> down_proj(gelu(gate_proj(x)) * up_proj(x)) [T, features] (https://arxiv.org/abs/2002.05202)"""

    def __init__(self, weights: Weights, features: int, hidden_features: int) -> None:
        gate_up = {"gate_proj": hidden_features, "up_proj": hidden_features}
        self.gate_up_proj = JoinedLinear(weights, features, gate_up)
        self.down_proj = Linear(weights.at("down_proj"), hidden_features, features)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gelu_mul(self.gate_up_proj(x)))


class DecoderLayer:
    def __init__(self, args: Gemma3TextArgs, layer: int, rope: Rope, weights: Weights) -> None:
        attn = weights.at("self_attn")
        self.self_attn = Attention(
            attn,
            args,
            layer,
            rope,
            qkv_bias=args.attention_bias,
            output_bias=args.attention_bias,
            q_norm=RMSNorm(attn.at("q_norm"), args.head_size, args.rms_norm_eps, zero_centred=True),
            k_norm=RMSNorm(attn.at("k_norm"), args.head_size, args.rms_norm_eps, zero_centred=True),
            scale=args.query_pre_attn_scalar**-0.5,
        )
        self.mlp = GeGLU(weights.at("mlp"), args.hidden_size, args.intermediate_size)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights.at(name), args.hidden_size, args.rms_norm_eps, zero_centred=True)

        self.input_layernorm, self.post_attention_layernorm = norm("input_layernorm"), norm("post_attention_layernorm")
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm")
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm")

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), ctx))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3Text(CausalLM):
    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, Gemma3TextArgs, weights.source)
        global_rope, local_rope = (Rope(rope, args.head_size) for rope in read_ropes(config, weights.source))
        model = weights.at("model")
        layers = [
            DecoderLayer(args, layer, global_rope if window is None else local_rope, model.at(f"layers.{layer}"))
            for layer, window in enumerate(args.windows)
        ]
        norm = RMSNorm(model.at("norm"), args.hidden_size, args.rms_norm_eps, zero_centred=True)
        super().__init__(weights, args, layers, norm, global_rope)
        self.embedding_scale = math.sqrt(args.hidden_size)

    def embed(self, token_ids: mx.array) -> mx.array:
        return self.embed_tokens(token_ids) * self.embedding_scale
