import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model
from models.checkpoints import save, stacked_experts
from models.dense_kv import DenseKV, prompt_logits, step
from models.transformers_model import save_random, transformers_logits

PARITY = Path(__file__).parent / "parity" / "qwen3_next"
CONFIG = {
    "model_type": "qwen3_next",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "vocab_size": 80,
    "max_position_embeddings": 256,
}
LINEAR, FULL = "linear_attention", "full_attention"
SHAPES = {
    "plain": {},
    "attention in every second layer": {"layer_types": [LINEAR, FULL] * 2},
    "attention in every third layer": {"layer_types": [LINEAR, LINEAR, FULL, LINEAR, LINEAR], "num_hidden_layers": 5},
    "attention first": {"layer_types": [FULL, LINEAR, FULL, FULL]},
    "a value head for each key head": {"linear_num_value_heads": 2},
    "four value heads for each key head": {"linear_num_value_heads": 8},
    "values larger than keys": {"linear_key_head_dim": 8, "linear_value_head_dim": 24},
    "keys larger than values": {"linear_key_head_dim": 24, "linear_value_head_dim": 8},
    "the shortest convolution": {"linear_conv_kernel_dim": 2},
    "a longer convolution": {"linear_conv_kernel_dim": 6},
    "half of the head turned": {"partial_rotary_factor": 0.5},
    "the whole head turned": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "weights of the experts not normalised": {"norm_topk_prob": False},
    "every second layer sparse": {"decoder_sparse_step": 2},
    "some layers dense": {"mlp_only_layers": [0, 3]},
    "all layers dense": {"mlp_only_layers": [0, 1, 2, 3]},
    "odd sizes": {"hidden_size": 36, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
}


def check(logits: np.ndarray, expected: np.ndarray) -> None:
    """Close nearly everywhere: where a head is almost zero, its norm magnifies the rounding of float32."""
    errors = np.abs(logits - expected)
    assert np.quantile(errors, 0.9) < 1e-4 and errors.max() < 5e-3


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_transformers(changes, tmp_path):
    reference = save_random(tmp_path, CONFIG | changes)
    token_ids = np.random.default_rng(1).integers(0, 80, 70).tolist()
    logits = prompt_logits(load_model(str(tmp_path)), token_ids)
    check(logits, transformers_logits(reference, token_ids))


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_an_interval_says_the_same_as_layer_types(interval, tmp_path):
    types = [LINEAR if (layer + 1) % interval else FULL for layer in range(4)]
    reference = save_random(tmp_path, CONFIG | {"layer_types": types})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config | {"full_attention_interval": interval}))
    logits = prompt_logits(load_model(str(tmp_path)), list(range(50)))
    check(logits, transformers_logits(reference, list(range(50))))


def parity_checkpoint():
    return json.loads((PARITY / "config.json").read_text()), mx.load(str(PARITY / "model.safetensors"))


@pytest.mark.parametrize("chunks", [[80], [1] * 80, [3, 61, 2, 14]], ids=["one piece", "token by token", "uneven"])
def test_states_after_the_prompt_are_those_of_mlx_lm(chunks):
    model, fixture, kv = load_model(str(PARITY)), np.load(PARITY / "fixture.npz"), DenseKV()
    prompt = fixture["prompt"].tolist()
    for count in chunks:
        step(model, kv, {"": prompt[:count]})
        prompt = prompt[count:]
    for layer in range(3):
        conv_state, state = kv.states["", layer]
        np.testing.assert_allclose(conv_state, fixture[f"l{layer}_conv_state"], 0, 1e-4)
        np.testing.assert_allclose(state, fixture[f"l{layer}_ssm_state"], 0, 1e-4)


def as_mlx(weights: dict[str, mx.array], num_experts: int) -> dict[str, mx.array]:
    """The weights of transformers in the form that MLX checkpoints have."""
    zero_centred = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
    converted = {}
    for name, weight in stacked_experts(weights, num_experts).items():
        if name.endswith(zero_centred):
            weight = weight + 1
        elif "conv1d" in name:
            weight = weight.swapaxes(1, 2)
        converted[name] = weight
    return converted


