import mlx.core as mx
import numpy as np
import pytest

from mlx_server.models.loader import load_model
from models.checkpoints import CONFIG, LLAMA3_SCALING, random_weights, save
from models.dense_kv import prompt_logits
from reference.llama import llama_logits

TOLERANCE = 1e-4

SHAPES = {
    "plain": {},
    "one key-value head": {"num_key_value_heads": 1},
    "head size of its own": {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 3},
    "no grouped queries": {"num_key_value_heads": None},
    "linear RoPE": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
    "llama3 RoPE": {"rope_scaling": LLAMA3_SCALING},
    "attention bias": {"attention_bias": True},
    "MLP bias": {"mlp_bias": True},
    "one layer": {"num_hidden_layers": 1},
    "untied": {"tie_word_embeddings": False},
    "odd sizes": {"vocab_size": 67, "intermediate_size": 92, "hidden_size": 36, "head_dim": 10},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_the_numpy_model(changes, tmp_path):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    weights = random_weights(config)
    token_ids = np.random.default_rng(1).integers(0, config["vocab_size"], 40).tolist()
    model = load_model(save(tmp_path, config, weights))
    expected = llama_logits(config, {name: np.array(weight) for name, weight in weights.items()}, token_ids)
    np.testing.assert_allclose(prompt_logits(model, token_ids), expected, 0, TOLERANCE)


def test_says_what_the_engine_needs(tmp_path):
    config = CONFIG | {"head_dim": 12, "num_key_value_heads": 2}
    model = load_model(save(tmp_path, config, random_weights(config)))
    spec = model.kv_spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.dtype) == (2, 2, 12, mx.float32)
    assert (model.context_length, model.vocab_size) == (512, 64)


def test_yarn_makes_the_context_longer(tmp_path):
    config = CONFIG | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}
    assert load_model(save(tmp_path, config, random_weights(config))).context_length == 1024
