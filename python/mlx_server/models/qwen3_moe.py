"""Qwen3 with a mixture of experts (https://arxiv.org/abs/2505.09388): Qwen3-30B-A3B, 235B-A22B, Qwen3-Coder …"""

from typing import Annotated, Literal

import mlx.core as mx
import msgspec

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.base import KVSpec, StepContext
from mlx_server.models.config import convert
from mlx_server.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from mlx_server.models.moe import MoEArgs, SparseMoE
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights
from mlx_server.ops.rope import rope

_Count = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]


class Qwen3MoeArgs(MoEArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' Qwen3MoeConfig."""

    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    head_dim: _Count | None = None
    vocab_size: _Count
    max_position_embeddings: _Count = 32768
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-6
    norm_topk_prob: bool = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: _Count | None = 4096
    tie_word_embeddings: bool | None = None  # False: there must be an lm_head; else there may be one

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int | None:
        """Newest tokens that each token sees; None: all."""
        return self.sliding_window if self.use_sliding_window else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} heads can't share {self.num_key_value_heads} key-value heads")
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} must be even")


class Attention:
    def __init__(self, args: Qwen3MoeArgs, layer: int, freqs: mx.array, weights: Weights) -> None:
        self.layer, self.freqs = layer, freqs
        self.head_dim, self.window = args.head_size, args.window
        q_features, kv_features = args.num_attention_heads * self.head_dim, args.num_key_value_heads * self.head_dim
        bias = args.attention_bias
        self.q_proj = Linear(weights.at("q_proj"), args.hidden_size, q_features, bias=bias)
        self.k_proj = Linear(weights.at("k_proj"), args.hidden_size, kv_features, bias=bias)
        self.v_proj = Linear(weights.at("v_proj"), args.hidden_size, kv_features, bias=bias)
        self.o_proj = Linear(weights.at("o_proj"), q_features, args.hidden_size, bias=bias)
        self.q_norm = RMSNorm(weights.at("q_norm"), self.head_dim, args.rms_norm_eps)
        self.k_norm = RMSNorm(weights.at("k_norm"), self.head_dim, args.rms_norm_eps)

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        num_tokens = x.shape[0]
        q = self.q_norm(self.q_proj(x).reshape(num_tokens, -1, self.head_dim))  # [T, H, D]
        k = self.k_norm(self.k_proj(x).reshape(num_tokens, -1, self.head_dim))  # [T, Hk, D]
        v = self.v_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, Hk, D]
        q = rope(q, ctx.positions, self.freqs)
        k = rope(k, ctx.positions, self.freqs)
        y = ctx.attend(self.layer, q, k, v, scale=self.head_dim**-0.5, window=self.window)  # [T, H, D]
        return self.o_proj(y.flatten(-2))


class DecoderLayer:
    def __init__(self, args: Qwen3MoeArgs, layer: int, freqs: mx.array, weights: Weights) -> None:
        self.self_attn = Attention(args, layer, freqs, weights.at("self_attn"))
        self.mlp = (
            SparseMoE(args, args.hidden_size, weights.at("mlp"))
            if args.is_sparse(layer)
            else SwiGLU(weights.at("mlp"), args.hidden_size, args.intermediate_size)
        )
        self.input_layernorm = RMSNorm(weights.at("input_layernorm"), args.hidden_size, args.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(
            weights.at("post_attention_layernorm"), args.hidden_size, args.rms_norm_eps
        )

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Moe:
    """A `models.base.Model`."""

    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, Qwen3MoeArgs, weights.source)
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

        self.kv_spec = KVSpec(
            args.num_hidden_layers, args.num_key_value_heads, args.head_size, weights.dtype, args.window
        )
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
