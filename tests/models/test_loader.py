import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.checkpoint.model_config import MODEL_TYPES
from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import ARCHITECTURES, load_model
from mlx_server.models.probe import is_computable
from models.checkpoints import CONFIG, dequantized, quantized, random_weights, save
from models.dense_kv import prompt_logits
from reference.llama import llama_logits

TOKEN_IDS = np.random.default_rng(0).integers(0, 64, 20).tolist()
Q_PROJ = "model.layers.1.self_attn.q_proj"
UNTIED = CONFIG | {"tie_word_embeddings": False}


def check(directory: str, weights: dict[str, mx.array], config: dict[str, Any] = CONFIG) -> None:
    """The model of `directory` computes what the NumPy model does with `weights`."""
    expected = llama_logits(config, {name: np.array(weight) for name, weight in weights.items()}, TOKEN_IDS)
    np.testing.assert_allclose(prompt_logits(load_model(directory), TOKEN_IDS), expected, 0, 1e-4)


def test_each_model_type_has_an_architecture():
    assert tuple(ARCHITECTURES) == MODEL_TYPES


def test_reads_shards_named_by_an_index(tmp_path):
    weights = random_weights(CONFIG)
    save(tmp_path, CONFIG, {})
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-{i:05}-of-00002.safetensors"
        mx.save_safetensors(str(tmp_path / file), {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(str(tmp_path), weights)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_reads_half_precision_without_loss(dtype, tmp_path):
    weights = {name: weight.astype(dtype) for name, weight in random_weights(CONFIG).items()}
    check(save(tmp_path, CONFIG, weights), {name: weight.astype(mx.float32) for name, weight in weights.items()})


def test_keeps_the_dtype_of_the_checkpoint_on_a_gpu(tmp_path, monkeypatch):
    weights = {name: weight.astype(mx.bfloat16) for name, weight in random_weights(CONFIG).items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.float32)
    weights = quantized(weights, Q_PROJ, group_size=32, bits=4)
    directory = save(tmp_path, CONFIG | {"quantization": {"group_size": 32, "bits": 4}}, weights)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert load_model(directory).kv_spec.dtype == mx.bfloat16


FORMS = [
    *({"group_size": group_size, "bits": bits} for group_size in (32, 64, 128) for bits in (2, 3, 4, 5, 6, 8)),
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]
WIDE = CONFIG | {"hidden_size": 128, "head_dim": 32}  # a group of 128 in a row


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("how", FORMS, ids=lambda how: "-".join(map(str, how.values())))
def test_reads_every_quantization(how, dtype, tied, tmp_path):
    """Every matrix in one form, scales and norms in one dtype, as one `mlx_lm.convert` writes them."""
    config = WIDE | {"tie_word_embeddings": tied}
    weights = {name: weight.astype(dtype) for name, weight in random_weights(config).items()}
    stored, plain = weights, {name: weight.astype(mx.float32) for name, weight in weights.items()}
    for name, weight in weights.items():
        if weight.ndim == 2:
            layer = name.removesuffix(".weight")
            stored = quantized(stored, layer, **how)
            parts = [stored.get(f"{layer}.{part}") for part in ("scales", "biases")]
            scales, biases = (p.astype(mx.float32) if p is not None and p.dtype == dtype else p for p in parts)
            plain[name] = mx.dequantize(stored[name], scales, biases, **how, dtype=mx.float32)
    check(save(tmp_path, config | {"quantization": how}, stored), plain, config)


@pytest.mark.parametrize("how", [FORMS[3], FORMS[-3]], ids=["affine", "mxfp4"])
def test_what_mlx_cannot_compute_is_dequantized(how, tmp_path, monkeypatch, caplog):
    def not_implemented(*arrays, **how):
        raise RuntimeError("[QuantizedMatmul] NYI")

    stored = quantized(quantized(random_weights(CONFIG), Q_PROJ, **how), "model.embed_tokens", **how)
    plain = random_weights(CONFIG) | {
        f"{layer}.weight": dequantized(stored, layer, **how) for layer in (Q_PROJ, "model.embed_tokens")
    }
    monkeypatch.setattr(mx, "quantized_matmul", not_implemented)
    is_computable.cache_clear()
    try:
        check(save(tmp_path, CONFIG | {"quantization": how}, stored), plain)
    finally:
        is_computable.cache_clear()
    [warning] = [record.getMessage() for record in caplog.records]
    assert "in groups of 32 on this device; they are held as" in warning and "NYI" in warning


def strip(layer: str) -> str:
    return layer.removeprefix("model.")


@pytest.mark.parametrize("name", [str, strip, lambda layer: f"language_model.{layer}"], ids=["full", "bare", "vlm"])
def test_follows_overrides_of_single_layers(name, tmp_path):
    down_proj, up_proj = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
    forms = {
        "model.embed_tokens": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        Q_PROJ: {"group_size": 32, "bits": 8, "mode": "affine"},
        down_proj: {"group_size": 64, "bits": 4},
        up_proj: {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    }
    weights = stored = random_weights(UNTIED)
    for layer, how in forms.items():
        stored = quantized(stored, layer, **how)
    # A layer's block without a mode means affine, whatever the model's mode; what it does not say is MLX's default.
    overrides = {Q_PROJ: {"group_size": 32, "bits": 8}, down_proj: {"group_size": 64}, up_proj: True, "lm_head": False}
    block = forms["model.embed_tokens"] | {name(layer): value for layer, value in overrides.items()}
    plain = {f"{layer}.weight": dequantized(stored, layer, **how) for layer, how in forms.items()}
    check(save(tmp_path, UNTIED | {"quantization": block, "quantization_config": block}, stored), weights | plain)


def test_what_the_weights_were_before_does_not_matter(tmp_path):
    """A model that was converted may still say how its original was quantized."""
    how = {"group_size": 32, "bits": 4}
    stored = quantized(random_weights(CONFIG), Q_PROJ, **how)
    plain = random_weights(CONFIG) | {f"{Q_PROJ}.weight": dequantized(stored, Q_PROJ, **how)}
    blocks = {
        "quantization": how | {"quant_method": "dwq"},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    check(save(tmp_path, CONFIG | blocks, stored), plain)


def test_an_lm_head_is_used_whatever_the_config_says(tmp_path):
    weights = random_weights(UNTIED)
    config = {key: value for key, value in UNTIED.items() if key != "tie_word_embeddings"}
    check(save(tmp_path, config, weights), weights)


def test_ignores_stored_rope_frequencies(tmp_path):
    weights = random_weights(CONFIG)
    stored = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(8)}
    check(save(tmp_path, CONFIG, stored), weights)


def test_a_missing_tensor_is_named(tmp_path):
    weights = random_weights(CONFIG)
    del weights[f"{Q_PROJ}.weight"]
    with pytest.raises(ModelLoadError, match=rf"tensor {Q_PROJ}.weight is missing"):
        load_model(save(tmp_path, CONFIG, weights))


def test_a_missing_lm_head_is_named_if_the_config_asks_for_one(tmp_path):
    with pytest.raises(ModelLoadError, match=r"tensor lm_head.weight is missing"):
        load_model(save(tmp_path, UNTIED, random_weights(CONFIG)))


def test_a_tensor_too_many_is_named(tmp_path):
    weights = random_weights(CONFIG) | {f"{Q_PROJ}.bias": mx.zeros(64)}
    with pytest.raises(ModelLoadError, match=rf"tensor {Q_PROJ}.bias \(64,\) is no part of the model"):
        load_model(save(tmp_path, CONFIG, weights))


def test_a_wrong_shape_is_shown_with_the_right_one(tmp_path):
    weights = random_weights(CONFIG)
    with pytest.raises(ModelLoadError, match=r"embed_tokens.weight has shape \(64, 64\), .* asks for \(65, 64\)"):
        load_model(save(tmp_path, CONFIG | {"vocab_size": 65}, weights))


def test_a_quantization_that_contradicts_the_tensors_is_shown(tmp_path):
    weights = quantized(random_weights(CONFIG), Q_PROJ, group_size=32, bits=4)
    config = CONFIG | {"quantization": {"group_size": 32, "bits": 8}}
    with pytest.raises(ModelLoadError, match=rf"{Q_PROJ}.weight has shape \(64, 8\), .* asks for \(64, 16\)"):
        load_model(save(tmp_path, config, weights))


AFFINE, MXFP4 = {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}


@pytest.mark.parametrize(
    ("how", "name", "tensor", "fault"),
    [
        (AFFINE, "scales", None, r"weight has shape \(64, 8\), but the configuration asks for \(64, 64\)"),
        (AFFINE | {Q_PROJ: AFFINE}, "scales", None, "scales is missing"),
        (AFFINE | {Q_PROJ: False}, "bias", None, r"weight has shape \(64, 8\), .* asks for \(64, 64\)"),
        (AFFINE, "biases", None, "biases is missing"),
        (AFFINE, "scales", mx.zeros((64, 1)), r"scales has shape \(64, 1\), .* asks for \(64, 2\)"),
        (AFFINE, "biases", mx.zeros((2, 64)), r"biases has shape \(2, 64\), .* asks for \(64, 2\)"),
        (AFFINE, "scales", mx.zeros((64, 2), mx.uint8), r"scales has dtype .*uint8, but it must be .*floating"),
        (AFFINE, "biases", mx.zeros((64, 2), mx.int32), r"biases has dtype .*int32, but it must be .*floating"),
        (AFFINE, "weight", mx.zeros((64, 8)), r"weight has dtype .*float32, but it must be .*uint32"),
        (MXFP4, "scales", mx.zeros((64, 2)), r"scales has dtype .*float32, but it must be .*uint8"),
        (MXFP4, "biases", mx.zeros((64, 2)), r"biases \(64, 2\) is no part of the model"),
    ],
)
def test_parts_of_a_quantized_matrix_that_do_not_fit_are_named(how, name, tensor, fault, tmp_path):
    form = {key: value for key, value in how.items() if key != Q_PROJ}
    stored = quantized(random_weights(CONFIG), Q_PROJ, **form) | {f"{Q_PROJ}.{name}": tensor}
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    with pytest.raises(ModelLoadError, match=rf"tensor {Q_PROJ}.{fault}"):
        load_model(save(tmp_path, CONFIG | {"quantization": how}, stored))


def test_quantized_tensors_need_a_config_that_says_so(tmp_path):
    stored = quantized(random_weights(CONFIG), Q_PROJ, **AFFINE)
    with pytest.raises(ModelLoadError, match=rf"{Q_PROJ}.weight has shape \(64, 8\), .* asks for \(64, 64\)"):
        load_model(save(tmp_path, CONFIG, stored))


def test_integers_are_no_weights(tmp_path):
    weights = random_weights(CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.int32)
    with pytest.raises(ModelLoadError, match=r"model.norm.weight has dtype .*int32"):
        load_model(save(tmp_path, CONFIG, weights))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported \(supported: gemma3_text, llama, .*\)"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "'gemma3' is not supported .*; it is no model of text alone: .* its text part to gemma3_text$",
        ),
        (
            {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}},
            "'qwen3_vl' is not supported .*; it is no model of text alone: .* its text part$",
        ),
        ({"hidden_size": "64"}, r"Expected `int`, got `str` - at `\$.hidden_size`"),
        ({"num_hidden_layers": 0}, r"Expected `int` >= 1 - at `\$.num_hidden_layers`"),
        ({"num_hidden_layers": 1 << 30}, r"Expected `int` <= 4096 - at `\$.num_hidden_layers`"),
        ({"num_key_value_heads": 3}, "4 heads can't share 3 key-value heads"),
        ({"head_dim": 13}, "head size 13 must be even"),
        ({"hidden_act": "gelu"}, r"hidden_act"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            r"rope_type 'longrope' is not supported \(supported: default",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE parameters: .*missing required field `factor`"),
        ({"rope_parameters": {"full_attention": {}}}, "RoPE parameters for each type of layer are not supported"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"rope_theta": -1.0}, "rope_theta"),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_theta of yarn must be above 1",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "RoPE parameters: .*factor"),
        ({"quantization": {"group_size": 32, "bits": 7}}, "bits of affine must be 2 or 3 .* but is 7"),
        ({"quantization": {"group_size": 48, "bits": 4}}, "group_size of affine must be 32 or 64 or 128 but is 48"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "magic"}}, "quantization: .*magic"),
        (
            {"quantization": {"group_size": 32, "bits": 4, Q_PROJ: {"bits": 7}}},
            f"quantization of {Q_PROJ}: .*bits of affine must be .* but is 7",
        ),
        ({"quantization": {"group_size": 32, "bits": 4, Q_PROJ: {"mode": 4}}}, f"quantization of {Q_PROJ}: .*mode"),
        ({"quantization": 4}, "quantization must be an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization method 'gptq' is not supported"),
        ({"model_file": "model.py"}, "model_file"),
    ],
    ids=str,
)
def test_a_config_that_is_wrong_or_not_supported_is_refused(changes, fault, tmp_path):
    with pytest.raises(ModelLoadError, match=fault) as error:
        load_model(save(tmp_path, CONFIG | changes, random_weights(CONFIG)))
    assert str(tmp_path) in error.value.message


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save(tmp_path, CONFIG, random_weights(CONFIG))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match=str(path)):
        load_model(str(tmp_path))