@pytest.mark.parametrize("dense", [False, True], ids=["experts", "no experts"])
@pytest.mark.parametrize("mtp", [False, True], ids=["", "mtp"])
def test_reads_both_forms(dense, mtp, tmp_path):
    """mlx-lm tells them apart by the experts, so it takes one without experts for converted."""
    changes = {"mlp_only_layers": [0, 1, 2, 3]} if dense else {}
    reference = save_random(tmp_path, CONFIG | changes)
    config, weights = json.loads((tmp_path / "config.json").read_text()), mx.load(str(tmp_path / "model.safetensors"))
    extra = {"mtp.layers.0.self_attn.q_proj.weight": mx.zeros((4, 4)), "mtp.norm.weight": mx.zeros(4)} if mtp else {}
    expected = transformers_logits(reference, list(range(20)))
    for form in (weights, as_mlx(weights, 6)):
        logits = prompt_logits(load_model(save(tmp_path, config, form | extra)), list(range(20)))
        check(logits, expected)


@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.3.up_proj.weight",
        "mlp.shared_expert.down_proj.weight",
        "mlp.shared_expert_gate.weight",
        "linear_attn.conv1d.weight",
        "linear_attn.A_log",
        "linear_attn.norm.weight",
    ],
)
def test_a_missing_tensor_is_named(name, tmp_path):
    config, weights = parity_checkpoint()
    name = f"model.layers.0.{name}"
    del weights[name]
    with pytest.raises(ModelLoadError, match=rf"tensor {name} is missing"):
        load_model(save(tmp_path, config, weights))


def test_forms_are_not_mixed(tmp_path):
    config, weights = parity_checkpoint()
    name = "model.layers.1.linear_attn.conv1d.weight"
    weights[name] = weights[name].swapaxes(1, 2)
    with pytest.raises(ModelLoadError, match=rf"{name} has shape \(256, 4, 1\), .* asks for \(256, 1, 4\)"):
        load_model(save(tmp_path, config, weights))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"layer_types": [LINEAR, FULL]}, "layer_types has 2 entries for 4 layers"),
        ({"layer_types": [LINEAR, FULL, LINEAR, "sliding_attention"]}, "Invalid enum value .sliding_attention."),
        ({"layer_types": [LINEAR] * 4}, "must be layers of linear and of full attention"),
        ({"full_attention_interval": 1}, "must be layers of linear and of full attention"),
        ({"full_attention_interval": 5}, "must be layers of linear and of full attention"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3 key-value heads"),
        ({"linear_num_value_heads": 3}, "3 value heads can't share 2 key heads"),
        ({"linear_conv_kernel_dim": 1}, r"Expected `int` >= 2 - at `\$.linear_conv_kernel_dim`"),
        ({"partial_rotary_factor": 0.1}, "RoPE turns 3 features of a head, but they must be pairs"),
        ({"partial_rotary_factor": 0.01}, "RoPE turns 0 features"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds 4 experts"),
    ],
    ids=str,
)
def test_a_config_that_is_wrong_is_refused(changes, fault, tmp_path):
    config, weights = parity_checkpoint()
    with pytest.raises(ModelLoadError, match=fault):
        load_model(save(tmp_path, config | changes, weights))


def test_says_what_the_engine_needs():
    model = load_model(str(PARITY))
    kv, state = model.kv_spec, model.state_spec
    assert (kv.num_layers, kv.num_kv_heads, kv.head_dim) == (1, 2, 32)
    assert (state.num_layers, state.conv_kernel, state.conv_channels) == (3, 4, 256)
    assert (state.num_value_heads, state.value_head_dim, state.key_head_dim) == (4, 32, 32)
    assert (model.context_length, model.vocab_size) == (512, 256)
