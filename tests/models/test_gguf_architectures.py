"""GGUF files of every architecture, written here from the weights of parity/: they compute what transformers does."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from gguf_writer import Q, write_gguf
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.model_config import config_from_gguf
from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model
from models.checkpoints import save
from models.dense_kv import prompt_logits
from models.gguf_names import GEMMA3, LLAMA, QWEN3, gguf_name, interleave
from models.transformers_model import save_random
from reference.gguf_blocks import TYPES, dequantize, random_blocks

PARITY = Path(__file__).parent / "parity"
# fixture -> its architecture in GGUF, where a Mistral without a window is a Llama; names of tensors
FIXTURES = {
    "llama_bias": ("llama", LLAMA),
    "mistral": ("llama", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", QWEN3),
    "qwen3_yarn": ("qwen3", QWEN3),
    "gemma3_text": ("gemma3", GEMMA3),
}


def metadata(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": config.get("sliding_window"),
        "attention.sliding_window_pattern": config.get("sliding_window_pattern"),
        "context_length": config["max_position_embeddings"],
        "rope.freq_base": config["rope_theta"],
        "rope.freq_base_swa": config.get("rope_local_base_freq"),
    }
    if scaling := config["rope_scaling"]:
        fields["rope.scaling.type"] = scaling["rope_type"]
        fields["rope.scaling.factor"] = scaling["factor"]
        fields["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    named = {f"{arch}.{key}": value for key, value in fields.items() if value is not None}
    return {"general.architecture": arch, **named}


def tensors(arch: str, names: dict[str, str], config: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    result = {}
    for name, weight in mx.load(str(path)).items():
        value = np.array(weight)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            value = interleave(value, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if arch == "gemma3" and "norm" in name:
            value = value + 1
        result[gguf_name(name, names)] = value
    return result


def write(name: str, path: Path, changes: dict[str, Any]) -> None:
    arch, names = FIXTURES[name]
    config = json.loads((PARITY / name / "config.json").read_text())
    fields = metadata(arch, config) | {f"{arch}.{key}": value for key, value in changes.items()}
    fields = {key: value for key, value in fields.items() if value is not None}
    path.write_bytes(write_gguf(fields, tensors(arch, names, config, PARITY / name / "model.safetensors")))


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_those_of_the_safetensors_form(name, tmp_path):
    write(name, tmp_path / "model.gguf", {})
    fixture = np.load(PARITY / name / "fixture.npz")
    logits = prompt_logits(load_model(str(tmp_path / "model.gguf")), fixture["prompt"].tolist())
    np.testing.assert_allclose(logits, fixture["logits"], 0, 1e-4)


WIDE = {
    "hidden_size": 256,  # a super-block
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 64,
    "tie_word_embeddings": True,
}
FLOATS = {"F32": (0, mx.float32), "F16": (1, mx.float16), "BF16": (30, mx.bfloat16)}


def encode(kind: str, shape: tuple[int, int], seed: int) -> tuple[Q, np.ndarray[Any, Any]]:
    """A random matrix of a type, as it is in a file and as float32."""
    if kind in FLOATS:
        number, dtype = FLOATS[kind]
        matrix = (0.05 * mx.random.normal(shape, key=mx.random.key(seed))).astype(dtype)
        return Q(shape, number, bytes(np.array(matrix.view(mx.uint8)))), np.array(matrix.astype(mx.float32))
    number, num_weights, *_ = TYPES[kind]
    blocks = random_blocks(kind, math.prod(shape) // num_weights, seed, 1e-4 if kind.endswith("K") else 0.01)
    return Q(shape, number, blocks.tobytes()), dequantize(kind, blocks).reshape(shape)


@pytest.mark.parametrize("kinds", [[*FLOATS, *(kind for kind in TYPES if kind != "Q6_K")], ["Q6_K"]], ids=len)
@pytest.mark.parametrize(("arch", "model_type"), [("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3", "gemma3_text")])
def test_every_type_of_tensor(arch, model_type, kinds, tmp_path):
    config = WIDE | {"model_type": model_type}
    save_random(tmp_path, config)
    weights = {name: np.array(weight) for name, weight in mx.load(str(tmp_path / "model.safetensors")).items()}
    names = {"qwen2": LLAMA, "qwen3": QWEN3, "gemma3": GEMMA3}[arch]
    stored: dict[str, Any] = {}
    in_turn = itertools.cycle(kinds)
    for i, (name, weight) in enumerate(weights.items()):
        tensor, weights[name] = encode(next(in_turn), weight.shape, i) if weight.ndim == 2 else (weight, weight)
        stored[gguf_name(name, names)] = tensor + 1 if arch == "gemma3" and "norm" in name else tensor
    types = {tensor.type_number for tensor in stored.values() if isinstance(tensor, Q)}
    assert len(types) == len(kinds)
    (tmp_path / "model.gguf").write_bytes(write_gguf(metadata(arch, config), stored))
    expected = prompt_logits(
        load_model(save(tmp_path, config, {name: mx.array(weight) for name, weight in weights.items()})), range(40)
    )
    logits = prompt_logits(load_model(str(tmp_path / "model.gguf")), range(40))
    if kinds == ["Q6_K"]:
        assert np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)
    else:
        np.testing.assert_allclose(logits, expected, 0, 1e-4)


def gemma3_config(path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    write("gemma3_text", path, changes)
    return config_from_gguf(read_gguf(path))


def test_gemma3_fields_that_files_leave_out_are_those_of_googles_models(tmp_path):
    missing = {"attention.sliding_window_pattern": None, "rope.freq_base_swa": None}
    config = gemma3_config(tmp_path / "model.gguf", missing)
    assert config["sliding_window_pattern"] == 6
    assert config["rope_local_base_freq"] == 10000.0
    assert config["query_pre_attn_scalar"] == 32  # the head's size


def test_gemma3_27b_scales_queries_by_the_features_of_a_head(tmp_path):
    config = gemma3_config(tmp_path / "model.gguf", {"block_count": 62})
    assert config["query_pre_attn_scalar"] == 16


def test_gemma3_without_a_window_sees_all_tokens_in_every_layer(tmp_path):
    write("gemma3_text", tmp_path / "model.gguf", {"attention.sliding_window": None})
    model = load_model(str(tmp_path / "model.gguf"))
    assert [layer.self_attn.window for layer in model.layers] == [None] * 4


def test_soft_caps_are_refused(tmp_path):
    write("gemma3_text", tmp_path / "model.gguf", {"final_logit_softcapping": 30.0})
    with pytest.raises(ModelLoadError, match="final_logit_softcapping"):
        load_model(str(tmp_path / "model.gguf"))


def test_tensors_of_other_architectures_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    arch, _ = FIXTURES["qwen2"]
    config = json.loads((PARITY / "qwen2" / "config.json").read_text())
    weights = tensors(arch, LLAMA, config, PARITY / "qwen2" / "model.safetensors")
    weights["blk.0.attn_q_norm.weight"] = np.ones(16, np.float32)
    path.write_bytes(write_gguf(metadata(arch, config), weights))
    with pytest.raises(ModelLoadError, match=r"tensor blk.0.attn_q_norm.weight is no part of a qwen2 model"):
        load_model(str(path))
