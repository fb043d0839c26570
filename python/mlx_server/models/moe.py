"""Mixture-of-experts blocks, and the fields of config.json that describe them."""

from typing import Annotated

import mlx.core as mx
import msgspec

from mlx_server.errors import ModelLoadError
from mlx_server.models.config import Count, DecoderArgs
from mlx_server.models.layers import Linear
from mlx_server.models.probe import is_computable
from mlx_server.models.weights import Weights
from mlx_server.ops.moe import ExpertMatrix, moe_mlp, route

_CountOrZero = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class MoEArgs(DecoderArgs, frozen=True, kw_only=True):
    """Names are those of transformers, which writes the number of experts under one of two."""

    num_experts: _CountOrZero | None = None
    num_local_experts: _CountOrZero | None = None
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    norm_topk_prob: bool
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is None and self.num_local_experts is None:
            raise ValueError("missing required field `num_experts`")
        if 0 < self.expert_count < self.num_experts_per_tok:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds {self.expert_count} experts")

    @property
    def expert_count(self) -> int:
        return self.num_local_experts or self.num_experts or 0

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has experts instead of one feed-forward block."""
        dense = layer in (self.mlp_only_layers or ())
        return not dense and self.expert_count > 0 and (layer + 1) % self.decoder_sparse_step == 0


class SparseMoE:
    """x [T, features] -> the weighted sum of each token's best experts, plus `shared`. An expert is a SwiGLU."""

    def __init__(self, weights: Weights, args: MoEArgs) -> None:
        self.top_k, self.normalize = args.num_experts_per_tok, args.norm_topk_prob
        num_experts, features, hidden_features = args.expert_count, args.hidden_size, args.moe_intermediate_size
        self.gate = Linear(weights.at("gate"), features, num_experts)
        shapes = {
            "gate_proj": (num_experts, hidden_features, features),
            "up_proj": (num_experts, hidden_features, features),
            "down_proj": (num_experts, features, hidden_features),
        }
        stacked = not any(weights.has(f"experts.0.{name}.weight") for name in shapes)
        self.gate_proj, self.up_proj, self.down_proj = (
            take_experts(weights, name, shape, stacked=stacked) for name, shape in shapes.items()
        )

    def __call__(self, x: mx.array, shared: mx.array | None = None) -> mx.array:
        experts, expert_weights = route(self.gate(x), top_k=self.top_k, normalize=self.normalize)  # [T, top_k]
        return moe_mlp(
            x, experts, expert_weights, gate=self.gate_proj, up=self.up_proj, down=self.down_proj, shared=shared
        )


def take_experts(weights: Weights, projection: str, shape: tuple[int, int, int], *, stacked: bool) -> ExpertMatrix:
    """One projection [N, K] of all E experts, quantized or not; shape: E, N, K.

    MLX checkpoints hold it stacked, in one tensor or its quantized parts, transformers saves the experts one by one.
    """
    num_experts, num_rows, num_columns = shape
    layer = weights.at(f"switch_mlp.{projection}" if stacked else f"experts.0.{projection}")

    def take(part: str, num_columns: int, dtype: mx.Dtype | mx.DtypeCategory = mx.floating) -> mx.array:
        if stacked:
            return layer.take(part, (num_experts, num_rows, num_columns), dtype)
        names = [f"experts.{expert}.{projection}.{part}" for expert in range(num_experts)]
        return weights.take_stacked(names, (num_rows, num_columns), dtype)

    quantization = layer.quantization()
    if quantization is None:
        return ExpertMatrix(take("weight", num_columns))
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    if num_columns % group_size:
        raise ModelLoadError(f"{weights.source}: {layer.name} has {num_columns} columns, not groups of {group_size}")
    weight = take("weight", num_columns * bits // 32, mx.uint32)
    scales = take("scales", num_columns // group_size, mx.floating if mode == "affine" else mx.uint8)
    biases = take("biases", num_columns // group_size) if mode == "affine" else None
    if is_computable(quantization, weights.dtype, experts=True):
        return ExpertMatrix(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    dense = mx.dequantize(
        weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=weights.dtype, stream=mx.cpu
    )
    weights.taken.append(dense)
    return ExpertMatrix(dense)
