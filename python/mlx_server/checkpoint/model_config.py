"""A model's own description of itself: `config.json` and `generation_config.json`, or the metadata of a GGUF file."""

import math
import struct
from pathlib import Path

import msgspec

from mlx_server.checkpoint.gguf import GGUF, read_gguf
from mlx_server.checkpoint.json_file import JsonObject, read_json, read_optional_json
from mlx_server.errors import ModelLoadError

# Each has a file in models/.
MODEL_TYPES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_next")
# GGUF's general.architecture -> model_type
GGUF_ARCHITECTURES = {"gemma3": "gemma3_text", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# What Meta trained every Llama 3.1, 3.2 and 3.3 with; GGUF keeps only the factors that follow from it.
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_CONTEXT = 1.0, 4.0, 8192


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What the model's authors recommend; None where they say nothing."""

    end_token_ids: tuple[int, ...] = ()  # of the configs; `Tokenizer.end_token_ids` has the tokenizer's too
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def load_config(path: Path) -> JsonObject:
    """The config of a model directory or a GGUF file, in the form of a Hugging Face `config.json`.

    It is data: nothing that it names is imported. `auto_map`, which names Python files for transformers, is ignored;
    `model_file`, which tells MLX loaders to run one, means that the model needs it, and is refused.
    """
    if is_gguf(path):
        return config_from_gguf(read_gguf(path))
    config = read_json(path / "config.json")
    if "model_file" in config:
        raise ModelLoadError(f"{path / 'config.json'} has `model_file`: models that bring their own code are not run")
    return config


def check_model_type(config: JsonObject, source: str) -> str:
    """The `model_type` of a config.json; ModelLoadError, beginning with `source`, if it is none that is supported."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return model_type
    fault = f"{source}: model_type {model_type!r} is not supported (supported: {', '.join(MODEL_TYPES)})"
    if isinstance(text_config := config.get("text_config"), dict):
        fault += "; it is no model of text alone: look for a conversion of its text part"
        if (text_type := text_config.get("model_type")) in MODEL_TYPES:
            fault += f" to {text_type}"
    raise ModelLoadError(fault)


def generation_defaults(path: Path) -> GenerationDefaults:
    """End tokens and sampling defaults of a model directory or a GGUF file."""
    config = load_config(path)
    if is_gguf(path):
        return GenerationDefaults(end_token_ids=_token_ids(path, config.get("eos_token_id")))
    config_path, generation_path = path / "config.json", path / "generation_config.json"
    generation = read_optional_json(generation_path)
    end_token_ids = {
        *_token_ids(config_path, config.get("eos_token_id")),
        *_token_ids(generation_path, generation.get("eos_token_id")),
    }
    if generation.get("do_sample") is False:
        return GenerationDefaults(tuple(sorted(end_token_ids)))  # greedy decoding is no advice on sampling
    top_k = _number(generation_path, generation, "top_k", -1, 1 << 31)
    return GenerationDefaults(
        end_token_ids=tuple(sorted(end_token_ids)),
        temperature=_number(generation_path, generation, "temperature", 0, 100),
        top_p=_number(generation_path, generation, "top_p", 0, 1) or None,
        top_k=None if top_k is None else max(int(top_k), 0),  # some write -1 for all
        min_p=_number(generation_path, generation, "min_p", 0, 1),
        repetition_penalty=_number(generation_path, generation, "repetition_penalty", 0, 100) or None,
    )


def config_from_gguf(gguf: GGUF) -> JsonObject:
    """A GGUF file's metadata under the names of a Hugging Face `config.json`. ModelLoadError if it lacks one."""
    arch = gguf.require("general.architecture", str)
    if arch not in GGUF_ARCHITECTURES:
        known, others = ", ".join(sorted(GGUF_ARCHITECTURES)), ", ".join(MODEL_TYPES)
        raise ModelLoadError(
            f"{gguf.path}: architecture {arch!r} is not supported in GGUF files (supported: {known}); "
            f"in MLX's safetensors these are: {others}"
        )
    if (num_parts := gguf.get("split.count", int) or 1) > 1:
        raise ModelLoadError(f"{gguf.path} is one of {num_parts} parts; join them with `llama-gguf-split --merge`")
    if gguf.get(f"{arch}.expert_count", int):
        raise ModelLoadError(f"{gguf.path}: mixture-of-experts models of architecture {arch!r} are not supported")
    hidden_size = gguf.require(f"{arch}.embedding_length", int)
    num_heads = gguf.require(f"{arch}.attention.head_count", int)
    if num_heads < 1:
        raise ModelLoadError(f"{gguf.path}: metadata {arch}.attention.head_count is {num_heads}")
    head_dim = gguf.get(f"{arch}.attention.key_length", int) or hidden_size // num_heads
    if (gguf.get(f"{arch}.rope.dimension_count", int) or head_dim) != head_dim:
        raise ModelLoadError(f"{gguf.path}: RoPE over a part of the head is not supported for architecture {arch!r}")
    if "token_embd.weight" not in gguf.tensors:
        raise ModelLoadError(f"{gguf.path}: tensor 'token_embd.weight' is missing")
    rope_theta = gguf.get(f"{arch}.rope.freq_base", float) or 10000.0
    if not 1 <= rope_theta < math.inf:
        raise ModelLoadError(f"{gguf.path}: metadata {arch}.rope.freq_base is {rope_theta}")
    config: JsonObject = {
        "model_type": GGUF_ARCHITECTURES[arch],
        "hidden_size": hidden_size,
        "intermediate_size": gguf.require(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": gguf.require(f"{arch}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.get(f"{arch}.attention.head_count_kv", int) or num_heads,
        "head_dim": head_dim,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": gguf.require(f"{arch}.context_length", int),
        "rms_norm_eps": gguf.require(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(gguf, arch, rope_theta, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": gguf_end_token_ids(gguf),
        **(_gemma3_fields(gguf, hidden_size // num_heads, head_dim) if arch == "gemma3" else {}),
    }
    return {key: value for key, value in config.items() if value is not None}


def gguf_end_token_ids(gguf: GGUF) -> list[int]:
    """Ids at which generation ends."""
    names = ("eos", "eot", "eom")  # end of sequence, of turn, of message
    ids = (gguf.get(f"tokenizer.ggml.{name}_token_id", int) for name in names)
    return sorted({token_id for token_id in ids if token_id is not None})


def _gemma3_fields(gguf: GGUF, features_per_head: int, head_dim: int) -> JsonObject:
    """What only Gemma 3 has. Where the file says nothing, llama.cpp's loader does: the values of Google's models."""
    window = gguf.get("gemma3.attention.sliding_window", int) or None
    pattern = gguf.get("gemma3.attention.sliding_window_pattern", int) or 6
    is_27b = gguf.require("gemma3.block_count", int) == 62
    return {
        "sliding_window": window,
        "sliding_window_pattern": 1 if window is None else pattern,  # 1: every layer sees all tokens
        "rope_local_base_freq": gguf.get("gemma3.rope.freq_base_swa", float) or 10000.0,
        "query_pre_attn_scalar": features_per_head if is_27b else head_dim,
        "final_logit_softcapping": gguf.get("gemma3.final_logit_softcapping", float) or None,
    }


def _rope_scaling(gguf: GGUF, arch: str, theta: float, head_dim: int) -> JsonObject | None:
    """Hugging Face's `rope_scaling` block: from the metadata, or, for Llama 3.1, from the tensor with its factors."""
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, theta, head_dim)
    kind = gguf.get(f"{arch}.rope.scaling.type", str) or "none"
    if kind == "none":
        return None
    factor = gguf.require(f"{arch}.rope.scaling.factor", float)
    original = gguf.get(f"{arch}.rope.scaling.original_context_length", int)
    scaling: JsonObject = {"rope_type": kind, "factor": factor}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(gguf: GGUF, theta: float, head_dim: int) -> JsonObject:
    """The `llama3` parameters whose frequency factors the file holds; ModelLoadError if none give them."""
    tensor = gguf.tensors["rope_freqs.weight"]
    if tensor.type != "F32" or tensor.shape != (head_dim // 2,):
        raise ModelLoadError(f"{gguf.path}: tensor 'rope_freqs.weight' must be F32 with {head_dim // 2} values")
    with gguf.path.open("rb") as file:
        file.seek(tensor.offset)
        stored = struct.unpack(f"<{head_dim // 2}f", file.read(tensor.size_bytes))
    factor = max(stored)
    for i, value in enumerate(stored):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        # 1 for wavelengths of which many fit into the original context, 0 for long ones
        share = (LLAMA3_ORIGINAL_CONTEXT / wavelength - LLAMA3_LOW_FREQ_FACTOR) / (
            LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR
        )
        smooth = min(max(share, 0), 1)
        if factor < 1 or not math.isclose(value, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            raise ModelLoadError(f"{gguf.path}: the RoPE factors in 'rope_freqs.weight' are not those of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
    }


def _token_ids(path: Path, value: object) -> tuple[int, ...]:
    """An `eos_token_id`: absent, one id or several."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ModelLoadError(f"{path}: eos_token_id must be a token id or a list of them but is {value!r}")
    return tuple(ids)


def _number(path: Path, config: JsonObject, key: str, low: float, high: float) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        raise ModelLoadError(f"{path}: {key} must be a number from {low} to {high} but is {value!r}")
    return value
