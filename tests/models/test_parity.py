"""Every architecture on tiny models whose logits and greedy tokens transformers has computed; see parity/README.md."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.models.loader import load_model
from models.checkpoints import load_half
from models.dense_kv import DenseKV, greedy, prompt_logits, step

PARITY = Path(__file__).parent / "parity"
# name -> largest difference of a logit
TOLERANCES = {
    "llama": 1e-4,
    "llama_tied": 1e-4,
    "llama_bias": 1e-4,
    "mistral": 1e-4,
    "mistral_swa": 1e-4,
    "qwen2": 1e-4,
    "qwen3": 1e-4,
    "qwen3_yarn": 1e-4,
    "gemma3_text": 1e-4,
    "qwen3_moe": 1e-4,
    "qwen3_next": 5e-4,  # ill-conditioned: transformers' own two forms of the delta rule differ by 3e-4
}


@pytest.fixture(scope="module", params=[f"{name}{form}" for name in TOLERANCES for form in ("", "/mlx-4bit")])
def parity(request):
    """A model, what transformers computes with it, and how near the two must be."""
    directory = PARITY / request.param
    return load_model(str(directory)), np.load(directory / "fixture.npz"), TOLERANCES[request.param.split("/")[0]]


def test_logits_agree_with_transformers(parity):
    model, fixture, tolerance = parity
    np.testing.assert_allclose(prompt_logits(model, fixture["prompt"].tolist()), fixture["logits"], 0, tolerance)


def test_greedy_tokens_agree_with_transformers(parity):
    model, fixture, _ = parity
    assert greedy(model, fixture["prompt"].tolist(), 32) == fixture["greedy"].tolist()


@pytest.mark.parametrize("name", TOLERANCES)
def test_reads_configs_of_transformers_5(name, tmp_path):
    shutil.copy(PARITY / name / "model.safetensors", tmp_path)
    shutil.copy(PARITY / name / "config_v5.json", tmp_path / "config.json")
    fixture = np.load(PARITY / name / "fixture.npz")
    logits = prompt_logits(load_model(str(tmp_path)), fixture["prompt"].tolist())
    np.testing.assert_allclose(logits, fixture["logits"], 0, TOLERANCES[name])


@pytest.mark.parametrize("name", TOLERANCES)
def test_computes_in_half_precision_on_a_gpu(name, tmp_path, monkeypatch):
    """Here on the CPU, but with a checkpoint's own dtype. Errors are as large as mlx-lm's, and rounding's."""
    directory = PARITY / name / "mlx-4bit"
    model = load_half(directory, mx.float16, tmp_path, monkeypatch)
    assert model.kv_spec.dtype == mx.float16
    fixture = np.load(directory / "fixture.npz")
    errors = np.abs(prompt_logits(model, fixture["prompt"].tolist()) - fixture["logits"])
    assert np.median(errors) < 0.05


@pytest.mark.parametrize("chunks", [[1] * 40, [1, 7, 2, 3, 16, 11]], ids=["token by token", "uneven"])
def test_a_prompt_in_pieces_is_the_whole_prompt(parity, chunks):
    model, fixture, tolerance = parity
    prompt, kv = fixture["prompt"].tolist()[:40], DenseKV()
    logits, pos = [], 0
    for count in chunks:
        logits.append(step(model, kv, {"": prompt[pos : pos + count]})[""])
        pos += count
    np.testing.assert_allclose(np.concatenate(logits), fixture["logits"][:40], 0, tolerance)


def test_a_request_does_not_see_its_batch(parity):
    model, fixture, tolerance = parity
    prompt = fixture["prompt"].tolist()
    kv = DenseKV()
    step(model, kv, {"a": prompt[:5], "b": prompt[:20]})
    logits = step(model, kv, {"b": prompt[20:21], "c": prompt[:30], "a": prompt[5:12]})
    expected = {"a": fixture["logits"][5:12], "b": fixture["logits"][20:21], "c": fixture["logits"][:30]}
    for name, rows in logits.items():
        np.testing.assert_allclose(rows, expected[name], 0, tolerance)
