"""What running streams feel when a prompt of 8,000 tokens arrives: the time between two of their tokens, before and
meanwhile, on the demo model. Wanted: p99 with the prompt at most 3 times p50 without it."""

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
QUIET_STEPS = 100
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


def interfere(core: EngineCore) -> tuple[list[float], list[float], float]:
    """Gaps without the long prompt, gaps with it, and the time to its first token."""
    for i in range(NUM_STREAMS):
        submit(core, f"stream {i}", 8 + i, 4000)
    steps = gaps(core)
    for names, _ in steps:
        if len(names) == NUM_STREAMS:
            break
    quiet = [next(steps)[1] for _ in range(QUIET_STEPS)]
    submit(core, "long", PROMPT_TOKENS, 4)
    start_s = time.perf_counter()
    disturbed: list[float] = []
    for names, gap_s in steps:
        disturbed.append(gap_s)
        if "long" in names:
            break
    first_token_s = time.perf_counter() - start_s
    core.cancel_connection(b"")
    return quiet, disturbed, first_token_s


def bench_interference(benchmark, core):
    quiet, disturbed, first_token_s = benchmark.pedantic(interfere, args=(core,), rounds=1, iterations=1)
    p50, p99 = np.percentile(quiet, 50), np.percentile(disturbed, 99)
    benchmark.extra_info |= {
        "quiet_p50_ms": round(1e3 * p50, 1),
        "quiet_p99_ms": round(1e3 * np.percentile(quiet, 99), 1),
        "disturbed_p50_ms": round(1e3 * np.percentile(disturbed, 50), 1),
        "disturbed_p99_ms": round(1e3 * p99, 1),
        "ratio_p99_to_quiet_p50": round(p99 / p50, 2),
        "long_prompt_first_token_s": round(first_token_s, 1),
    }
