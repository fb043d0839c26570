"""When a conversation's second turn starts: time to its first token with the history cached, and without.

One engine, one run, the demo model. The peers keep no KV between calls of the interfaces that `bench_engine.py` uses.
"""

import itertools

import numpy as np
import pytest

from mlx_server import wire
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.core import EngineCore
from mlx_server.engine.memory import plan_memory
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

VOCAB_SIZE = 49152
HISTORY_TOKENS = 2000
TURN_TOKENS = 16
CASES = ["cold", "second turn", "same system prompt", "same prompt"]


@pytest.fixture(scope="module")
def core(demo_gguf) -> EngineCore:
    model = load_model(str(demo_gguf))
    return make_engine_core(model, plan_memory(model))


def generate(core: EngineCore, prompt: list[int], max_tokens: int = 1) -> list[int]:
    refused = core.submit(b"", wire.Submit("a", prompt, max_tokens, [], SamplingParams(temperature=0.0)))
    assert refused is None
    answer: list[int] = []
    while core.has_work:
        for _, output in core.step():
            assert isinstance(output, wire.Tokens | wire.Finished)
            answer += output.token_ids
    return answer


@pytest.mark.parametrize("case", CASES)
def bench_first_token(benchmark, core, case):
    benchmark.group = f"first token, {HISTORY_TOKENS} tokens of history and {TURN_TOKENS} new ones"
    rng = np.random.default_rng(CASES.index(case))
    history: list[int] = rng.integers(1000, VOCAB_SIZE, HISTORY_TOKENS).tolist()
    token_ids = itertools.count(1000)

    def setup():
        begin = history
        if case == "cold":
            begin = rng.integers(1000, VOCAB_SIZE, HISTORY_TOKENS).tolist()
        elif case == "second turn":
            prompt = [next(token_ids), *history[1:-TURN_TOKENS]]
            begin = prompt + generate(core, prompt, TURN_TOKENS)
        prompt = begin + rng.integers(1000, VOCAB_SIZE, TURN_TOKENS).tolist()
        if case == "same prompt":
            generate(core, prompt)
        return (core, prompt), {}

    benchmark.pedantic(generate, setup=setup, rounds=2, warmup_rounds=1)
