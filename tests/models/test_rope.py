"""RoPE parameters as configs of all ages hold them, and the frequencies that follow from them."""

from typing import Any

import msgspec
import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_server.errors import ModelLoadError
from mlx_server.models.gemma3_text import read_ropes
from mlx_server.models.rope import RopeParameters, read_rope_parameters

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def check(parameters: RopeParameters, expected: dict[str, Any]) -> None:
    assert {**msgspec.to_builtins(parameters), **expected} == msgspec.to_builtins(parameters)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},  # Vicuna's, from before there was a rope_theta
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e6},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5},  # the original context is the model's
        {"rope_scaling": {**YARN, "rope_theta": 1e7}, "rope_theta": 5e5},
    ],
    ids=str,
)
def test_reads_what_transformers_reads(fields):
    config = {"max_position_embeddings": 4096, **fields}
    expected = AutoConfig.for_model("llama", **config).rope_parameters
    check(read_rope_parameters(config, ""), {key: value for key, value in expected.items() if key != "type"})


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {**LLAMA3, "original_max_position_embeddings": 8192},
        {**LLAMA3, "original_max_position_embeddings": 2048, "low_freq_factor": 2.0, "high_freq_factor": 5.0},
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "factor": 0.5},
        {**YARN, "beta_fast": 20.0, "beta_slow": 2.0},
        {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},  # no ramp
        {**YARN, "original_max_position_embeddings": 100},  # a ramp that begins before the first pair
        {**YARN, "beta_fast": 1e4, "beta_slow": 1e-4, "rope_theta": 100.0},  # and one that ends behind the last
        {**YARN, "attention_factor": 1.3},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_those_of_transformers(scaling, head_dim):
    fields = {"rope_parameters": {"rope_theta": 5e5, **scaling}, "max_position_embeddings": 40960}
    config = AutoConfig.for_model("llama", head_dim=head_dim, **fields)
    inverse_freqs, length_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    parameters = read_rope_parameters(fields, "")
    np.testing.assert_allclose(1 / parameters.freqs(head_dim), inverse_freqs.numpy(), 1e-5)
    assert parameters.length_factor == pytest.approx(length_factor)


def test_scaling_that_is_added_to_a_new_config_keeps_its_base():
    """transformers falls back to 10000."""
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "rope_scaling": YARN}
    check(read_rope_parameters(config, ""), {**YARN, "rope_theta": 5e6})


def test_a_type_of_null_is_none():
    parameters = read_rope_parameters({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}}, "")
    check(parameters, {"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "max_position_embeddings", "context_length"),
    [
        (YARN, 40960, 131072),  # added by hand
        (YARN, 131072, 131072),  # as transformers writes it
        (YARN, 262144, 262144),
        ({"rope_type": "yarn", "factor": 2.5}, 40960, 102400),
        ({**YARN, "factor": float("inf")}, 40960, (1 << 31) - 1),
        ({**LLAMA3, "original_max_position_embeddings": 8192}, 131072, 131072),
        ({"rope_type": "linear", "factor": 4.0}, 16384, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, 4096),
        (None, 4096, 4096),
    ],
)
def test_context_length(scaling, max_position_embeddings, context_length):
    config = {"rope_scaling": scaling, "max_position_embeddings": max_position_embeddings}
    assert read_rope_parameters(config, "").context_length(max_position_embeddings) == context_length


LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_theta": 5e5, "rope_local_base_freq": 300.0},
        {"rope_scaling": LINEAR},
        {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_local_base_freq": 300.0},
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
        {"rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 5e5}}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": 300.0}}},
    ],
    ids=str,
)
def test_gemma3_has_one_for_each_type_of_layer(fields):
    expected = AutoConfig.for_model("gemma3_text", **fields).rope_parameters
    full, sliding = read_ropes(fields, "")
    check(full, expected["full_attention"])
    check(sliding, expected["sliding_attention"])


@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 1e6}, 3, "x"], ids=str)
def test_gemma3_with_one_for_all_is_refused(parameters):
    with pytest.raises(ModelLoadError, match="model: rope_parameters must hold an object for each type of layer"):
        read_ropes({"rope_parameters": parameters}, "model")
