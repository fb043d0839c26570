"""Blocks that architectures share. Each takes its tensors from the checkpoint's `Weights` under its own name there."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_server.errors import ModelLoadError
from mlx_server.models.base import KVSpec, StateSpec, StepContext
from mlx_server.models.config import DecoderArgs
from mlx_server.models.probe import is_computable
from mlx_server.models.quantize import Quantization
from mlx_server.models.rope import RopeParameters
from mlx_server.models.weights import Weights
from mlx_server.ops.activation import silu_mul
from mlx_server.ops.linear import linear, quantized_linear
from mlx_server.ops.norm import rms_norm
from mlx_server.ops.rope import rope

if TYPE_CHECKING:
    from mlx_server.models.moe import SparseMoE


class Matrix:
    """A matrix [N, K] of floating point numbers."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        self.num_columns, self.dtype = weight.shape[1], weight.dtype

    def linear(self, x: mx.array) -> mx.array:
        """x [..., K] -> x @ matrix.T [..., N]"""
        return linear(x, self.weight)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [T] -> [T, K]"""
        return self.weight[ids]


class QuantizedMatrix:
    """A matrix [N, K] as `mx.quantize` stores it."""

    def __init__(self, weights: Weights, num_rows: int, num_columns: int, quantization: Quantization) -> None:
        self.quantization = quantization
        self.num_columns, self.dtype = num_columns, weights.dtype
        affine = quantization.mode == "affine"
        if num_columns % quantization.group_size:
            raise ModelLoadError(
                f"{weights.source}: {weights.name} has {num_columns} columns, not groups of {quantization.group_size}"
            )
        groups = (num_rows, num_columns // quantization.group_size)
        self.weight = weights.take("weight", (num_rows, num_columns * quantization.bits // 32), mx.uint32)
        self.scales = weights.take("scales", groups, mx.floating if affine else mx.uint8)
        self.biases = weights.take("biases", groups) if affine else None

    def linear(self, x: mx.array) -> mx.array:
        """x [..., K] -> x @ matrix.T [..., N]"""
        group_size, bits, mode = self.quantization.group_size, self.quantization.bits, self.quantization.mode
        return quantized_linear(x, self.weight, self.scales, self.biases, group_size=group_size, bits=bits, mode=mode)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [T] -> [T, K]"""
        biases = None if self.biases is None else self.biases[ids]
        return self._dequantize(self.weight[ids], self.scales[ids], biases)

    def dense(self) -> mx.array:
        """The matrix itself. On the CPU, which can compute all forms."""
        return self._dequantize(self.weight, self.scales, self.biases, mx.cpu)

    def _dequantize(
        self, weight: mx.array, scales: mx.array, biases: mx.array | None, stream: mx.DeviceType | None = None
    ) -> mx.array:
        group_size, bits, mode = self.quantization.group_size, self.quantization.bits, self.quantization.mode
        return mx.dequantize(
            weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=self.dtype, stream=stream
        )


def take_matrix(weights: Weights, num_rows: int, num_columns: int) -> Matrix | QuantizedMatrix:
    """The matrix at the prefix of `weights`, quantized or not as the checkpoint says."""
    matrix = _make_matrix(weights, num_rows, num_columns)
    weights.matrices.append(matrix)
    return matrix


def _make_matrix(weights: Weights, num_rows: int, num_columns: int) -> Matrix | QuantizedMatrix:
    quantization = weights.quantization()
    if quantization is None:
        return Matrix(weights.take("weight", (num_rows, num_columns)))
    matrix = QuantizedMatrix(weights, num_rows, num_columns, quantization)
    if is_computable(quantization, weights.dtype):
        return matrix
    dense = matrix.dense()
    weights.taken.append(dense)
    return Matrix(dense)


class Linear:
    """x [..., in_features] -> x @ weight.T + bias [..., out_features]"""

    def __init__(self, weights: Weights, in_features: int, out_features: int, *, bias: bool = False) -> None:
        self._matrix = take_matrix(weights, out_features, in_features)
        self._bias = weights.take("bias", (out_features,)) if bias else None

    def __call__(self, x: mx.array) -> mx.array:
        y = self._matrix.linear(x)
        return y if self._bias is None else y + self._bias


class Embedding:
    """token_ids [T] -> [T, features]"""

    def __init__(self, weights: Weights, num_embeddings: int, features: int) -> None:
        self._matrix = take_matrix(weights, num_embeddings, features)

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self._matrix.rows(token_ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """x [..., features] -> [..., num_embeddings]: the head of a model with tied embeddings."""
        return self._matrix.linear(x)


class RMSNorm:
    """x [..., features] -> x / rms(x) * weight (https://arxiv.org/abs/1910.07467)

    zero_centred: the checkpoint holds weight - 1.
    """

    def __init__(self, weights: Weights, features: int, eps: float, *, zero_centred: bool = False) -> None:
        # The sum is float32: half precision would round off what small weights say.
        self._weight = (
            weights.take("weight", (features,), cast_to=mx.float32) + 1
            if zero_centred
            else weights.take("weight", (features,))
        )
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self._weight, self._eps)


