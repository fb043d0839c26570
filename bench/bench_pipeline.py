"""What pipelining gains: tokens a second of the demo model, with the next step launched before the last one's tokens
are read, and with a runner that waits for each step first."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_server import wire
from mlx_server.engine import assembly
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.batch import Batch, StepResult
from mlx_server.engine.memory import plan_memory
from mlx_server.engine.runner import ModelRunner
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

ANSWER_TOKENS = 48


class WaitingRunner(ModelRunner):
    """Lets the device stand still while the host prepares the next step."""

    def run(self, batch: Batch) -> StepResult | None:
        result = super().run(batch)
        mx.synchronize()
        return result


@pytest.fixture(scope="module")
def model(demo_gguf):
    return load_model(str(demo_gguf))


@pytest.mark.parametrize("runner", [ModelRunner, WaitingRunner], ids=["pipelined", "waiting"])
@pytest.mark.parametrize("num_streams", [1, 8, 32])
def bench_pipeline(benchmark, monkeypatch, model, runner, num_streams):
    monkeypatch.setattr(assembly, "ModelRunner", runner)
    core = make_engine_core(model, plan_memory(model))
    benchmark.group = f"{num_streams} at once"
    prompts = np.random.default_rng(0).integers(1000, 40_000, (num_streams, 8)).tolist()

    def complete() -> None:
        for i, prompt in enumerate(prompts):
            message = wire.Submit(str(i), prompt, ANSWER_TOKENS, [], SamplingParams(temperature=0.7, top_p=0.9, seed=i))
            assert core.submit(b"", message) is None
        while core.has_work:
            core.step()

    benchmark.pedantic(complete, rounds=3, warmup_rounds=1)
    num_tokens = num_streams * ANSWER_TOKENS
    benchmark.extra_info["tokens_per_s"] = round(num_tokens / benchmark.stats.stats.min, 1)
