"""Our engine and mlx-lm as functions that answer prompts, for benchmarks that compare them on the same weights."""

from collections.abc import Callable

import mlx.core as mx
import pytest
from mlx import nn

from mlx_server import wire
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.models.base import Model
from mlx_server.sampling_params import SamplingParams

# Answers all prompts at once, each greedily with so many tokens.
Complete = Callable[[list[list[int]], int], None]


def ours(model: Model) -> Complete:
    core = make_engine_core(model, plan_memory(model))

    def complete(prompts: list[list[int]], max_tokens: int) -> None:
        for i, prompt in enumerate(prompts):
            refused = core.submit(b"", wire.Submit(str(i), prompt, max_tokens, [], SamplingParams(temperature=0.0)))
            assert refused is None
        while core.has_work:
            core.step()

    return complete


def mlx_lm(model: nn.Module) -> Complete:
    pytest.importorskip("mlx_lm")
    from mlx_lm.generate import BatchGenerator, generate_step  # noqa: PLC0415

    def complete(prompts: list[list[int]], max_tokens: int) -> None:
        if len(prompts) == 1:
            for _ in generate_step(mx.array(prompts[0]), model, max_tokens=max_tokens):
                pass
            return
        generator = BatchGenerator(model, max_tokens=max_tokens, completion_batch_size=len(prompts))
        generator.insert(prompts)
        num_open = len(prompts)
        while num_open:
            num_open -= sum(response.finish_reason is not None for response in generator.next_generated())
        generator.close()

    return complete