def test_columns_must_be_whole_groups(tmp_path):
    config = CONFIG | {"intermediate_size": 96, "quantization": {"group_size": 64, "bits": 4}}
    down_proj = "model.layers.0.mlp.down_proj"
    weights = random_weights(config)
    weights[f"{down_proj}.weight"] = mx.zeros((64, 12), mx.uint32)
    weights[f"{down_proj}.scales"] = weights[f"{down_proj}.biases"] = mx.zeros((64, 1))
    with pytest.raises(ModelLoadError, match=f"{down_proj} has 96 columns, not groups of 64"):
        load_model(save(tmp_path, config, weights))


def test_weights_that_cannot_be_read_are_said_so(tmp_path, monkeypatch):
    def no_memory(*arrays):
        raise RuntimeError("[malloc] Unable to allocate 1 bytes.")

    directory = save(tmp_path, CONFIG, random_weights(CONFIG))
    monkeypatch.setattr(mx, "eval", no_memory)
    with pytest.raises(ModelLoadError, match="weights can't be read, or memory does not hold them"):
        load_model(directory)


def test_a_directory_without_weights_is_refused(tmp_path):
    parity = Path(__file__).parent / "parity" / "llama"
    shutil.copy(parity / "config.json", tmp_path)
    with pytest.raises(ModelLoadError, match=r"no .*safetensors"):
        load_model(str(tmp_path))
