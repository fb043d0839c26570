"""Llama 2, 3 and 3.1 (https://arxiv.org/abs/2307.09288, 2407.21783) and models built alike: CodeLlama, SmolLM2 …"""

from typing import Annotated, Literal

import mlx.core as mx
import msgspec

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.base import KVSpec, StepContext
from mlx_server.models.config import convert
from mlx_server.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights
from mlx_server.ops.rope import rope

_Count = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]


class LlamaArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' LlamaConfig."""

    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    vocab_size: _Count
    max_position_embeddings: _Count = 2048
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-6
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool | None = None  # False: there must be an lm_head; else there may be one

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_attention_heads} heads can't share {self.num_kv_heads} key-value heads")
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} must be even")


class Attention:
    def __init__(self, args: LlamaArgs, layer: int, freqs: mx.array, weights: Weights) -> None:
        self.layer, self.freqs = layer, freqs
        self.head_dim = args.head_size
        q_features, kv_features = args.num_attention_heads * args.head_size, args.num_kv_heads * args.head_size
        bias = args.attention_bias
        self.q_proj = Linear(weights.at("q_proj"), args.hidden_size, q_features, bias=bias)
        self.k_proj = Linear(weights.at("k_proj"), args.hidden_size, kv_features, bias=bias)
        self.v_proj = Linear(weights.at("v_proj"), args.hidden_size, kv_features, bias=bias)
        self.o_proj = Linear(weights.at("o_proj"), q_features, args.hidden_size, bias=bias)

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        num_tokens = x.shape[0]
        q = self.q_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, H, D]
        k = self.k_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, Hk, D]
        v = self.v_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, Hk, D]
        q = rope(q, ctx.positions, self.freqs)
        k = rope(k, ctx.positions, self.freqs)
        y = ctx.attend(self.layer, q, k, v, scale=self.head_dim**-0.5)  # [T, H, D]
        return self.o_proj(y.flatten(-2))


class DecoderLayer:
    def __init__(self, args: LlamaArgs, layer: int, freqs: mx.array, weights: Weights) -> None:
        self.self_attn = Attention(args, layer, freqs, weights.at("self_attn"))
        self.mlp = SwiGLU(weights.at("mlp"), args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.input_layernorm = RMSNorm(weights.at("input_layernorm"), args.hidden_size, args.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(
            weights.at("post_attention_layernorm"), args.hidden_size, args.rms_norm_eps
        )

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama:
    """A `models.base.Model`."""

    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, LlamaArgs, weights.source)
        freqs = mx.array(read_rope_parameters(config, weights.source).freqs(args.head_size), mx.float32)
        weights.drop(suffix=".rotary_emb.inv_freq")

        model = weights.at("model")
        self.embed_tokens = Embedding(model.at("embed_tokens"), args.vocab_size, args.hidden_size)
        self.layers = [
            DecoderLayer(args, layer, freqs, model.at(f"layers.{layer}")) for layer in range(args.num_hidden_layers)
        ]
        self.norm = RMSNorm(model.at("norm"), args.hidden_size, args.rms_norm_eps)
        tied = not weights.has("lm_head.weight") and args.tie_word_embeddings is not False
        self.lm_head = None if tied else Linear(weights.at("lm_head"), args.hidden_size, args.vocab_size)

        self.kv_spec = KVSpec(args.num_hidden_layers, args.num_kv_heads, args.head_size, weights.dtype)
        self.state_spec = None
        self.context_length = args.max_position_embeddings
        self.vocab_size = args.vocab_size

    def __call__(self, token_ids: mx.array, ctx: StepContext) -> mx.array:
        x = self.embed_tokens(token_ids)  # [T, hidden_size]
        for layer in self.layers:
            x = layer(x, ctx)
        return self.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        head = self.lm_head or self.embed_tokens.as_linear
        return head(hidden).astype(mx.float32)  # [R, V]
