"""Models of random shapes against transformers, so that nothing is tuned to the fixtures of parity/."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from mlx_server.models.config import WindowedDecoderArgs, convert
from mlx_server.models.gemma3_text import Gemma3TextArgs
from mlx_server.models.loader import load_model
from mlx_server.models.qwen2 import Qwen2Args
from mlx_server.models.qwen3 import Qwen3Args
from models.dense_kv import DenseKV, prompt_logits, step
from models.transformers_model import save_random, transformers_logits

TOLERANCE = 1e-4
NUM_TOKENS = 60

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# model_type -> what is varied; each case takes one value of each
CHOICES: dict[str, dict[str, list[Any]]] = {
    "llama": {
        "attention_bias": [False, True],
        "mlp_bias": [False, True],
        "rope_parameters": [
            {"rope_type": "default", "rope_theta": 500.0},
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
            {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            {"rope_theta": 10000.0, "original_max_position_embeddings": 32, **LLAMA3},
            {"rope_theta": 10000.0, **YARN},
            {"rope_theta": 500.0, **YARN, "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0},
            {"rope_theta": 10000.0, **YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
        ],
    },
    "mistral": {"sliding_window": [None, 1, 7, 30, 100]},
    "qwen2": {
        "use_sliding_window": [False, True],
        "sliding_window": [9, 20],
        "max_window_layers": [0, 1, 3],
        "rope_parameters": [{"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e4, **YARN}],
    },
    "qwen3": {
        "attention_bias": [False, True],
        "use_sliding_window": [False, True],
        "sliding_window": [9, 20],
        "max_window_layers": [0, 2],
    },
    "gemma3_text": {
        "attention_bias": [False, True],
        "sliding_window": [5, 24],
        "sliding_window_pattern": [2, 3],
        "query_pre_attn_scalar": [8, 40],
        "rope_parameters": [
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        ],
    },
}
CASES = [(model_type, seed) for model_type in CHOICES for seed in range(8)]


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)


def random_config(model_type: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, *model_type.encode()])
    num_kv_heads = int(rng.choice([1, 2, 3]))
    num_heads = num_kv_heads * int(rng.choice([1, 2, 4]))
    choices = {name: values[int(rng.integers(len(values)))] for name, values in CHOICES[model_type].items()}
    if "rope_parameters" in choices:  # each of them once
        values = CHOICES[model_type]["rope_parameters"]
        choices["rope_parameters"] = values[seed % len(values)]
    return {
        "model_type": model_type,
        "hidden_size": num_heads * int(rng.choice([6, 16, 20])),
        "head_dim": int(rng.choice([10, 16, 24])),
        "intermediate_size": int(rng.integers(20, 90)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": int(rng.integers(50, 200)),
        "max_position_embeddings": 64,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **choices,
    }


@pytest.mark.parametrize("model_type, seed", CASES)
def test_agrees_with_transformers(model_type, seed, tmp_path):
    config = random_config(model_type, seed)
    reference = save_random(tmp_path, config, seed)
    token_ids = np.random.default_rng(seed).integers(3, config["vocab_size"], NUM_TOKENS).tolist()
    expected = transformers_logits(reference, token_ids)
    model = load_model(str(tmp_path))
    np.testing.assert_allclose(prompt_logits(model, token_ids), expected, 0, TOLERANCE)
    kv = DenseKV()
    chunks = [step(model, kv, {"": token_ids[begin : begin + 13]})[""] for begin in range(0, NUM_TOKENS, 13)]
    np.testing.assert_allclose(np.concatenate(chunks), expected, 0, TOLERANCE)


WINDOWED: dict[str, type[WindowedDecoderArgs]] = {
    "qwen2": Qwen2Args,
    "qwen3": Qwen3Args,
    "gemma3_text": Gemma3TextArgs,
}


@pytest.mark.parametrize("model_type, seed", [case for case in CASES if case[0] in WINDOWED])
def test_a_config_without_layer_types_means_the_same(model_type, seed):
    """As transformers wrote them until 4.52."""
    config = random_config(model_type, seed)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    layer_types = AutoConfig.for_model(model_type, **fields).layer_types
    args = convert(config, WINDOWED[model_type], "")
    windows = [config["sliding_window"] if kind == "sliding_attention" else None for kind in layer_types]
    assert args.windows == windows
    turned = convert(config | {"layer_types": layer_types[::-1]}, WINDOWED[model_type], "")
    assert turned.windows == windows[::-1]  # what is said goes before what would follow
