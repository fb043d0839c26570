"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671, 2412.15115): Llama with biases of queries, keys and values."""

from typing import Literal

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.config import Count, WindowedDecoderArgs, convert
from mlx_server.models.layers import Attention, CausalLM, PreNormLayer, RMSNorm, Rope, SwiGLU
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights


class Qwen2Args(WindowedDecoderArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' Qwen2Config."""

    max_position_embeddings: Count = 32768
    hidden_act: Literal["silu"] = "silu"
    use_sliding_window: bool = False
    max_window_layers: int = 28  # from which on layers have a window

    def is_sliding(self, layer: int) -> bool:
        return self.use_sliding_window and layer >= self.max_window_layers


def decoder_layer(args: Qwen2Args, layer: int, rope: Rope, weights: Weights) -> PreNormLayer:
    attention = Attention(weights.at("self_attn"), args, layer, rope, qkv_bias=True)
    mlp = SwiGLU(weights.at("mlp"), args.hidden_size, args.intermediate_size)
    return PreNormLayer(weights, args, attention, mlp)


class Qwen2(CausalLM):
    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, Qwen2Args, weights.source)
        rope = Rope(read_rope_parameters(config, weights.source), args.head_size)
        model = weights.at("model")
        layers = [
            decoder_layer(args, layer, rope, model.at(f"layers.{layer}")) for layer in range(args.num_hidden_layers)
        ]
        norm = RMSNorm(model.at("norm"), args.hidden_size, args.rms_norm_eps)
        super().__init__(weights, args, layers, norm, rope)
