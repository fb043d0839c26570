"""Llama 2, 3 and 3.1 (https://arxiv.org/abs/2307.09288, 2407.21783) and models built alike: CodeLlama, SmolLM2 …"""

from typing import Literal

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.config import Count, DecoderArgs, convert
from mlx_server.models.layers import Attention, CausalLM, PreNormLayer, RMSNorm, Rope, SwiGLU
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights


class LlamaArgs(DecoderArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' LlamaConfig."""

    max_position_embeddings: Count = 2048
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False


def decoder_layer(args: LlamaArgs, layer: int, rope: Rope, weights: Weights) -> PreNormLayer:
    bias = args.attention_bias
    attention = Attention(weights.at("self_attn"), args, layer, rope, qkv_bias=bias, output_bias=bias)
    mlp = SwiGLU(weights.at("mlp"), args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
    return PreNormLayer(weights, args, attention, mlp)


class Llama(CausalLM):
    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, LlamaArgs, weights.source)
        rope = Rope(read_rope_parameters(config, weights.source), args.head_size)
        model = weights.at("model")
        layers = [
            decoder_layer(args, layer, rope, model.at(f"layers.{layer}")) for layer in range(args.num_hidden_layers)
        ]
        norm = RMSNorm(model.at("norm"), args.hidden_size, args.rms_norm_eps)
        super().__init__(weights, args, layers, norm, rope)
