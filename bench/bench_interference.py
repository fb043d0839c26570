"""What running streams feel of a prompt of 8,000 tokens: the time between two of their tokens, beside it and in as many
steps of the same streams without it, on the demo model. Wanted: p99 with the prompt at most 3 times p50 without it."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from mlx_server import wire
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.core import EngineCore
from mlx_server.engine.memory import plan_memory
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

NUM_STREAMS = 8
PROMPT_TOKENS = 8000
STREAM_TOKENS = 4000
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def core(demo_gguf) -> EngineCore:
    model = load_model(str(demo_gguf))
    return make_engine_core(model, plan_memory(model))


def submit(core: EngineCore, name: str, num_tokens: int, max_tokens: int) -> None:
    prompt = np.random.default_rng(len(name) + num_tokens).integers(1000, 40_000, num_tokens).tolist()
    assert core.submit(b"", wire.Submit(name, prompt, max_tokens, [], GREEDY, client=name)) is None


def gaps(core: EngineCore) -> Iterator[tuple[set[str], float]]:
    """Of each step that gave tokens: whose, and seconds since the one before."""
    last_s = time.perf_counter()
    while core.has_work:
        names = {output.request_id for _, output in core.step() if isinstance(output, wire.Tokens | wire.Finished)}
        if names:
            now_s = time.perf_counter()
            yield names, now_s - last_s
            last_s = now_s


def start_streams(core: EngineCore) -> Iterator[tuple[set[str], float]]:
    """`gaps` from where all streams run."""
    for i in range(NUM_STREAMS):
        submit(core, f"stream {i}", 8 + i, STREAM_TOKENS)
    steps = gaps(core)
    while len(next(steps)[0]) < NUM_STREAMS:
        pass
    return steps


def interfere(core: EngineCore) -> tuple[list[float], list[float], float]:
    """Gaps beside the long prompt, as many without it, and the time to its first token."""
    steps = start_streams(core)
    submit(core, "long", PROMPT_TOKENS, 4)
    start_s = time.perf_counter()
    disturbed: list[float] = []
    for names, gap_s in steps:
        disturbed.append(gap_s)
        if "long" in names:
            break
    first_token_s = time.perf_counter() - start_s
    core.cancel_connection(b"")
    steps = start_streams(core)
    quiet = [next(steps)[1] for _ in disturbed]
    core.cancel_connection(b"")
    return disturbed, quiet, first_token_s


def bench_interference(benchmark, core):
    disturbed, quiet, first_token_s = benchmark.pedantic(interfere, args=(core,), rounds=1, iterations=1)
    p50, p99 = np.percentile(quiet, 50), np.percentile(disturbed, 99)
    benchmark.extra_info |= {
        "quiet_p50_ms": round(1e3 * p50, 1),
        "quiet_p99_ms": round(1e3 * np.percentile(quiet, 99), 1),
        "disturbed_p50_ms": round(1e3 * np.percentile(disturbed, 50), 1),
        "disturbed_p99_ms": round(1e3 * p99, 1),
        "steps": len(disturbed),
        "ratio_p99_to_quiet_p50": round(p99 / p50, 2),
        "long_prompt_first_token_s": round(first_token_s, 1),
    }
