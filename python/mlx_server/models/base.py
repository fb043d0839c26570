"""What the engine asks of a model, and what a model asks of the engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import msgspec

if TYPE_CHECKING:
    from mlx_server.models.layers import Matrix, QuantizedMatrix
    from mlx_server.models.moe import SparseMoE


class KVSpec(msgspec.Struct, frozen=True):
    """What the KV pool must hold for each token: a key and a value of [num_kv_heads, head_dim] in every layer
    that has attention."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: mx.Dtype  # of keys, values and activations
    window: int | None = None  # no layer looks back further than so many tokens; None: some layer sees all


class StateSpec(msgspec.Struct, frozen=True):
    """What a slot must hold for each request of a model with recurrent layers, in each of them.

    The conv state, the last inputs of the convolution, is [conv_kernel - 1, conv_channels]; the recurrent state is
    [num_value_heads, value_head_dim, key_head_dim] float32. Both are zeros before a request's first token.
    """

    num_layers: int  # the recurrent ones alone
    conv_kernel: int
    conv_channels: int
    num_value_heads: int
    value_head_dim: int
    key_head_dim: int
    dtype: mx.Dtype  # of the conv state and activations


class StepContext(Protocol):
    """One step of the engine, as its model sees it: the tokens of all requests lie on one flat axis T.

    There is no batch axis, no padding and no mask: which token may see which key is known to the context alone.
    """

    @property
    def positions(self) -> mx.array:
        """[T] int32: each token's position in its own request."""
        ...

    def attend(
        self,
        layer: int,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Store the step's keys and values in `layer`'s pool, then attend causally over each request's own tokens.

        Args:
            layer: counts the layers with attention, from 0.
            q: [T, H, D], after RoPE.
            k, v: [T, Hk, D], k after RoPE; H is a multiple of Hk.
            window: a token sees only the newest `window` tokens, itself included; None: all.
            softcap: scores become `softcap * tanh(score / softcap)`.
            sinks: [H], a score more in each head's softmax, that of a value which is zero.
        Returns:
            [T, H, D], the dtype of q.
        """
        ...

    def gated_delta(
        self,
        layer: int,
        qkv: mx.array,
        conv_weight: mx.array,
        a: mx.array,
        b: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        *,
        num_key_heads: int,
        key_head_dim: int,
    ) -> mx.array:
        """Causal convolution, SiLU and the gated delta rule (https://arxiv.org/abs/2412.06464) over each request's own
        tokens, from the states that its slot holds for `layer` to those that it will hold after the step.

        Letters: Hk and Hv key and value heads, Dk and Dv their sizes, K the convolution's width. Queries and keys are
        normalised to length 1, queries then scaled by `Dk ** -0.5`; in each head
        `state = exp(-exp(a_log) * softplus(a + dt_bias)) * state`, then
        `state += sigmoid(b) * outer(v - state @ k, k)`, and the head's output is `state @ q`.

        Args:
            layer: counts the recurrent layers, from 0.
            qkv: [T, 2 * Hk * Dk + Hv * Dv]: queries, keys and values, before the convolution.
            conv_weight: [2 * Hk * Dk + Hv * Dv, K]; the last column is the token's own.
            a, b: [T, Hv], before softplus and sigmoid.
            a_log, dt_bias: [Hv] float32.
        Returns:
            [T, Hv, Dv], the dtype of qkv.
        """
        ...


class Model(Protocol):
    """A causal language model with its weights."""

    @property
    def kv_spec(self) -> KVSpec: ...

    @property
    def state_spec(self) -> StateSpec | None:
        """None if the model has no recurrent layers."""
        ...

    @property
    def sparse_blocks(self) -> "Sequence[SparseMoE]":
        """The mixtures of experts, layer by layer."""
        ...

    @property
    def matrices(self) -> "Sequence[Matrix | QuantizedMatrix]":
        """Those of linear layers and embeddings."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens of a request, prompt and answer together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def __call__(self, token_ids: mx.array, ctx: StepContext) -> mx.array:
        """token_ids [T] int32 -> hidden states [T, hidden_size], after the last norm."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [R, hidden_size] -> logits [R, V] float32. R: the rows that are sampled, usually fewer than T."""
        ...
