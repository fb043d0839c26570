"""One request on the demo model: prefill and decode of our engine and of mlx-lm, in one run.

mlx-lm gets the same weights, with float32 scales: its fastest form on a CPU.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server import wire
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.model_config import load_config
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.models.gguf import load_gguf_tensors
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

PREFILL_TOKENS = 128
DECODE_TOKENS = 32

# Starts greedy generation of so many tokens after a prompt; each call of the result waits for the next token.
Start = Callable[[list[int], int], Callable[[], None]]


def start_ours(path: Path) -> Start:
    model = load_model(str(path))
    core = make_engine_core(model, plan_memory(model))

    def start(prompt: list[int], max_tokens: int) -> Callable[[], None]:
        while core.has_work:  # the step that was in flight when the last request ended
            core.step()
        refused = core.submit(b"", wire.Submit("bench", prompt, max_tokens, [], SamplingParams(temperature=0.0)))
        assert refused is None

        def next_token() -> None:
            while not core.step():
                pass

        return next_token

    return start


def start_mlx_lm(path: Path) -> Start:
    pytest.importorskip("mlx_lm")
    from mlx import nn  # noqa: PLC0415
    from mlx_lm.generate import generate_step  # noqa: PLC0415
    from mlx_lm.models import llama  # noqa: PLC0415

    header, config = read_gguf(path), load_config(path)
    tensors, plan = load_gguf_tensors(header, config["head_dim"])  # type: ignore[arg-type]
    model = llama.Model(llama.ModelArgs.from_dict(config | {"tie_word_embeddings": True}))

    def how(layer: str, module: nn.Module) -> bool | dict[str, int]:
        quantization = plan.of(layer, has_scales=False)
        return bool(quantization) and {"group_size": quantization.group_size, "bits": quantization.bits}

    nn.quantize(model, class_predicate=how)
    model.load_weights(
        [(name, x if x.dtype == mx.uint32 else x.astype(mx.float32)) for name, x in tensors.items()], strict=True
    )
    mx.eval(model.parameters())

    def start(prompt: list[int], max_tokens: int) -> Callable[[], None]:
        tokens = generate_step(mx.array(prompt), model, max_tokens=max_tokens)
        return lambda: next(tokens)  # type: ignore[return-value]

    return start


@pytest.fixture(scope="module", params=[start_ours, start_mlx_lm], ids=["mlx-server", "mlx-lm"])
def start(request, demo_gguf) -> Start:
    mx.reset_peak_memory()
    return request.param(demo_gguf)


def prompts(num_tokens: int):
    """A new prompt each time, so that no cache helps."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, 49152, num_tokens).tolist()


@pytest.mark.benchmark(group=f"prefill of {PREFILL_TOKENS} tokens, first token included")
def bench_prefill(benchmark, start):
    prompt = prompts(PREFILL_TOKENS)

    def prefill():
        start(next(prompt), 1)()

    benchmark.pedantic(prefill, rounds=3, warmup_rounds=1)
    report(benchmark, PREFILL_TOKENS)


@pytest.mark.benchmark(group=f"decode of {DECODE_TOKENS} tokens after 16, batch of one")
def bench_decode(benchmark, start):
    prompt = prompts(16)

    def setup():
        next_token = start(next(prompt), DECODE_TOKENS + 1)
        next_token()
        return (next_token,), {}

    def decode(next_token):
        for _ in range(DECODE_TOKENS):
            next_token()

    benchmark.pedantic(decode, setup=setup, rounds=3, warmup_rounds=1)
    report(benchmark, DECODE_TOKENS)


def report(benchmark, num_tokens: int) -> None:
    benchmark.extra_info["tokens_per_s"] = round(num_tokens / benchmark.stats.stats.min, 1)
    benchmark.extra_info["peak_memory_mb"] = mx.get_peak_memory() // 1_000_000
