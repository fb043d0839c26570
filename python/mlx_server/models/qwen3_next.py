"""Qwen3-Next (https://qwen.ai/blog?id=4074cca80393150c248e508aa62983f9cb7d27cd): linear attention by the gated delta
rule in most layers, gated attention in the others, and a mixture of experts with a shared one."""

from typing import Annotated, Literal

import mlx.core as mx
import msgspec

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.models.base import KVSpec, StateSpec, StepContext
from mlx_server.models.config import Count, convert
from mlx_server.models.layers import CausalLM, Linear, PreNormLayer, QkvProjection, RMSNorm, Rope, SwiGLU
from mlx_server.models.moe import MoEArgs, SparseMoE
from mlx_server.models.rope import read_rope_parameters
from mlx_server.models.weights import Weights
from mlx_server.ops.activation import silu_mul
from mlx_server.ops.norm import rms_norm

_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class _RopeShare(msgspec.Struct, frozen=True):
    partial_rotary_factor: _Share | None = None


class Qwen3NextArgs(MoEArgs, frozen=True, kw_only=True):
    """The fields of config.json that are read; names and defaults are those of transformers' Qwen3NextConfig."""

    head_dim: Count = 256
    linear_conv_kernel_dim: Annotated[int, msgspec.Meta(ge=2, lt=1 << 31)] = 4
    linear_key_head_dim: Count = 128
    linear_value_head_dim: Count = 128
    linear_num_key_heads: Count = 16
    linear_num_value_heads: Count = 32
    shared_expert_intermediate_size: Count
    layer_types: tuple[Literal["linear_attention", "full_attention"], ...] | None = None
    full_attention_interval: Count = 4  # where there are no layer_types
    partial_rotary_factor: _Share = 0.25  # that of rope_parameters comes first
    rope_parameters: _RopeShare | None = None
    max_position_embeddings: Count = 32768
    norm_topk_prob: bool = True
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"{self.linear_num_value_heads} value heads can't share {self.linear_num_key_heads} key heads"
            )
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(f"RoPE turns {self.rotary_dim} features of a head, but they must be pairs")
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")
        if len({self.is_linear(layer) for layer in range(self.num_hidden_layers)}) == 1:
            raise ValueError("there must be layers of linear and of full attention")

    def is_linear(self, layer: int) -> bool:
        """Whether the layer is recurrent, else it has attention."""
        if self.layer_types is not None:
            return self.layer_types[layer] == "linear_attention"
        return (layer + 1) % self.full_attention_interval != 0

    @property
    def rotary_dim(self) -> int:
        share = self.rope_parameters and self.rope_parameters.partial_rotary_factor
        return int(self.head_size * (share or self.partial_rotary_factor))

    @property
    def key_features(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_features(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_features + self.value_features


class Form(msgspec.Struct, frozen=True):
    """How a checkpoint holds what MLX and transformers hold differently.

    transformers: norms as weight - 1, and convolutions [C, 1, K]; MLX: the weight itself, and [C, K, 1].
    """

    from_transformers: bool

    def norm(self, weights: Weights, features: int, eps: float) -> RMSNorm:
        return RMSNorm(weights, features, eps, zero_centred=self.from_transformers)

    def conv_weight(self, weights: Weights, channels: int, kernel: int) -> mx.array:
        shape = (channels, 1, kernel) if self.from_transformers else (channels, kernel, 1)
        return weights.take("weight", shape).reshape(channels, kernel)


class GatedDeltaNet:
    """Letters: Hk, Hv key and value heads, Dk, Dv their sizes, C = 2 Hk Dk + Hv Dv channels of the convolution."""

    def __init__(self, weights: Weights, args: Qwen3NextArgs, layer: int, form: Form) -> None:
        self.layer, self.eps = layer, args.rms_norm_eps
        self.num_key_heads, self.key_head_dim = args.linear_num_key_heads, args.linear_key_head_dim
        self.num_value_heads, self.value_head_dim = args.linear_num_value_heads, args.linear_value_head_dim
        qkvz_features = args.conv_channels + args.value_features
        self.in_proj_qkvz = Linear(weights.at("in_proj_qkvz"), args.hidden_size, qkvz_features)
        self.in_proj_ba = Linear(weights.at("in_proj_ba"), args.hidden_size, 2 * self.num_value_heads)
        self.conv1d = form.conv_weight(weights.at("conv1d"), args.conv_channels, args.linear_conv_kernel_dim)
        self.a_log = weights.take("A_log", (self.num_value_heads,), cast_to=mx.float32)
        self.dt_bias = weights.take("dt_bias", (self.num_value_heads,), cast_to=mx.float32)
        self.norm = weights.at("norm").take("weight", (self.value_head_dim,))  # never zero-centred
        self.out_proj = Linear(weights.at("out_proj"), args.value_features, args.hidden_size)

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        qkv, z = self._split_qkvz(self.in_proj_qkvz(x))  # [T, C], [T, Hv, Dv]
        b, a = mx.split(self.in_proj_ba(x).reshape(x.shape[0], self.num_key_heads, -1), 2, axis=-1)
        y = ctx.gated_delta(
            self.layer,
            qkv,
            self.conv1d,
            a.flatten(-2),  # [T, Hv]
            b.flatten(-2),
            self.a_log,
            self.dt_bias,
            num_key_heads=self.num_key_heads,
            key_head_dim=self.key_head_dim,
        )  # [T, Hv, Dv]
        y = rms_norm(y.astype(mx.float32), self.norm, self.eps)
        return self.out_proj(silu_mul(z.astype(mx.float32), y).astype(x.dtype).flatten(-2))

    def _split_qkvz(self, qkvz: mx.array) -> tuple[mx.array, mx.array]:
        """The projection groups by key head what the convolution wants by kind."""
        num_tokens = qkvz.shape[0]
        values = self.num_value_heads // self.num_key_heads * self.value_head_dim  # of one key head
        ends = [self.key_head_dim, 2 * self.key_head_dim, 2 * self.key_head_dim + values]
        *qkv, z = mx.split(qkvz.reshape(num_tokens, self.num_key_heads, -1), ends, axis=-1)
        return (
            mx.concatenate([part.flatten(-2) for part in qkv], axis=-1),
            z.reshape(num_tokens, self.num_value_heads, self.value_head_dim),
        )


class GatedAttention:
    """Attention whose output passes a gate, one number for each feature of each head."""

    def __init__(self, weights: Weights, args: Qwen3NextArgs, layer: int, rope: Rope, form: Form) -> None:
        self.layer, self.scale = layer, args.head_size**-0.5
        bias = args.attention_bias
        q_norm, k_norm = (
            form.norm(weights.at(name), args.head_size, args.rms_norm_eps) for name in ("q_norm", "k_norm")
        )
        self.qkv_proj = QkvProjection(weights, args, rope, bias=bias, q_norm=q_norm, k_norm=k_norm, gated=True)
        q_features = args.num_attention_heads * args.head_size
        self.o_proj = Linear(weights.at("o_proj"), q_features, args.hidden_size, bias=bias)

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        q, k, v, gate = self.qkv_proj.with_gate(x, ctx.positions)
        y = ctx.attend(self.layer, q, k, v, scale=self.scale)  # [T, H, D]
        return self.o_proj((y * mx.sigmoid(gate)).flatten(-2))


class SharedExpertMoE:
    """A mixture of experts, and one expert that every token passes, weighted by a gate."""

    def __init__(self, weights: Weights, args: Qwen3NextArgs) -> None:
        self.experts = SparseMoE(weights, args)
        self.shared_expert = SwiGLU(weights.at("shared_expert"), args.hidden_size, args.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(weights.at("shared_expert_gate"), args.hidden_size, 1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.experts(x, shared=mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x))


def decoder_layer(
    weights: Weights, args: Qwen3NextArgs, layer: int, index: int, rope: Rope, form: Form
) -> PreNormLayer:
    """`index` counts the layers of this kind, recurrent or with attention."""
    mlp = weights.at("mlp")
    return PreNormLayer(
        weights,
        args,
        GatedDeltaNet(weights.at("linear_attn"), args, index, form)
        if args.is_linear(layer)
        else GatedAttention(weights.at("self_attn"), args, index, rope, form),
        SharedExpertMoE(mlp, args) if args.is_sparse(layer) else SwiGLU(mlp, args.hidden_size, args.intermediate_size),
        zero_centred=form.from_transformers,
    )


class Qwen3Next(CausalLM):
    def __init__(self, config: JsonObject, weights: Weights) -> None:
        args = convert(config, Qwen3NextArgs, weights.source)
        rope = Rope(read_rope_parameters(config, weights.source), args.head_size, args.rotary_dim)
        weights.drop(prefix="mtp.")  # a small model that drafts tokens
        model = weights.at("model")
        linear = [args.is_linear(layer) for layer in range(args.num_hidden_layers)]
        conv_shape = model.shape(f"layers.{linear.index(True)}.linear_attn.conv1d.weight")
        form = Form(from_transformers=conv_shape is not None and conv_shape[1:2] == (1,))
        layers = [
            decoder_layer(model.at(f"layers.{layer}"), args, layer, linear[:layer].count(linear[layer]), rope, form)
            for layer in range(args.num_hidden_layers)
        ]
        norm = form.norm(model.at("norm"), args.hidden_size, args.rms_norm_eps)
        super().__init__(weights, args, layers, norm, rope)
        self.sparse_blocks = [layer.mlp.experts for layer in layers if isinstance(layer.mlp, SharedExpertMoE)]
        self.kv_spec = KVSpec(linear.count(False), args.num_kv_heads, args.head_size, weights.dtype)
        self.state_spec = StateSpec(
            num_layers=linear.count(True),
            conv_kernel=args.linear_conv_kernel_dim,
            conv_channels=args.conv_channels,
            num_value_heads=args.linear_num_value_heads,
            value_head_dim=args.linear_value_head_dim,
            key_head_dim=args.linear_key_head_dim,
            dtype=weights.dtype,
        )
