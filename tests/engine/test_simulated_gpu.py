"""The ops' code for GPUs, and the kernels that it launches, on a GPU that is simulated."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.test_runner import GREEDY, PARITY, generate, make_core
from gpu_simulator import Simulator
from mlx_server import wire
from mlx_server.engine.kernel_cases import kernel_cases
from mlx_server.engine.kernel_check import check_kernels
from mlx_server.models.loader import load_model
from mlx_server.ops import fallbacks
from mlx_server.ops.kernels import set_batch_invariant
from mlx_server.ops.moe import ExpertMatrix, moe_mlp
from models.checkpoints import load_half

ALWAYS = {"gated_mul", "qkv_rope", "sampling_adjust", "sampling_choose"}
LINEAR = {"linear_skinny", "linear_matrix"}
ATTENTION = {"attention_combine", "attention_decode", "attention_matrix"}
EXPERTS = {"moe_route", "moe_hidden", "moe_output", "moe_sort", "moe_matrix", "moe_join"}
STATES = {"gated_delta_conv", "gated_delta_chunk", "gated_delta_scan", "gated_delta_step"}


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    return Simulator(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(simulator: Simulator) -> Iterator[Simulator]:
    simulator.launched.clear()
    with simulator.running():
        yield simulator


@contextmanager
def batch_invariant_mode() -> Iterator[None]:
    set_batch_invariant(True)
    try:
        yield
    finally:
        set_batch_invariant(False)


@pytest.mark.parametrize(
    "name, kv_bits, kernels",
    [
        ("llama", 8, ALWAYS | ATTENTION | LINEAR | {"kv_quantize"}),
        ("gemma3_text", None, ALWAYS | ATTENTION | LINEAR),
        ("qwen3_moe", None, ALWAYS | ATTENTION | EXPERTS | LINEAR),
        ("qwen3_next", None, ALWAYS | ATTENTION | EXPERTS | STATES | LINEAR),
    ],
)
def test_kernels_agree_with_their_references(
    name: str,
    kv_bits: int | None,
    kernels: set[str],
    simulator: Simulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the engine itself checks when it starts on a GPU."""
    model = load_half(PARITY / name / "mlx-4bit", mx.bfloat16, tmp_path, monkeypatch)
    simulator.launched.clear()
    with simulator.running(), caplog.at_level(logging.WARNING):
        check_kernels(kernel_cases(model, kv_bits))
    assert not caplog.messages
    assert simulator.launched == kernels


def test_the_batch_invariant_mode_has_one_way_for_prompts_and_decodes(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_half(PARITY / "qwen3_next/mlx-4bit", mx.bfloat16, tmp_path, monkeypatch)
    simulator.launched.clear()
    with batch_invariant_mode(), simulator.running():
        check_kernels(kernel_cases(model, None))  # raises where one is wrong or missing
    used = {"linear_matrix", "moe_route", "moe_sort", "moe_matrix", "moe_join", "gated_delta_step"}
    assert simulator.launched == ALWAYS | ATTENTION - {"attention_matrix"} | used


@pytest.mark.parametrize("bits", [None, 3, 8])
def test_experts_of_many_tokens(bits: int | None, gpu: Simulator) -> None:
    """Tokens that share some experts and leave others out; in the batch-invariant mode a token's bits are its own."""

    def matrix(*shape: int) -> ExpertMatrix:
        dense = mx.array(rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5))
        if bits is None:
            return ExpertMatrix(dense.astype(mx.float16))
        weight, *rest = mx.quantize(dense, 32, bits)
        return ExpertMatrix(weight, *(array.astype(mx.float16) for array in rest), group_size=32, bits=bits)

    rng = np.random.default_rng(0)
    matrices = {"gate": matrix(12, 160, 96), "up": matrix(12, 160, 96), "down": matrix(12, 96, 160)}
    x = mx.array(rng.standard_normal((90, 96), np.float32)).astype(mx.float16)
    experts = mx.array(rng.choice([0, 3, 3, 3, 7, 11], (90, 3)).astype(np.int32))
    weights = mx.array(rng.random((90, 3), np.float32))

    def exact(matrix: ExpertMatrix) -> ExpertMatrix:
        if matrix.scales is None or matrix.biases is None or bits is None:
            return ExpertMatrix(matrix.weight.astype(mx.float32))
        scales, biases = matrix.scales.astype(mx.float32), matrix.biases.astype(mx.float32)
        return ExpertMatrix(mx.dequantize(matrix.weight, scales, biases, 32, bits))

    def block(tokens: slice) -> mx.array:
        return moe_mlp(x[tokens], experts[tokens], weights[tokens], shared=x[tokens], **matrices)

    y = block(slice(90))
    assert gpu.launched == {"gated_mul", "moe_join", "moe_matrix", "moe_sort"}
    exactly, x32 = {name: exact(matrix) for name, matrix in matrices.items()}, x.astype(mx.float32)
    expected = fallbacks.moe_mlp_fallback(x32, experts, weights, shared=x32, **exactly)
    assert mx.abs(y - expected).max() <= 2e-3 * mx.abs(expected).max()
    with batch_invariant_mode():
        for i in (0, 44, 89):
            assert mx.array_equal(block(slice(i, i + 1))[0], y[i])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "qwen3_next"])
def test_greedy_tokens_are_those_of_transformers(name: str, gpu: Simulator) -> None:
    """The whole engine, prompt in two pieces and pipelined decodes, in float32."""
    directory = PARITY / name / "mlx-4bit"
    arrays = np.load(directory / "fixture.npz")
    prompt, greedy = arrays["prompt"].tolist(), arrays["greedy"].tolist()[:6]
    core = make_core(load_model(str(directory)), max_batch_tokens=40)
    assert generate(core, wire.Submit("a", prompt, len(greedy), [], GREEDY)) == {"a": greedy}
    assert {"qkv_rope", "attention_decode", "sampling_choose"} <= gpu.launched
