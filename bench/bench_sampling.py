"""Choosing one token a row: ours and mlx-lm's samplers and logits processors, on one set of logits."""

from collections.abc import Callable

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from mlx_server.engine.sampling_state import Draw, SamplingArrays, SamplingState
from mlx_server.ops.sampling import SampleTables, sample
from mlx_server.sampling_params import SamplingParams

# A choosing function takes logits [B, V] and returns [B] token ids, not yet evaluated.
Choose = Callable[[mx.array], mx.array]

FILTERS = {"top_k": 50, "top_p": 0.95, "min_p": 0.05}
PENALTIES = {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3}
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(),
    "top_p": SamplingParams(top_p=0.95),
    "top_k top_p min_p": SamplingParams(**FILTERS),
    "bias, penalties, top_k top_p min_p xtc": SamplingParams(
        logit_bias={7: 1.5}, **PENALTIES, **FILTERS, xtc_probability=0.5
    ),
    "all": SamplingParams(
        logit_bias={7: 1.5},
        **PENALTIES,
        **FILTERS,
        dry_multiplier=0.8,
        top_n_sigma=3.0,
        typical_p=0.98,
        xtc_probability=0.5,
        logprobs=20,
    ),
    "all, no top_k": SamplingParams(
        logit_bias={7: 1.5}, **PENALTIES, dry_multiplier=0.8, typical_p=0.98, top_p=0.95, min_p=0.05, logprobs=20
    ),
}
DEVIATIONS = {"peaked": 3.0, "flat": 0.05}  # of the logits
HISTORY = (np.random.default_rng(1).zipf(1.5, 1000) % 40_000).tolist()  # half prompt, half output


def ours(params: SamplingParams, batch_size: int, vocab_size: int) -> Choose:
    half = len(HISTORY) // 2
    states = [
        SamplingState(msgspec.structs.replace(params, seed=seed), HISTORY[:half], HISTORY[half:], frozenset())
        for seed in range(batch_size)
    ]
    arrays = SamplingArrays.build([Draw(state, len(HISTORY), None) for state in states])
    arrays.rows["mask_row"] = 0 if params.logprobs is not None else -1
    tables = SampleTables(
        masks=mx.full((1, -(-vocab_size // 32)), 0xFFFFFFFF, mx.uint32),
        bias_ids=mx.array(arrays.bias_ids),
        bias_values=mx.array(arrays.bias_values),
        history=mx.array(arrays.history),
    )
    return lambda logits: sample(logits, arrays.rows, tables).token_ids


def mlx_lm(params: SamplingParams, batch_size: int, vocab_size: int) -> Choose:
    """Its server has one sampler for each request: a batch is drawn row by row."""
    if params.dry_multiplier:
        pytest.skip("mlx-lm has no DRY, typical-p, top-n-sigma or mask")
    sample_utils = pytest.importorskip("mlx_lm.sample_utils")
    sampler = sample_utils.make_sampler(
        params.temperature,
        params.top_p,
        params.min_p,
        top_k=params.top_k,
        xtc_probability=params.xtc_probability,
        xtc_threshold=params.xtc_threshold,
    )
    processors = sample_utils.make_logits_processors(
        params.logit_bias or None,
        params.repetition_penalty if params.repetition_penalty != 1 else None,
        len(HISTORY),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_context_size=len(HISTORY) // 2,
        frequency_context_size=len(HISTORY) // 2,
    )
    history = mx.array(HISTORY)

    def choose(logits: mx.array) -> mx.array:
        tokens = []
        for row in range(batch_size):
            its_logits = logits[row : row + 1]
            for processor in processors:
                its_logits = processor(history, its_logits)
            tokens.append(sampler(its_logits - mx.logsumexp(its_logits, axis=-1, keepdims=True)))
        return mx.concatenate(tokens)

    return choose


@pytest.mark.parametrize("make", [ours, mlx_lm], ids=["mlx-server", "mlx-lm"])
@pytest.mark.parametrize("deviation", DEVIATIONS.values(), ids=DEVIATIONS.keys())
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("batch_size", [1, 8, 32])
@pytest.mark.parametrize("vocab_size", [49152, 151936])
def bench_sample(benchmark, make, deviation, params, batch_size, vocab_size):
    setting = next(name for name, value in SETTINGS.items() if value is params)
    benchmark.group = f"sample {batch_size} x {vocab_size}: {setting}"
    logits = mx.array(np.random.default_rng(0).standard_normal((batch_size, vocab_size)).astype(np.float32) * deviation)
    choose = make(params, batch_size, vocab_size)
    mx.eval(logits, choose(logits))
    mx.reset_peak_memory()
    benchmark.pedantic(lambda: mx.eval(choose(logits)), rounds=10, warmup_rounds=1)
    benchmark.extra_info["ms_per_row"] = round(benchmark.stats.stats.min * 1000 / batch_size, 3)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() / 1e6
