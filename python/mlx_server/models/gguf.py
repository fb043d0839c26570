"""Tensors of GGUF files of the llama architecture, as an MLX checkpoint would hold them.

MLX's affine form holds Q4_0, Q4_1 (4 bits) and Q8_0 (8 bits) exactly, in groups of 32 with float16 scales.
Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

import re
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_server.checkpoint.gguf import GGUF
from mlx_server.errors import ModelLoadError
from mlx_server.models.quantize import Quantization, QuantizationPlan

_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_TYPES = (*_BITS, "F16", "F32")  # all that `mx.load` reads without loss

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
# The RoPE factors of Llama 3.1, which the configuration has as parameters
_NO_WEIGHTS = "rope_freqs.weight"


def load_gguf_tensors(header: GGUF, head_dim: int) -> tuple[dict[str, mx.array], QuantizationPlan]:
    """A GGUF file's tensors under the names of an MLX checkpoint, and how they are quantized.

    ModelLoadError names a tensor that is unknown or of a type that is not supported.
    """
    plan: dict[str, Quantization | None] = {}
    for name, info in header.tensors.items():
        if info.type not in _TYPES:
            raise ModelLoadError(
                f"{header.path}: tensor {name} has type {info.type}, not supported (supported: {', '.join(_TYPES)})"
            )
        if info.type in _BITS:
            plan[_layer_name(header, name)] = Quantization(group_size=32, bits=_BITS[info.type])

    source = cast("dict[str, mx.array]", mx.load(str(header.path), format="gguf"))
    source.pop(_NO_WEIGHTS, None)
    tensors: dict[str, mx.array] = {}
    for name in list(source):
        tensor = source.pop(name)
        if ".attn_q." in name or ".attn_k." in name:
            tensor = tensor[_half_split_rows(tensor.shape[0], head_dim, f"{header.path}: tensor {name}")]
        tensors[f"{_layer_name(header, name)}.{name.rpartition('.')[2]}"] = tensor
    return tensors, QuantizationPlan(None, plan)


def _layer_name(header: GGUF, tensor_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj"""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.\w+", tensor_name)
    if match is None or match[2] not in _LAYERS:
        raise ModelLoadError(f"{header.path}: tensor {tensor_name} is no part of a llama model")
    layer = _LAYERS[match[2]]
    return layer if match[1] is None else f"model.layers.{match[1]}.{layer}"


def _half_split_rows(num_rows: int, head_dim: int, where: str) -> mx.array:
    """Indices that undo GGUF's order of q and k rows: features that RoPE turns together stand side by side in the file,
    half a head apart in the model."""
    if head_dim <= 0 or head_dim % 2 or num_rows % head_dim:
        raise ModelLoadError(f"{where} has {num_rows} rows, which are no heads of size {head_dim}")
    return mx.array(np.arange(num_rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).ravel())
