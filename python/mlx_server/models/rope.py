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
_Count = Annotated[int, msgspec.Meta(gt=0)]

MAX_POSITIONS = (1 << 31) - 1


class RopeParameters(msgspec.Struct, frozen=True, tag_field="rope_type", kw_only=True):
    rope_theta: _Positive

    def freqs(self, rotary_dim: int) -> npt.NDArray[np.float64]:
        """[rotary_dim / 2], as `ops.rope` takes them: feature pair i turns by `position / freqs[i]` radians."""
        return self.rope_theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)

    @property
    def length_factor(self) -> float:
        """By which turned queries and keys grow."""
        return 1.0

    def context_length(self, max_position_embeddings: int) -> int:
        """Most tokens of a request, where the configuration says `max_position_embeddings`."""
        return max_position_embeddings


class DefaultRope(RopeParameters, frozen=True, tag="default"):
    pass


class LinearRope(RopeParameters, frozen=True, tag="linear"):
    """Position interpolation (https://arxiv.org/abs/2306.15595): positions are divided by `factor`."""

    factor: _Positive

    def freqs(self, rotary_dim: int) -> npt.NDArray[np.float64]:
        return super().freqs(rotary_dim) * self.factor


class DynamicRope(RopeParameters, frozen=True, tag="dynamic"):
    """NTK scaling by the length of the context: none up to `max_position_embeddings`, and no request is longer."""

    factor: _Positive


class YarnRope(RopeParameters, frozen=True, tag="yarn", kw_only=True):
    """YaRN (https://arxiv.org/abs/2309.00071): pairs that turn often in the original context stay, pairs that turn
    rarely are interpolated, between them is a ramp."""

    factor: _Positive
    original_max_position_embeddings: _Count
    attention_factor: _Positive | None = None
    beta_fast: _Positive | None = None  # turns; more of them, and a pair stays
    beta_slow: _Positive | None = None  # turns; fewer, and a pair is interpolated
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta of yarn must be above 1 but is {self.rope_theta}")

    def freqs(self, rotary_dim: int) -> npt.NDArray[np.float64]:
        low, high = (self._pair_of(turns, rotary_dim) for turns in (self.beta_fast or 32.0, self.beta_slow or 1.0))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001
        interpolated = np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
        freqs: npt.NDArray[np.float64] = super().freqs(rotary_dim) / (1 - interpolated + interpolated / self.factor)
        return freqs

    def _pair_of(self, turns: float, rotary_dim: int) -> float:
        """The (fractional) pair that makes so many turns in the original context."""
        freq = self.original_max_position_embeddings / (2 * math.pi * turns)
        return rotary_dim / 2 * math.log(freq) / math.log(self.rope_theta)

    @property
    def length_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._length(self.mscale) / self._length(self.mscale_all_dim)
        return self._length(1.0)

    def _length(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def context_length(self, max_position_embeddings: int) -> int:
        """Who adds YaRN to a config, as the cards of Qwen's models advise, leaves `max_position_embeddings` alone."""
        scaled = min(self.original_max_position_embeddings * self.factor, MAX_POSITIONS)
        return max(max_position_embeddings, int(scaled))


class Llama3Rope(RopeParameters, frozen=True, tag="llama3"):
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones stay, those between are interpolated."""

    factor: _Positive
    low_freq_factor: _Positive
    high_freq_factor: _Positive
    original_max_position_embeddings: _Count

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} must be below {self.high_freq_factor}")

    def freqs(self, rotary_dim: int) -> npt.NDArray[np.float64]:
        freqs = super().freqs(rotary_dim)
        turns = self.original_max_position_embeddings / (2 * math.pi * freqs)  # in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return freqs / (kept + (1 - kept) / self.factor)


_TYPES: dict[object, type[RopeParameters]] = {
    "default": DefaultRope,
    "linear": LinearRope,
    "dynamic": DynamicRope,
    "yarn": YarnRope,
    "llama3": Llama3Rope,
}


def read_rope_parameters(config: JsonObject, source: str, default_theta: float = 10000.0) -> RopeParameters:
    """The parameters of a config.json; `source` begins each message of a ModelLoadError.

    transformers 5 writes one object `rope_parameters`, earlier versions `rope_theta` and, if scaled, `rope_scaling`,
    which people add by hand to configs of either kind.
    """
    parameters = config.get("rope_parameters")
    fields = config.get("rope_scaling") or parameters or {}
    if not isinstance(fields, dict):
        raise ModelLoadError(f"{source}: rope_parameters must be an object")
    if any(isinstance(value, dict) for value in fields.values()):
        raise ModelLoadError(f"{source}: RoPE parameters for each type of layer are not supported for this model_type")
    rope_type = fields.get("rope_type") or fields.get("type") or "default"
    if rope_type not in _TYPES:
        raise ModelLoadError(
            f"{source}: rope_type {rope_type!r} is not supported (supported: {', '.join(map(str, _TYPES))})"
        )
    stated: list[JsonObject] = [  # later ones count
        {"rope_theta": default_theta, "original_max_position_embeddings": config.get("max_position_embeddings")},
        {"rope_theta": parameters.get("rope_theta") if isinstance(parameters, dict) else None},
        {"rope_theta": config.get("rope_theta")},
        {**fields, "rope_type": rope_type},
    ]
    known = {key: value for place in stated for key, value in place.items() if value is not None}
    return convert(known, _TYPES[rope_type], f"{source}: RoPE parameters")