class SwiGLU:
    """x [..., features] -> down_proj(silu(gate_proj(x)) * up_proj(x)) [..., features] (Shazeer, 2020)"""

    def __init__(self, weights: Weights, features: int, hidden_features: int, *, bias: bool = False) -> None:
        self.gate_proj = Linear(weights.at("gate_proj"), features, hidden_features, bias=bias)
        self.up_proj = Linear(weights.at("up_proj"), features, hidden_features, bias=bias)
        self.down_proj = Linear(weights.at("down_proj"), hidden_features, features, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class Rope:
    """Rotary position embedding: x [T, H, head_dim], positions [T] -> [T, H, head_dim]

    rotary_dim: features of each head that turn, the first ones; None: all.
    """

    def __init__(self, parameters: RopeParameters, head_dim: int, rotary_dim: int | None = None) -> None:
        self.parameters = parameters
        rotary_dim = rotary_dim or head_dim
        self._freqs = mx.array(parameters.freqs(rotary_dim), mx.float32)
        factor = parameters.length_factor
        self._lengths = None if factor == 1 else mx.array([factor] * rotary_dim + [1.0] * (head_dim - rotary_dim))

    def __call__(self, x: mx.array, positions: mx.array) -> mx.array:
        y = rope(x, positions, self._freqs)
        return y if self._lengths is None else (y * self._lengths).astype(x.dtype)


class Attention:
    """Causal attention over rotated queries and keys: x [T, hidden_size] -> [T, hidden_size]

    Letters: H heads, Hk key-value heads, D head size. `q_norm` and `k_norm` apply to each head before it is rotated.
    """

    def __init__(
        self,
        weights: Weights,
        args: DecoderArgs,
        layer: int,
        rope: Rope,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        scale: float | None = None,
    ) -> None:
        self.layer, self.head_dim, self.rope = layer, args.head_size, rope
        self.scale = args.head_size**-0.5 if scale is None else scale
        self.window = args.windows[layer]
        q_features, kv_features = args.num_attention_heads * args.head_size, args.num_kv_heads * args.head_size
        self.q_proj = Linear(weights.at("q_proj"), args.hidden_size, q_features, bias=qkv_bias)
        self.k_proj = Linear(weights.at("k_proj"), args.hidden_size, kv_features, bias=qkv_bias)
        self.v_proj = Linear(weights.at("v_proj"), args.hidden_size, kv_features, bias=qkv_bias)
        self.o_proj = Linear(weights.at("o_proj"), q_features, args.hidden_size, bias=output_bias)
        self.q_norm, self.k_norm = q_norm, k_norm

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        num_tokens = x.shape[0]
        q = self.q_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, H, D]
        k = self.k_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, Hk, D]
        v = self.v_proj(x).reshape(num_tokens, -1, self.head_dim)  # [T, Hk, D]
        q = self.rope(self.q_norm(q) if self.q_norm else q, ctx.positions)
        k = self.rope(self.k_norm(k) if self.k_norm else k, ctx.positions)
        y = ctx.attend(self.layer, q, k, v, scale=self.scale, window=self.window)  # [T, H, D]
        return self.o_proj(y.flatten(-2))


class PreNormLayer:
    """Attention and feed-forward network, each of its input's norm and added to it: x [T, hidden_size] -> the same"""

    def __init__(
        self,
        weights: Weights,
        args: DecoderArgs,
        attention: Callable[[mx.array, StepContext], mx.array],
        mlp: Callable[[mx.array], mx.array],
        *,
        zero_centred: bool = False,
    ) -> None:
        self.attention, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(weights.at(name), args.hidden_size, args.rms_norm_eps, zero_centred=zero_centred)
            for name in ("input_layernorm", "post_attention_layernorm")
        )

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        x = x + self.attention(self.input_layernorm(x), ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class CausalLM:
    """The frame of a decoder-only transformer, a `models.base.Model`: embedding, layers, last norm, head.

    The head is the checkpoint's `lm_head` if there is one, whatever the configuration says, else the embedding.
    rope: that of the layers which see all tokens.
    """

    def __init__(
        self,
        weights: Weights,
        args: DecoderArgs,
        layers: Sequence[Callable[[mx.array, StepContext], mx.array]],
        norm: RMSNorm,
        rope: Rope,
    ) -> None:
        weights.drop(suffix=".rotary_emb.inv_freq")
        self.embed_tokens = Embedding(weights.at("model.embed_tokens"), args.vocab_size, args.hidden_size)
        self.layers, self.norm = layers, norm
        tied = not weights.has("lm_head.weight") and args.tie_word_embeddings is not False
        self.lm_head = None if tied else Linear(weights.at("lm_head"), args.hidden_size, args.vocab_size)

        windows = [window for window in args.windows if window is not None]
        window = max(windows) if len(windows) == args.num_hidden_layers else None
        self.kv_spec = KVSpec(args.num_hidden_layers, args.num_kv_heads, args.head_size, weights.dtype, window)
        self.state_spec: StateSpec | None = None
        self.sparse_blocks: Sequence[SparseMoE] = []
        self.matrices: Sequence[Matrix | QuantizedMatrix] = weights.matrices
        self.context_length = rope.parameters.context_length(args.max_position_embeddings)
        self.vocab_size = args.vocab_size

    def embed(self, token_ids: mx.array) -> mx.array:
        return self.embed_tokens(token_ids)

    def __call__(self, token_ids: mx.array, ctx: StepContext) -> mx.array:
        x = self.embed(token_ids)  # [T, hidden_size]
        for layer in self.layers:
            x = layer(x, ctx)
        return self.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        head = self.lm_head or self.embed_tokens.as_linear
        return head(hidden).astype(mx.float32)  # [R, V]
