"""Tensors of GGUF files, as an MLX checkpoint would hold them.

Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

import logging
import re

import mlx.core as mx
import numpy as np

from mlx_server.checkpoint.gguf import GGUF
from mlx_server.errors import ModelLoadError
from mlx_server.models.gguf_blocks import FLOAT_TYPES, GROUP_SIZE, QUANTIZED_TYPES, read_floats, read_matrix
from mlx_server.models.quantize import Quantization, QuantizationPlan

log = logging.getLogger(__name__)

_LAYERS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Architecture -> its names
_NAMES = {
    "llama": _LAYERS,
    "qwen2": _LAYERS,
    "qwen3": _LAYERS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    "gemma3": _LAYERS
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
# The RoPE factors of Llama 3.1, which the configuration has as parameters
_NO_WEIGHTS = "rope_freqs.weight"


def load_gguf_tensors(header: GGUF, head_dim: int) -> tuple[dict[str, mx.array], QuantizationPlan]:
    """A GGUF file's tensors under the names of an MLX checkpoint, and how they are quantized.

    ModelLoadError names a tensor that is unknown, of a type that is not supported, or not what its type says.
    """
    arch = header.require("general.architecture", str)
    tensors: dict[str, mx.array] = {}
    plan: dict[str, Quantization | None] = {}
    for name in header.tensors:
        _check_type(header, name)  # before any is read, which takes a while
    for name, info in header.tensors.items():
        if name == _NO_WEIGHTS:
            continue
        layer, kind = _layer_name(header, arch, name), name.rpartition(".")[2]
        parts = _read(header, name)
        if arch == "gemma3" and layer.endswith("norm"):
            parts[""] = parts[""].astype(mx.float32) - 1  # the file has the weights that the model computes with
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            rows = _half_split_rows(info.shape[0], head_dim, f"{header.path}: tensor {name}")
            parts = {suffix: part[rows] for suffix, part in parts.items()}
        if info.type in QUANTIZED_TYPES:
            plan[layer] = Quantization(group_size=GROUP_SIZE, bits=QUANTIZED_TYPES[info.type].bits)
        tensors |= {f"{layer}.{suffix or kind}": part for suffix, part in parts.items()}
    _warn_if_inexact(header)
    return tensors, QuantizationPlan(None, plan)


def _check_type(header: GGUF, name: str) -> None:
    info, where = header.tensors[name], f"{header.path}: tensor {name}"
    if info.type not in FLOAT_TYPES and info.type not in QUANTIZED_TYPES:
        known = ", ".join((*FLOAT_TYPES, *QUANTIZED_TYPES))
        raise ModelLoadError(
            f"{where} has type {info.type}, not supported (supported: {known}); take a file named Q4_K_M or Q8_0"
        )
    if info.type in QUANTIZED_TYPES and not (len(info.shape) == 2 and name.endswith(".weight")):
        raise ModelLoadError(f"{where} {info.shape} has type {info.type}, but only matrices may be quantized")


def _read(header: GGUF, name: str) -> dict[str, mx.array]:
    """The arrays of a tensor: itself under "", and the "scales" and "biases" of a quantized one."""
    info, where = header.tensors[name], f"{header.path}: tensor {name}"
    try:
        with header.path.open("rb") as file:
            if info.type in FLOAT_TYPES:
                return {"": read_floats(file, info)}
            weight, scales, biases = read_matrix(file, info)
    except EOFError as error:
        raise ModelLoadError(f"{where} became shorter while it was read") from error
    except ValueError as error:
        raise ModelLoadError(f"{where} is corrupt: {error}") from error
    except OSError as error:
        raise ModelLoadError(f"{where} can't be read: {error.strerror}") from error
    # float32 holds the scales of all types exactly; a GPU computes in half precision, with such scales too.
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.float16
    return {"": weight, "scales": scales.astype(dtype), "biases": biases.astype(dtype)}


def _warn_if_inexact(header: GGUF) -> None:
    for kind, how in QUANTIZED_TYPES.items():
        count = sum(info.type == kind for info in header.tensors.values())
        if count and not how.is_exact:
            log.warning(
                "%s: MLX has no form for %s; %d tensors of this type are held with %d bits in groups of %d, "
                "each weight rounded by at most half of 1/255 of its group's range",
                header.path,
                kind,
                count,
                how.bits,
                GROUP_SIZE,
            )


def _layer_name(header: GGUF, arch: str, tensor_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj"""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.\w+", tensor_name)
    if match is None or match[2] not in _NAMES[arch]:
        raise ModelLoadError(f"{header.path}: tensor {tensor_name} is no part of a {arch} model")
    layer = _NAMES[arch][match[2]]
    return layer if match[1] is None else f"model.layers.{match[1]}.{layer}"


def _half_split_rows(num_rows: int, head_dim: int, where: str) -> mx.array:
    """Indices that undo GGUF's order of q and k rows: features that RoPE turns together stand side by side in the file,
    half a head apart in the model."""
    if head_dim <= 0 or head_dim % 2 or num_rows % head_dim:
        raise ModelLoadError(f"{where} has {num_rows} rows, which are no heads of size {head_dim}")
    return mx.array(np.arange(num_rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel())
