"""Frequencies of rotary position embeddings (https://arxiv.org/abs/2104.09864), by `rope_type`."""

import math
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.errors import ModelLoadError
from mlx_server.models.config import convert

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class RopeParameters(msgspec.Struct, frozen=True, tag_field="rope_type", kw_only=True):
    rope_theta: _Positive

    def freqs(self, head_dim: int) -> npt.NDArray[np.float64]:
        """[head_dim / 2], as `ops.rope` takes them: feature pair i turns by `position / freqs[i]` radians."""
        return self.rope_theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


class DefaultRope(RopeParameters, frozen=True, tag="default"):
    pass


class LinearRope(RopeParameters, frozen=True, tag="linear"):
    """Position interpolation (https://arxiv.org/abs/2306.15595): positions are divided by `factor`."""

    factor: _Positive

    def freqs(self, head_dim: int) -> npt.NDArray[np.float64]:
        return super().freqs(head_dim) * self.factor


class Llama3Rope(RopeParameters, frozen=True, tag="llama3"):
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are interpolated."""

    factor: _Positive
    low_freq_factor: _Positive
    high_freq_factor: _Positive
    original_max_position_embeddings: Annotated[int, msgspec.Meta(gt=0)]

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below {self.high_freq_factor}")

    def freqs(self, head_dim: int) -> npt.NDArray[np.float64]:
        freqs = super().freqs(head_dim)
        turns = self.original_max_position_embeddings / (2 * math.pi * freqs)  # in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return freqs / (kept + (1 - kept) / self.factor)


_TYPES: dict[object, type[RopeParameters]] = {"default": DefaultRope, "linear": LinearRope, "llama3": Llama3Rope}


def read_rope_parameters(config: JsonObject, source: str) -> RopeParameters:
    """The parameters of a config.json; `source` begins each message of a ModelLoadError.

    transformers 5 writes one object `rope_parameters`, earlier versions `rope_theta` and, if scaled, `rope_scaling`.
    """
    fields = config.get("rope_parameters")
    if fields is None:
        scaling = config.get("rope_scaling")
        fields = {"rope_theta": config.get("rope_theta", 10000.0), **(scaling if isinstance(scaling, dict) else {})}
    if not isinstance(fields, dict):
        raise ModelLoadError(f"{source}: rope_parameters must be an object")
    rope_type = fields.get("rope_type", fields.get("type", "default"))
    if rope_type not in _TYPES:
        raise ModelLoadError(
            f"{source}: rope_type {rope_type!r} is not supported (supported: {', '.join(map(str, _TYPES))})"
        )
    return convert({**fields, "rope_type": rope_type}, _TYPES[rope_type], f"{source}: RoPE parameters")
