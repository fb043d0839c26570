"""Qwen3 with a mixture of experts (https://arxiv.org/abs/2505.09388): Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder …"""

from typing import Literal

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.config import Count, convert
from mlx_server.models.layers import Attention, CausalLM, PreNormLayer, RMSNorm, Rope, SwiGLU
from mlx_server.models.moe import MoEArgs, SparseMoE
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights


class Qwen3MoeArgs(MoEArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' Qwen3MoeConfig."""

    max_position_embeddings: Count = 32768
    norm_topk_prob: bool = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096

    @property
    def windows(self) -> list[int | None]:
        return [self.sliding_window if self.use_sliding_window else None] * self.num_hidden_layers


def decoder_layer(args: Qwen3MoeArgs, layer: int, rope: Rope, weights: Weights) -> PreNormLayer:
    attn, mlp, eps, bias = weights.at("self_attn"), weights.at("mlp"), args.rms_norm_eps, args.attention_bias
    attention = Attention(
        attn,
        args,
        layer,
        rope,
        qkv_bias=bias,
        output_bias=bias,
        q_norm=RMSNorm(attn.at("q_norm"), args.head_size, eps),
        k_norm=RMSNorm(attn.at("k_norm"), args.head_size, eps),
    )
    sparse = args.is_sparse(layer)
    feed_forward = SparseMoE(mlp, args) if sparse else SwiGLU(mlp, args.hidden_size, args.intermediate_size)
    return PreNormLayer(weights, args, attention, feed_forward)


class Qwen3Moe(CausalLM):
    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, Qwen3MoeArgs, weights.source)
        rope = Rope(read_rope_parameters(config, weights.source), args.head_size)
        model = weights.at("model")
        layers = [
            decoder_layer(args, layer, rope, model.at(f"layers.{layer}")) for layer in range(args.num_hidden_layers)
        ]
        norm = RMSNorm(model.at("norm"), args.hidden_size, args.rms_norm_eps)
        super().__init__(weights, args, layers, norm, rope)
        self.sparse_blocks = [layer.mlp for layer in layers if isinstance(layer.mlp, SparseMoE)]
