"""Drawing one token a row: ours and mlx-lm's samplers, on one set of logits."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.sampling import sample
from mlx_server.sampling_params import SamplingParams

# A drawing function takes logits [B, V] and returns [B] token ids, not yet evaluated.
Draw = Callable[[mx.array], mx.array]

SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(),
    "top_p": SamplingParams(top_p=0.95),
    "top_k top_p min_p": SamplingParams(top_k=50, top_p=0.95, min_p=0.05),
}
DEVIATIONS = {"peaked": 3.0, "flat": 0.05}  # of the logits


def ours(params: SamplingParams, batch_size: int) -> Draw:
    arrays = {
        "temperature": mx.array(np.full(batch_size, params.temperature, np.float32)),
        "top_k": mx.array(np.full(batch_size, params.top_k, np.int32)),
        "top_p": mx.array(np.full(batch_size, params.top_p, np.float32)),
        "min_p": mx.array(np.full(batch_size, params.min_p, np.float32)),
        "seed": mx.array(np.arange(batch_size, dtype=np.uint64)),
        "position": mx.array(np.zeros(batch_size, np.uint32)),
    }
    return lambda logits: sample(logits, **arrays)


def mlx_lm(params: SamplingParams, batch_size: int) -> Draw:
    """Its server has one sampler for each request: a batch is drawn row by row."""
    sample_utils = pytest.importorskip("mlx_lm.sample_utils")
    sampler = sample_utils.make_sampler(params.temperature, params.top_p, params.min_p, top_k=params.top_k)

    def draw(logits: mx.array) -> mx.array:
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.concatenate([sampler(log_probabilities[row : row + 1]) for row in range(batch_size)])

    return draw


@pytest.mark.parametrize("make", [ours, mlx_lm], ids=["mlx-server", "mlx-lm"])
@pytest.mark.parametrize("deviation", DEVIATIONS.values(), ids=DEVIATIONS.keys())
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("vocab_size", [49152, 151936])
def bench_sample(benchmark, make, deviation, params, batch_size, vocab_size):
    setting = next(name for name, value in SETTINGS.items() if value is params)
    benchmark.group = f"sample {batch_size} x {vocab_size}: {setting}"
    logits = mx.array(np.random.default_rng(0).standard_normal((batch_size, vocab_size)).astype(np.float32) * deviation)
    draw = make(params, batch_size)
    mx.eval(logits, draw(logits))
    mx.reset_peak_memory()
    benchmark.pedantic(lambda: mx.eval(draw(logits)), rounds=10, warmup_rounds=1)
    benchmark.extra_info["ms_per_row"] = round(benchmark.stats.stats.min * 1000 / batch_size, 3)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() / 1e6
