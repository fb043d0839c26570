"""A first request of our own, so that the first user does not wait for compiled kernels and mapped memory."""

import mlx.core as mx

from mlx_server import wire
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.core import EngineCore
from mlx_server.engine.kernel_cases import kernel_cases
from mlx_server.engine.kernel_check import check_kernels
from mlx_server.engine.memory import BLOCK_SIZE, MemoryPlan
from mlx_server.errors import ModelLoadError
from mlx_server.models.base import Model
from mlx_server.sampling_params import SamplingParams

PROMPT_TOKENS = 8
OUTPUT_TOKENS = 2
STEP_TOKENS = 64


def check_model_kernels(model: Model, kv_bits: int | None) -> None:
    """On a GPU, disable those of the model's kernels that don't compute there what they should.

    ModelLoadError if that would end the batch-invariant mode.
    """
    if mx.default_device().type == mx.gpu:
        check_kernels(kernel_cases(model, kv_bits))
        mx.clear_cache()


def warm_up(core: EngineCore) -> None:
    """Prefill and decode once, greedy and sampled. A model that can't is refused here, not at its first request."""
    for sampling in SamplingParams(temperature=0.0), SamplingParams(top_p=0.9):
        _run(core, PROMPT_TOKENS, sampling)


def measure_step(model: Model) -> int:
    """Bytes of activations that a step takes at most for each of its tokens."""
    num_tokens = min(STEP_TOKENS, model.context_length - OUTPUT_TOKENS)
    core = make_engine_core(model, MemoryPlan(2 * STEP_TOKENS // BLOCK_SIZE, BLOCK_SIZE, STEP_TOKENS, max_running=1))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _run(core, num_tokens, SamplingParams(temperature=0.0))
    step_bytes = (mx.get_peak_memory() - before) // num_tokens
    mx.clear_cache()  # what the step took is to be had for the KV cache
    return step_bytes


def _run(core: EngineCore, num_tokens: int, sampling: SamplingParams) -> None:
    submit = wire.Submit("warm-up", [0] * num_tokens, OUTPUT_TOKENS, [], sampling)
    if (failed := core.submit(b"", submit)) is not None:
        raise ModelLoadError(f"The model can't run: {failed.message}.")
    while core.has_work:
        for _, output in core.step():
            if isinstance(output, wire.Failed):
                raise ModelLoadError(f"The model can't run: {output.message}")
