"""What the engine asks of a model, and what a model asks of the engine."""

from typing import Protocol

import mlx.core as mx
import msgspec


class KVSpec(msgspec.Struct, frozen=True):
    """What the KV pool must hold for each token: a key and a value of [num_kv_heads, head_dim] in every layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: mx.Dtype  # of keys, values and activations


class AttentionContext(Protocol):
    """One step of the engine, as its model sees it: the tokens of all requests lie on one flat axis T.

    There is no batch axis, no padding and no mask: which token may see which key is known to the context alone.
    """

    @property
    def positions(self) -> mx.array:
        """[T] int32: each token's position in its own request."""
        ...

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
        """Store the step's keys and values in `layer`'s pool, then attend causally over each request's own tokens.

        Args:
            q: [T, H, D], after RoPE.
            k, v: [T, Hk, D], k after RoPE; H is a multiple of Hk.
        Returns:
            [T, H, D], the dtype of q.
        """
        ...


class Model(Protocol):
    """A causal language model with its weights."""

    @property
    def kv_spec(self) -> KVSpec: ...

    @property
    def context_length(self) -> int:
        """Most tokens of a request, prompt and answer together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def __call__(self, token_ids: mx.array, ctx: AttentionContext) -> mx.array:
        """token_ids [T] int32 -> hidden states [T, hidden_size], after the last norm."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [R, hidden_size] -> logits [R, V] float32. R: the rows that are sampled, usually fewer than T."""
        ...
