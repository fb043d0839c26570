"""Typed reading of a model's configuration."""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec

from mlx_server.errors import ModelLoadError

_T = TypeVar("_T")

Count = Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]
LayerType = Literal["full_attention", "sliding_attention"]


class DecoderArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that decoder-only transformers share; names and defaults are those of transformers."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, msgspec.Meta(gt=0, le=4096)]  # bounds what is done before a layer is missed
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    vocab_size: Count
    max_position_embeddings: Count
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-6
    tie_word_embeddings: bool | None = None  # False: there must be an lm_head; else there may be one

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_attention_heads} heads can't share {self.num_kv_heads} key-value heads")
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} must be even")

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> list[int | None]:
        """For each layer, how many tokens a token sees, itself included; None: all."""
        return [None] * self.num_hidden_layers


class WindowedDecoderArgs(DecoderArgs, frozen=True, kw_only=True):
    """Of architectures some of whose layers may have a sliding window."""

    sliding_window: Count | None = 4096
    layer_types: list[LayerType] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")

    def is_sliding(self, layer: int) -> bool:
        """What holds for a layer if there are no `layer_types`."""
        raise NotImplementedError

    @property
    def windows(self) -> list[int | None]:
        layers = range(self.num_hidden_layers)
        sliding = [
            self.is_sliding(layer) if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
            for layer in layers
        ]
        return [self.sliding_window if sliding[layer] else None for layer in layers]


def convert(fields: Mapping[str, object], kind: type[_T], where: str) -> _T:
    """The typed form of `fields`; unknown ones are ignored. ModelLoadError, beginning with `where`, if one is wrong."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{where}: {error}") from error
