"""Mistral (https://arxiv.org/abs/2310.06825): Llama with a sliding window in every layer, or in none."""

from typing import Literal

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.config import Count, DecoderArgs, convert
from mlx_server.models.layers import Attention, CausalLM, PreNormLayer, RMSNorm, Rope, SwiGLU
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights


class MistralArgs(DecoderArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' MistralConfig."""

    max_position_embeddings: Count = 131072
    hidden_act: Literal["silu"] = "silu"
    sliding_window: Count | None = 4096

    @property
    def windows(self) -> list[int | None]:
        return [self.sliding_window] * self.num_hidden_layers


def decoder_layer(args: MistralArgs, layer: int, rope: Rope, weights: Weights) -> PreNormLayer:
    attention = Attention(weights.at("self_attn"), args, layer, rope)
    mlp = SwiGLU(weights.at("mlp"), args.hidden_size, args.intermediate_size)
    return PreNormLayer(weights, args, attention, mlp)


class Mistral(CausalLM):
    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, MistralArgs, weights.source)
        rope = Rope(read_rope_parameters(config, weights.source), args.head_size)
        model = weights.at("model")
        layers = [
            decoder_layer(args, layer, rope, model.at(f"layers.{layer}")) for layer in range(args.num_hidden_layers)
        ]
        norm = RMSNorm(model.at("norm"), args.hidden_size, args.rms_norm_eps)
        super().__init__(weights, args, layers, norm, rope)
