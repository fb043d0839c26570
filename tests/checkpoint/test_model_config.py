import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_writer import write_gguf
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.json_file import read_json
from mlx_server.checkpoint.model_config import GenerationDefaults, config_from_gguf, generation_defaults, load_config
from mlx_server.errors import ModelLoadError

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 131072,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 0.5,
    "llama.rope.dimension_count": 64,
    "llama.rope.freq_base": 500000.0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 7,
    "tokenizer.ggml.eom_token_id": 8,
}
EMBEDDING = np.zeros((10, 256), np.float16)


def gguf_file(path: Path, changes: dict[str, Any], **tensors: np.ndarray) -> Path:
    """A GGUF file; a change to None removes the key."""
    metadata = {key: value for key, value in (METADATA | changes).items() if value is not None}
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    path.write_bytes(write_gguf(metadata, {"token_embd.weight": EMBEDDING} | named))
    return path


def test_config_of_a_gguf_file(tmp_path):
    path = gguf_file(tmp_path / "model.gguf", {})
    assert load_config(path) == {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 10,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 0.5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 7, 8],
    }
    assert generation_defaults(path) == GenerationDefaults(end_token_ids=(2, 7, 8))


def test_what_a_gguf_file_may_leave_out(tmp_path):
    changes = dict.fromkeys(("llama.attention.head_count_kv", "llama.rope.dimension_count", "llama.rope.freq_base"))
    config = load_config(gguf_file(tmp_path / "model.gguf", changes))
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (4, 64, 10000.0)


def test_tensors_tell_of_biases_and_an_output_layer(tmp_path):
    bias = np.zeros(256, np.float32)
    tensors = {"output__weight": EMBEDDING, "blk__0__attn_q__bias": bias, "blk__0__ffn_gate__bias": bias}
    config = load_config(gguf_file(tmp_path / "model.gguf", {}, **tensors))
    assert (config["tie_word_embeddings"], config["attention_bias"], config["mlp_bias"]) == (False, True, True)


def test_linear_rope_scaling(tmp_path):
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = load_config(gguf_file(tmp_path / "model.gguf", changes))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def llama3_factors(factor: float, theta: float = 500000.0, head_dim: int = 64) -> np.ndarray:
    """What llama.cpp's conversion writes for Llama 3.1's rope_scaling."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_follows_from_its_factors(tmp_path, factor):
    config = load_config(gguf_file(tmp_path / "model.gguf", {}, rope_freqs__weight=llama3_factors(factor)))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("factors", "fault"),
    [
        (np.full(32, 3, np.float32), "are not those of Llama 3.1"),
        (np.full(32, np.nan, np.float32), "are not those of Llama 3.1"),
        (np.zeros(32, np.float32), "are not those of Llama 3.1"),
        (np.ones(16, np.float32), "must be F32 with 32 values"),
        (np.ones(32, np.float16), "must be F32 with 32 values"),
    ],
)
def test_refuses_other_rope_factors(tmp_path, factors, fault):
    with pytest.raises(ModelLoadError, match=fault):
        load_config(gguf_file(tmp_path / "model.gguf", {}, rope_freqs__weight=factors))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported in GGUF files (supported: gemma3, llama, qwen2, qwen3)",
        ),
        ({"general.architecture": None}, "general.architecture is missing"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": "2"}, "llama.block_count must be int but is str"),
        ({"llama.rope.freq_base": -5.0}, "rope.freq_base is -5.0"),
        ({"llama.rope.freq_base": math.inf}, "rope.freq_base is inf"),
        ({"split.count": 3}, "is one of 3 parts"),
        ({"llama.expert_count": 8}, "mixture-of-experts models"),
        ({"llama.rope.dimension_count": 32}, "RoPE over a part of the head"),
        ({"llama.attention.head_count": 0, "llama.rope.dimension_count": None}, "attention.head_count is 0"),
    ],
)
def test_refuses_gguf_metadata(tmp_path, changes, fault):
    path = gguf_file(tmp_path / "model.gguf", changes)
    with pytest.raises(ModelLoadError) as caught:
        config_from_gguf(read_gguf(path))
    assert fault in caught.value.message and "model.gguf" in caught.value.message


def test_refuses_a_gguf_file_without_embedding(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(write_gguf(METADATA, {}))
    with pytest.raises(ModelLoadError, match=r"'token_embd\.weight' is missing"):
        load_config(path)


# --- Directories ---


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def test_generation_defaults(tmp_path):
    write(tmp_path / "config.json", {"eos_token_id": 2})
    assert generation_defaults(tmp_path) == GenerationDefaults(end_token_ids=(2,))
    advice = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05}
    write(tmp_path / "generation_config.json", {"eos_token_id": [5, 2], "do_sample": True, **advice})
    assert generation_defaults(tmp_path) == GenerationDefaults((2, 5), 0.6, 0.95, 20, 0, 1.05)
    write(tmp_path / "generation_config.json", {"top_k": -1, "top_p": None})
    assert generation_defaults(tmp_path) == GenerationDefaults((2,), top_k=0)
    write(tmp_path / "generation_config.json", {"do_sample": False, **advice})
    assert generation_defaults(tmp_path) == GenerationDefaults((2,))


@pytest.mark.parametrize(
    ("advice", "fault"),
    [
        ({"temperature": "hot"}, "temperature must be a number from 0 to 100 but is 'hot'"),
        ({"temperature": math.nan}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p must be a number from 0 to 1 but is 1.5"),
        ({"top_k": -2}, "top_k must be"),
        ({"min_p": True}, "min_p must be"),
        ({"repetition_penalty": -1}, "repetition_penalty must be"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be a token id or a list"),
    ],
)
def test_refuses_generation_defaults(tmp_path, advice, fault):
    write(tmp_path / "config.json", {})
    write(tmp_path / "generation_config.json", advice)
    with pytest.raises(ModelLoadError) as caught:
        generation_defaults(tmp_path)
    assert fault in caught.value.message and "generation_config.json" in caught.value.message


def test_no_code_of_a_model_is_run(tmp_path):
    write(tmp_path / "config.json", {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}})
    assert load_config(tmp_path)["model_type"] == "llama"
    write(tmp_path / "config.json", {"model_type": "llama", "model_file": "model.py"})
    with pytest.raises(ModelLoadError, match="models that bring their own code are not run"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is missing; is"),
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": 1} x', "is not valid JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"null", "must hold a JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a":' * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested more than 32 deep"),
        (b"[1]", "must hold a JSON object"),
        (b'{"a": "' + b"x" * (16 << 20) + b'"}', "larger than 16 MB"),
    ],
)
def test_refuses_json(tmp_path, content, fault):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        read_json(path)
    assert fault in caught.value.message and "config.json" in caught.value.message


def test_json_with_infinity_is_read(tmp_path):
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json") == {"time_step_limit": [0.0, math.inf]}
