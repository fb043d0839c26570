"""Blocks that architectures share. Each takes its tensors from the checkpoint's `Weights` under its own name there."""

import mlx.core as mx

from mlx_server.errors import ModelLoadError
from mlx_server.models.quantize import Quantization
from mlx_server.models.weights import Weights
from mlx_server.ops.activation import silu_mul
from mlx_server.ops.linear import quantized_linear
from mlx_server.ops.norm import rms_norm


class Matrix:
    """A matrix [N, K] of floating point numbers."""

    def __init__(self, weights: Weights, num_rows: int, num_columns: int) -> None:
        self.weight = weights.take("weight", (num_rows, num_columns))

    def linear(self, x: mx.array) -> mx.array:
        """x [..., K] -> x @ matrix.T [..., N]"""
        return x @ self.weight.T

    def rows(self, ids: mx.array) -> mx.array:
        """ids [T] -> [T, K]"""
        return self.weight[ids]


class QuantizedMatrix:
    """A matrix [N, K] as `mx.quantize` stores it."""

    def __init__(self, weights: Weights, num_rows: int, num_columns: int, quantization: Quantization) -> None:
        self.quantization = quantization
        self.dtype = weights.dtype
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
        if self.biases is not None:
            return quantized_linear(x, self.weight, self.scales, self.biases, group_size=group_size, bits=bits)
        return mx.quantized_matmul(x, self.weight, self.scales, group_size=group_size, bits=bits, mode=mode)

    def rows(self, ids: mx.array) -> mx.array:
        """ids [T] -> [T, K]"""
        return mx.dequantize(
            self.weight[ids],
            self.scales[ids],
            None if self.biases is None else self.biases[ids],
            group_size=self.quantization.group_size,
            bits=self.quantization.bits,
            mode=self.quantization.mode,
        ).astype(self.dtype)


def take_matrix(weights: Weights, num_rows: int, num_columns: int) -> Matrix | QuantizedMatrix:
    """The matrix at the prefix of `weights`, quantized or not as the checkpoint says."""
    quantization = weights.quantization()
    if quantization is None:
        return Matrix(weights, num_rows, num_columns)
    return QuantizedMatrix(weights, num_rows, num_columns, quantization)


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
