"""Models from small GGUF files, written here from llama.cpp's description of its formats."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from gguf_writer import Q, write_gguf
from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model
from models.checkpoints import CONFIG, LLAMA3_SCALING, random_weights
from models.dense_kv import prompt_logits
from models.gguf_names import LLAMA, gguf_name, interleave
from reference.gguf_blocks import TYPES, dequantize, random_blocks
from reference.llama import llama_logits, rope_inverse_freqs

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


def random(kind: str, magnitude: float) -> Callable[[Array], tuple[Q, Array]]:
    """Random blocks in the place of a matrix; and what they stand for."""

    def encode(matrix: Array) -> tuple[Q, Array]:
        blocks = random_blocks(kind, matrix.size // TYPES[kind][1], matrix.size, magnitude)
        return Q(matrix.shape, TYPES[kind][0], blocks.tobytes()), dequantize(kind, blocks).reshape(matrix.shape)

    return encode


def bf16(matrix: Array) -> tuple[Q, Array]:
    """The upper halves of float32 numbers."""
    bits = matrix.view(np.uint32) >> 16
    return Q(matrix.shape, 30, bits.astype(np.uint16).tobytes()), (bits << 16).view(np.float32)


def f16(matrix: Array) -> tuple[Array, Array]:
    return matrix.astype(np.float16), matrix.astype(np.float16)


def f32(matrix: Array) -> tuple[Array, Array]:
    return matrix, matrix


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
        tensors[gguf_name(name, LLAMA)], values[name] = tensor, value
    return tensors, values


@pytest.mark.parametrize("encode", [f32, f16, bf16, q8_0, q4_0, q4_1, random("Q5_0", 0.02), random("Q5_1", 0.02)])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_agrees_with_the_numpy_model(encode, changes, tmp_path):
    config = CONFIG | changes
    tensors, values = convert(config, encode)
    (tmp_path / "model.gguf").write_bytes(write_gguf(METADATA, tensors))
    logits = prompt_logits(load_model(str(tmp_path / "model.gguf")), TOKEN_IDS)
    np.testing.assert_allclose(logits, llama_logits(config, values, TOKEN_IDS), 0, 1e-4)


def test_rope_is_scaled_as_in_llama_3_1(tmp_path):
    config = CONFIG | {"rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 8192}, "rope_theta": 5e5}
    factors = [1 / (inverse * 5e5 ** (i / 8)) for i, inverse in enumerate(rope_inverse_freqs(config, 16))]
    tensors, values = convert(config, f32)
    tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    (tmp_path / "model.gguf").write_bytes(write_gguf(METADATA | {"llama.rope.freq_base": 5e5}, tensors))
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


def test_a_mix_of_types_with_super_blocks(tmp_path, caplog):
    """As in files named Q4_K_M: norms in F32, some matrices in Q6_K, also the embedding, which is the head too."""
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 512}
    metadata = METADATA | {"llama.embedding_length": 256, "llama.feed_forward_length": 512}

    def encode(matrix: Array) -> tuple[Q, Array]:
        kind = "Q6_K" if len(matrix) in (64, 128) else "Q5_K" if len(matrix) == 512 else "Q4_K"
        return random(kind, 1e-4)(matrix)

    tensors, values = convert(config, encode)
    (tmp_path / "model.gguf").write_bytes(write_gguf(metadata, tensors))
    logits = prompt_logits(load_model(str(tmp_path / "model.gguf")), TOKEN_IDS)
    expected = llama_logits(config, values, TOKEN_IDS)
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()
    [warning] = [record.getMessage() for record in caplog.records]
    assert "MLX has no form for Q6_K; 5 tensors of this type are held with 8 bits in groups of 32" in warning


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"blk.1.ffn_up.weight": Q((128, 64), 20, bytes(128 * 36))},
            r"blk.1.ffn_up.weight has type IQ4_NL, not supported \(supported: F32, F16, BF16, Q4_0",
        ),
        ({"blk.1.ffn_up.weight": None}, r"tensor model.layers.1.mlp.up_proj.weight is missing"),
        ({"blk.1.surprise.weight": np.zeros(3, np.float32)}, r"tensor blk.1.surprise.weight is no part"),
        ({"blk.2.attn_norm.weight": np.zeros(64, np.float32)}, r"model.layers.2.input_layernorm.weight .* is no part"),
        ({"blk.1.attn_q.weight": np.zeros((60, 64), np.float32)}, r"blk.1.attn_q.weight has 60 rows"),
        ({"blk.1.attn_k.weight": np.zeros((64, 64), np.float32)}, r"k_proj.weight has shape \(64, 64\), .* \(32, 64\)"),
        (
            {"blk.1.ffn_up.weight": Q((128,), 8, bytes(4 * 34))},
            r"blk.1.ffn_up.weight \(128,\) has type Q8_0, but only matrices",
        ),
        (
            {"blk.1.ffn_up.weight": Q((128, 64), 12, bytes(32 * 144))},
            "'blk.1.ffn_up.weight' has rows of 64 .* Q4_K's 256",
        ),
        ({"blk.1.ffn_up.weight": Q((128, 64), 2, b"\xff" * 256 * 18)}, "blk.1.ffn_up.weight is corrupt: a scale"),
        ({"blk.1.attn_norm.weight": Q((64,), 8, bytes(68))}, "blk.1.attn_norm.weight .* only matrices"),
        ({"blk.1.attn_q.bias": Q((64,), 8, bytes(68))}, "blk.1.attn_q.bias .* only matrices"),
    ],
    ids=range(11),
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


@pytest.mark.parametrize(("encode", "dtype"), [(q8_0, mx.float16), (bf16, mx.bfloat16), (f32, mx.float32)])
def test_dtype_of_activations_on_a_gpu(encode, dtype, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(write_gguf(METADATA, convert(CONFIG, encode)[0]))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert load_model(str(path)).kv_spec.dtype == dtype
