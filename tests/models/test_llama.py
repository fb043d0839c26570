import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.models.loader import load_model
from models.checkpoints import CONFIG, LLAMA3_SCALING, random_weights, save
from models.dense_kv import DenseKV, greedy, prompt_logits, step
from reference.llama import llama_logits

PARITY = Path(__file__).parent / "parity"
FORMS = [f"{name}{form}" for name in ("llama", "llama_tied", "llama_bias") for form in ("", "/mlx-4bit")]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=FORMS)
def parity(request):
    """A model and what transformers computes with it."""
    directory = PARITY / request.param
    return load_model(str(directory)), np.load(directory / "fixture.npz")


def test_logits_agree_with_transformers(parity):
    model, fixture = parity
    np.testing.assert_allclose(prompt_logits(model, fixture["prompt"].tolist()), fixture["logits"], 0, TOLERANCE)


def test_greedy_tokens_agree_with_transformers(parity):
    model, fixture = parity
    assert greedy(model, fixture["prompt"].tolist(), 32) == fixture["greedy"].tolist()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bias"])
def test_reads_configs_of_transformers_5(name, tmp_path):
    shutil.copy(PARITY / name / "model.safetensors", tmp_path)
    shutil.copy(PARITY / name / "config_v5.json", tmp_path / "config.json")
    fixture = np.load(PARITY / name / "fixture.npz")
    logits = prompt_logits(load_model(str(tmp_path)), fixture["prompt"].tolist())
    np.testing.assert_allclose(logits, fixture["logits"], 0, TOLERANCE)


@pytest.mark.parametrize("chunks", [[1] * 40, [1, 7, 2, 3, 16, 11]], ids=["token by token", "uneven"])
def test_a_prompt_in_pieces_is_the_whole_prompt(parity, chunks):
    model, fixture = parity
    prompt, kv = fixture["prompt"].tolist()[:40], DenseKV()
    logits, pos = [], 0
    for count in chunks:
        logits.append(step(model, kv, {"": prompt[pos : pos + count]})[""])
        pos += count
    np.testing.assert_allclose(np.concatenate(logits), fixture["logits"][:40], 0, TOLERANCE)


def test_a_request_does_not_see_its_batch(parity):
    model, fixture = parity
    prompt = fixture["prompt"].tolist()
    kv = DenseKV()
    step(model, kv, {"a": prompt[:5], "b": prompt[:20]})
    logits = step(model, kv, {"b": prompt[20:21], "c": prompt[:30], "a": prompt[5:12]})
    expected = {"a": fixture["logits"][5:12], "b": fixture["logits"][20:21], "c": fixture["logits"][:30]}
    for name, rows in logits.items():
        np.testing.assert_allclose(rows, expected[name], 0, TOLERANCE)


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
