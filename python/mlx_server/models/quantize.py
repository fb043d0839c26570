"""The `quantization` block of an MLX checkpoint's config.json."""

from typing import Literal

import msgspec

from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.errors import ModelLoadError
from mlx_server.models.config import convert

GROUP_SIZES = {"affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}
# What MLX takes where a layer's own block does not say: group_size and bits
_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


class Quantization(msgspec.Struct, frozen=True):
    """How `mx.quantize` stored a matrix [N, K]: weight [N, K * bits / 32] uint32, scales [N, K / group_size]."""

    group_size: int
    bits: int
    mode: Literal["affine", "mxfp4", "mxfp8", "nvfp4"] = "affine"

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES[self.mode]:
            raise ValueError(
                f"group_size of {self.mode} must be {_or(GROUP_SIZES[self.mode])} but is {self.group_size}"
            )
        if self.bits not in BITS[self.mode]:
            raise ValueError(f"bits of {self.mode} must be {_or(BITS[self.mode])} but is {self.bits}")


class QuantizationPlan(msgspec.Struct, frozen=True):
    """Which layers are quantized and how; `overrides` by the layer's name in the checkpoint, None if not quantized."""

    default: Quantization | None = None
    overrides: dict[str, Quantization | None] = {}

    def of(self, layer: str, *, has_scales: bool) -> Quantization | None:
        """What the checkpoint says of a layer. Without an override, having `scales` decides.

        Overrides name layers with or without the module that holds the language model.
        """
        for key in (layer, layer.removeprefix("model."), f"language_model.{layer}"):
            if key in self.overrides:
                return self.overrides[key]
        return self.default if has_scales else None


def read_plan(config: JsonObject, source: str) -> QuantizationPlan:
    """The plan of a config.json; `source` begins each message of a ModelLoadError.

    MLX's block is {"group_size": 64, "bits": 4, "mode": "affine", "model.layers.0.mlp.down_proj": {...} or false, ...}.
    It is also written to `quantization_config`, where other libraries put methods of their own.
    """
    block = config.get("quantization") or config.get("quantization_config")
    if block is None:
        return QuantizationPlan()
    if not isinstance(block, dict):
        raise ModelLoadError(f"{source}: quantization must be an object")
    if "quant_method" in block and "quantization" not in config:
        raise ModelLoadError(
            f"{source}: quantization method {block['quant_method']!r} is not supported; use an MLX or GGUF form"
        )
    default = convert(block, Quantization, f"{source}: quantization")
    overrides: dict[str, Quantization | None] = {}
    for layer, value in block.items():
        if value is False:
            overrides[layer] = None
        elif isinstance(value, dict):
            overrides[layer] = _convert_override(value, f"{source}: quantization of {layer}")
    return QuantizationPlan(default, overrides)


def _convert_override(block: JsonObject, where: str) -> Quantization:
    """One layer's block. It owes nothing to the checkpoint's: what it does not say is MLX's default."""
    mode = block.get("mode", "affine")
    group_size, bits = _DEFAULTS.get(mode, _DEFAULTS["affine"]) if isinstance(mode, str) else _DEFAULTS["affine"]
    return convert({"group_size": group_size, "bits": bits, **block}, Quantization, where)


def _or(values: tuple[int, ...]) -> str:
    return " or ".join(map(str, values))
