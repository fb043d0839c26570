"""Blocks that architectures share. Each takes its tensors from the checkpoint's `Weights` under its own name there."""

import itertools
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
from mlx_server.ops.rope import qkv_rope

if TYPE_CHECKING:
    from mlx_server.models.moe import SparseMoE


class Matrix:
    """A matrix [N, K] of floating point numbers."""

    quantization = None

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

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None,
        quantization: Quantization,
        dtype: mx.Dtype,
    ) -> None:
        self.weight, self.scales, self.biases = weight, scales, biases
        self.quantization, self.dtype = quantization, dtype
        self.num_columns = weight.shape[1] * 32 // quantization.bits

    @classmethod
    def take(cls, weights: Weights, num_rows: int, num_columns: int, quantization: Quantization) -> "QuantizedMatrix":
        affine = quantization.mode == "affine"
        if num_columns % quantization.group_size:
            raise ModelLoadError(
                f"{weights.source}: {weights.name} has {num_columns} columns, not groups of {quantization.group_size}"
            )
        groups = (num_rows, num_columns // quantization.group_size)
        weight = weights.take("weight", (num_rows, num_columns * quantization.bits // 32), mx.uint32)
        scales = weights.take("scales", groups, mx.floating if affine else mx.uint8)
        biases = weights.take("biases", groups) if affine else None
        return cls(weight, scales, biases, quantization, weights.dtype)

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


def take_matrices(weights: Weights, num_rows: dict[str, int], num_columns: int) -> list[Matrix | QuantizedMatrix]:
    """The matrices under the names of `num_rows`, in this order; those of one form that follow each other as one."""
    matrices = [_make_matrix(weights.at(name), rows, num_columns) for name, rows in num_rows.items()]
    groups = [list(group) for _, group in itertools.groupby(matrices, lambda matrix: matrix.quantization)]
    joined = [group[0] if len(group) == 1 else _join(weights, group) for group in groups]
    weights.matrices.extend(joined)
    return joined


def _join(weights: Weights, parts: Sequence[Matrix | QuantizedMatrix]) -> Matrix | QuantizedMatrix:
    """The matrix of all rows of `parts`, which are of one form and give way to it."""
    weight = weights.join([part.weight for part in parts])
    quantized = [part for part in parts if isinstance(part, QuantizedMatrix)]
    if not quantized:
        return Matrix(weight)
    scales = weights.join([part.scales for part in quantized])
    biases = [part.biases for part in quantized if part.biases is not None]
    form = quantized[0].quantization, quantized[0].dtype
    return QuantizedMatrix(weight, scales, weights.join(biases) if biases else None, *form)


def _make_matrix(weights: Weights, num_rows: int, num_columns: int) -> Matrix | QuantizedMatrix:
    quantization = weights.quantization()
    if quantization is None:
        return Matrix(weights.take("weight", (num_rows, num_columns)))
    matrix = QuantizedMatrix.take(weights, num_rows, num_columns, quantization)
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


class JoinedLinear:
    """Linear layers of one input, their outputs side by side: x [..., in_features] -> [..., sum of out_features]

    One product instead of several: what a small product costs beside its work is paid once.

    out_features: of each layer, by its name.
    """

    def __init__(self, weights: Weights, in_features: int, out_features: dict[str, int], *, bias: bool = False) -> None:
        self._matrices = take_matrices(weights, out_features, in_features)
        biases = [weights.at(name).take("bias", (size,)) for name, size in out_features.items()] if bias else []
        self._bias = weights.join(biases) if biases else None

    def __call__(self, x: mx.array) -> mx.array:
        products = [matrix.linear(x) for matrix in self._matrices]
        y = products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)
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
        self.weight = (
            weights.take("weight", (features,), cast_to=mx.float32) + 1
            if zero_centred
            else weights.take("weight", (features,))
        )
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU:
    """x [..., features] -> down_proj(silu(gate_proj(x)) * up_proj(x)) [..., features] (Shazeer, 2020)"""

    def __init__(self, weights: Weights, features: int, hidden_features: int, *, bias: bool = False) -> None:
        gate_up = {"gate_proj": hidden_features, "up_proj": hidden_features}
        self.gate_up_proj = JoinedLinear(weights, features, gate_up, bias=bias)
        self.down_proj = Linear(weights.at("down_proj"), hidden_features, features, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


class Rope:
    """Rotary position embedding. rotary_dim: features of each head that turn, the first ones; None: all."""

    def __init__(self, parameters: RopeParameters, head_dim: int, rotary_dim: int | None = None) -> None:
        self.parameters = parameters
        self.freqs = mx.array(parameters.freqs(rotary_dim or head_dim), mx.float32)


class QkvProjection:
    """Queries, keys and values of a layer: x [T, hidden_size] -> q [T, H, D], k and v [T, Hk, D]

    Letters: H heads, Hk key-value heads, D head size. `q_norm` and `k_norm`, both or none, apply to each head before it
    is rotated. gated: `q_proj` also makes a gate for each feature of the queries, [T, H, D].
    """

    def __init__(
        self,
        weights: Weights,
        args: DecoderArgs,
        rope: Rope,
        *,
        bias: bool = False,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
        gated: bool = False,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.gated = args.num_attention_heads, args.num_kv_heads, gated
        kv_features = self.num_kv_heads * args.head_size
        self.q_features = self.num_heads * args.head_size * (2 if gated else 1)
        features = {"q_proj": self.q_features, "k_proj": kv_features, "v_proj": kv_features}
        self.proj = JoinedLinear(weights, args.hidden_size, features, bias=bias)
        self.freqs, self.length_factor = rope.freqs, rope.parameters.length_factor
        self.norms, self.eps = None, 0.0
        if q_norm and k_norm:
            self.norms, self.eps = mx.stack([q_norm.weight, k_norm.weight]).astype(mx.float32), q_norm.eps

    def __call__(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return self._split(self.proj(x), positions)

    def with_gate(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """q, k, v and the gate of q."""
        qkv = self.proj(x)
        q, k, v = self._split(qkv, positions)
        gate = qkv[:, : self.q_features].reshape(*q.shape[:2], -1)[..., q.shape[2] :]
        return q, k, v, gate

    def _split(self, qkv: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        return qkv_rope(
            qkv,
            positions,
            self.freqs,
            self.norms,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            eps=self.eps,
            length_factor=self.length_factor,
            gated=self.gated,
        )


class Attention:
    """Causal attention over rotated queries and keys: x [T, hidden_size] -> [T, hidden_size]

    q_norm, k_norm: as those of `QkvProjection`.
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
        self.layer = layer
        self.scale = args.head_size**-0.5 if scale is None else scale
        self.window = args.windows[layer]
        self.qkv_proj = QkvProjection(weights, args, rope, bias=qkv_bias, q_norm=q_norm, k_norm=k_norm)
        q_features = args.num_attention_heads * args.head_size
        self.o_proj = Linear(weights.at("o_proj"), q_features, args.hidden_size, bias=output_bias)

    def __call__(self, x: mx.array, ctx: StepContext) -> mx.array:
        q, k, v = self.qkv_proj(x, ctx.positions)
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
