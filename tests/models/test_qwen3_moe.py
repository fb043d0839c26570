import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model
from models.checkpoints import dequantized, quantized, save, stacked_experts
from models.dense_kv import prompt_logits
from models.transformers_model import save_random, transformers_logits

PARITY = Path(__file__).parent / "parity" / "qwen3_moe"
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 80,
    "max_position_embeddings": 128,
}
SHAPES = {
    "plain": {},
    "weights of the experts not normalised": {"norm_topk_prob": False},
    "every second layer sparse": {"decoder_sparse_step": 2},
    "some layers dense": {"mlp_only_layers": [0, 3]},
    "some of every second": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "all layers dense": {"mlp_only_layers": [0, 1, 2, 3]},
    "one expert for each token": {"num_experts_per_tok": 1},
    "all experts for each token": {"num_experts_per_tok": 6},
    "many experts": {"num_experts": 33, "num_experts_per_tok": 8, "moe_intermediate_size": 8},
    "odd sizes": {"hidden_size": 36, "intermediate_size": 52, "moe_intermediate_size": 20, "head_dim": 10},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "sliding window": {"use_sliding_window": True, "sliding_window": 7},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_transformers(changes, tmp_path):
    reference = save_random(tmp_path, CONFIG | changes)
    token_ids = np.random.default_rng(1).integers(0, 80, 40).tolist()
    logits = prompt_logits(load_model(str(tmp_path)), token_ids)
    np.testing.assert_allclose(logits, transformers_logits(reference, token_ids), 0, 1e-4)


def parity_checkpoint():
    return json.loads((PARITY / "config.json").read_text()), mx.load(str(PARITY / "model.safetensors"))


def test_reads_stacked_experts(tmp_path):
    config, weights = parity_checkpoint()
    fixture = np.load(PARITY / "fixture.npz")
    model = load_model(save(tmp_path, config, stacked_experts(weights, 8)))
    np.testing.assert_allclose(prompt_logits(model, fixture["prompt"].tolist()), fixture["logits"], 0, 1e-4)


def test_reads_quantized_experts_one_by_one(tmp_path):
    config = json.loads((PARITY / "mlx-4bit" / "config.json").read_text())
    weights: dict[str, mx.array] = {}
    for name, tensor in mx.load(str(PARITY / "mlx-4bit" / "model.safetensors")).items():
        if ".switch_mlp." in name:
            weights |= {name.replace("switch_mlp", f"experts.{i}"): expert for i, expert in enumerate(tensor)}
        else:
            weights[name] = tensor
    fixture = np.load(PARITY / "mlx-4bit" / "fixture.npz")
    model = load_model(save(tmp_path, config, weights))
    np.testing.assert_allclose(prompt_logits(model, fixture["prompt"].tolist()), fixture["logits"], 0, 1e-4)


@pytest.mark.parametrize("computable", [True, False], ids=["", "dequantized"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_reads_experts_quantized_each_its_own_way(mode, computable, tmp_path, monkeypatch):
    if not computable:
        monkeypatch.setattr("mlx_server.models.moe.is_computable", lambda *form, experts: False)
    config, weights = parity_checkpoint()
    how = {"up": {"group_size": 32, "bits": 4, "mode": mode}, "down": {"group_size": 64, "bits": 8, "mode": "affine"}}
    block: dict[str, object] = {"group_size": 64, "bits": 4}
    stored = plain = stacked_experts(weights, 8)
    for projection, parameters in how.items():
        layer = f"model.layers.2.mlp.switch_mlp.{projection}_proj"
        block[layer] = parameters
        stored = quantized(stored, layer, **parameters)
        plain = plain | {f"{layer}.weight": dequantized(stored, layer, **parameters)}
    (tmp_path / "plain").mkdir()
    expected = prompt_logits(load_model(save(tmp_path / "plain", config, plain)), list(range(20)))
    model = load_model(save(tmp_path, config | {"quantization": block}, stored))
    np.testing.assert_allclose(prompt_logits(model, list(range(20))), expected, 0, 1e-4)


@pytest.mark.parametrize(
    ("name", "tensor", "fault"),
    [
        ("scales", None, r"weight has shape \(8, 64, 8\), but the configuration asks for \(8, 64, 64\)"),
        ("biases", None, "biases is missing"),
        ("scales", mx.zeros((8, 64, 1)), r"scales has shape \(8, 64, 1\), but the configuration asks for \(8, 64, 2\)"),
        ("scales", mx.zeros((8, 64, 2), mx.uint8), "scales has dtype .*uint8"),
    ],
)
def test_parts_of_quantized_experts_that_do_not_fit_are_named(name, tensor, fault, tmp_path):
    config, weights = parity_checkpoint()
    layer, how = "model.layers.0.mlp.switch_mlp.up_proj", {"group_size": 32, "bits": 4}
    stored = quantized(stacked_experts(weights, 8), layer, **how) | {f"{layer}.{name}": tensor}
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(ModelLoadError, match=rf"tensor {layer}.{fault}"):
        load_model(save(tmp_path, config | {"quantization": how}, stored))


def test_columns_of_experts_must_be_whole_groups(tmp_path):
    config, weights = parity_checkpoint()
    config |= {"moe_intermediate_size": 48, "quantization": {"group_size": 32, "bits": 4}}
    layer = "model.layers.0.mlp.switch_mlp"
    stacked = stacked_experts(weights, 8)
    narrow = {f"{layer}.{name}_proj.weight": stacked[f"{layer}.{name}_proj.weight"][:, :48] for name in ("gate", "up")}
    parts = {f"{layer}.down_proj.{part}": mx.zeros((8, 64, 1)) for part in ("scales", "biases")}
    packed = {f"{layer}.down_proj.weight": mx.zeros((8, 64, 6), mx.uint32)}
    with pytest.raises(ModelLoadError, match=f"{layer}.down_proj has 48 columns, not groups of 32"):
        load_model(save(tmp_path, config, stacked | narrow | parts | packed))


@pytest.mark.parametrize("name", ["gate.weight", "experts.0.gate_proj.weight", "experts.7.down_proj.weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    config, weights = parity_checkpoint()
    name = f"model.layers.2.mlp.{name}"
    del weights[name]
    with pytest.raises(ModelLoadError, match=f"tensor {name} is missing"):
        load_model(save(tmp_path, config, weights))


def test_a_missing_stacked_projection_is_named(tmp_path):
    config, weights = parity_checkpoint()
    weights = stacked_experts(weights, 8)
    del weights["model.layers.2.mlp.switch_mlp.gate_proj.weight"]
    with pytest.raises(ModelLoadError, match=r"tensor model.layers.2.mlp.switch_mlp.gate_proj.weight is missing"):
        load_model(save(tmp_path, config, weights))


def test_an_expert_too_many_is_named(tmp_path):
    config, weights = parity_checkpoint()
    name = "model.layers.0.mlp.experts.8.up_proj.weight"
    with pytest.raises(ModelLoadError, match=rf"tensor {name} \(64, 64\) is no part of the model"):
        load_model(save(tmp_path, config, weights | {name: mx.zeros((64, 64))}))


def test_an_expert_of_another_shape_is_shown_with_the_right_one(tmp_path):
    config, weights = parity_checkpoint()
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    weights[name] = weights[name][:32]
    with pytest.raises(ModelLoadError, match=rf"{name} has shape \(32, 64\), .* asks for \(64, 64\)"):
        load_model(save(tmp_path, config, weights))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"num_experts": None}, "missing required field `num_experts`"),
        ({"num_experts": 2}, "num_experts_per_tok 3 exceeds 2 experts"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3 key-value heads"),
        ({"head_dim": 13}, "head size 13 must be even"),
        ({"decoder_sparse_step": 0}, r"Expected `int` >= 1 - at `\$.decoder_sparse_step`"),
        ({"mlp_only_layers": 1}, r"Expected `array \| null`, got `int` - at `\$.mlp_only_layers`"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
    ids=str,
)
def test_a_config_that_is_wrong_is_refused(changes, fault, tmp_path):
    config, weights = parity_checkpoint()
    with pytest.raises(ModelLoadError, match=fault):
        load_model(save(tmp_path, config | changes, weights))


def test_says_what_the_engine_needs():
    model = load_model(str(PARITY))
    spec = model.kv_spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.window) == (3, 2, 32, None)
    assert model.state_spec is None
    assert (model.context_length, model.vocab_size) == (512, 320)
