"""Models from small GGUF files, written here from llama.cpp's description of its formats."""

from typing import Any

import numpy as np
import pytest

from gguf_writer import Q, write_gguf
from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model
from models.checkpoints import CONFIG, random_weights
from models.dense_kv import prompt_logits
from reference.llama import llama_logits

Array = np.ndarray[Any, np.dtype[Any]]

METADATA = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 512,
    "llama.rope.freq_base": 10000.0,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOKEN_IDS = np.random.default_rng(0).integers(0, 64, 20).tolist()


def q8_0(matrix: Array) -> tuple[Q, Array]:
    """Blocks of a float16 scale and 32 int8; and what they stand for."""
    blocks = matrix.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    values = np.clip(np.round(blocks / scale), -127, 127).astype(np.int8)
    data = np.concatenate([scale.view(np.uint8), values.view(np.uint8)], axis=1).tobytes()
    return Q(matrix.shape, 8, data), (values * scale.astype(np.float32)).reshape(matrix.shape)


def q4_0(matrix: Array) -> tuple[Q, Array]:
    """Blocks of a float16 scale and 32 values of 4 bits, less 8: the first 16 in the low halves of 16 bytes."""
    blocks = matrix.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 7).astype(np.float16)
    values = np.clip(np.round(blocks / scale) + 8, 0, 15).astype(np.uint8)
    packed = values[:, :16] | values[:, 16:] << 4
    data = np.concatenate([scale.view(np.uint8), packed], axis=1).tobytes()
    return Q(matrix.shape, 2, data), ((values - 8.0) * scale.astype(np.float32)).reshape(matrix.shape)


def q4_1(matrix: Array) -> tuple[Q, Array]:
    """As q4_0, with a float16 minimum after the scale instead of the 8."""
    blocks = matrix.reshape(-1, 32)
    minimum = blocks.min(1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(1, keepdims=True) - minimum) / 15).astype(np.float16)
    values = np.clip(np.round((blocks - minimum) / scale), 0, 15).astype(np.uint8)
    packed = values[:, :16] | values[:, 16:] << 4
    data = np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), packed], axis=1).tobytes()
    return Q(matrix.shape, 3, data), (values * scale.astype(np.float32) + minimum).reshape(matrix.shape)


def f16(matrix: Array) -> tuple[Array, Array]:
    return matrix.astype(np.float16), matrix.astype(np.float16)


def f32(matrix: Array) -> tuple[Array, Array]:
    return matrix, matrix


def gguf_name(name: str) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    layer, _, kind = name.rpartition(".")
    if layer.startswith("model.layers."):
        _, _, index, layer = layer.split(".", 3)
        return f"blk.{index}.{NAMES[layer]}.{kind}"
    return f"{NAMES[layer]}.{kind}"


def interleave(rows: Array, num_heads: int) -> Array:
    """As llama.cpp's conversion script does with q and k: the halves of each head's rows, alternating."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def convert(config, encode) -> tuple[dict[str, Any], dict[str, Array]]:
    """Random weights as the tensors of a GGUF file, and the values that these stand for under transformers' names."""
    tensors, values = {}, {}
    for name, weight in random_weights(config).items():
        matrix = np.array(weight)
        num_heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if num_heads is not None:
            matrix = interleave(matrix, num_heads)
        tensor, value = encode(matrix) if matrix.ndim == 2 else f32(matrix)
        if num_heads is not None:
            value = value.reshape(num_heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        tensors[gguf_name(name)], values[name] = tensor, value
    return tensors, values


@pytest.mark.parametrize("encode", [f32, f16, q8_0, q4_0, q4_1])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_agrees_with_the_numpy_model(encode, changes, tmp_path):
    config = CONFIG | changes
    tensors, values = convert(config, encode)
    (tmp_path / "model.gguf").write_bytes(write_gguf(METADATA, tensors))
    logits = prompt_logits(load_model(str(tmp_path / "model.gguf")), TOKEN_IDS)
    np.testing.assert_allclose(logits, llama_logits(config, values, TOKEN_IDS), 0, 1e-4)


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    encoders = iter([q8_0, q4_1, f16, q4_0] * 10)

    def encode(matrix):
        return next(encoders)(matrix)

    tensors, values = convert(CONFIG, encode)
    (tmp_path / "model.gguf").write_bytes(write_gguf(METADATA, tensors))
    logits = prompt_logits(load_model(str(tmp_path / "model.gguf")), TOKEN_IDS)
    np.testing.assert_allclose(logits, llama_logits(CONFIG, values, TOKEN_IDS), 0, 1e-4)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"blk.1.ffn_up.weight": Q((128, 64), 30, bytes(128 * 128))},
            r"blk.1.ffn_up.weight has type BF16, not supported",
        ),
        ({"blk.1.ffn_up.weight": None}, r"tensor model.layers.1.mlp.up_proj.weight is missing"),
        ({"blk.1.surprise.weight": np.zeros(3, np.float32)}, r"tensor blk.1.surprise.weight is no part"),
        ({"blk.2.attn_norm.weight": np.zeros(64, np.float32)}, r"model.layers.2.input_layernorm.weight .* is no part"),
        ({"blk.1.attn_q.weight": np.zeros((60, 64), np.float32)}, r"blk.1.attn_q.weight has 60 rows"),
        ({"blk.1.attn_k.weight": np.zeros((64, 64), np.float32)}, r"k_proj.weight has shape \(64, 64\), .* \(32, 64\)"),
        (
            {"blk.1.ffn_up.weight": Q((128,), 8, bytes(4 * 34))},
            r"up_proj.weight has shape \(.*\), .* asks for \(128, 16\)",
        ),
    ],
    ids=range(7),
)
def test_tensors_that_do_not_fit_are_named(changes, fault, tmp_path):
    tensors = {name: value for name, value in (convert(CONFIG, f32)[0] | changes).items() if value is not None}
    path = tmp_path / "model.gguf"
    path.write_bytes(write_gguf(METADATA, tensors))
    with pytest.raises(ModelLoadError, match=fault) as error:
        load_model(str(path))
    assert str(path) in error.value.message


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(write_gguf(METADATA, convert(CONFIG, q8_0)[0])[:-1000])
    with pytest.raises(ModelLoadError, match=str(path)):
        load_model(str(path))
