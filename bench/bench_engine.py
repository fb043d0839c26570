"""The demo model from prompt to answer: our engine, mlx-lm and llama.cpp on the same weights, in one run.

mlx-lm gets float32 scales, its fastest form on a CPU. llama.cpp is the build in PyPI's `xllamacpp`; unlike the others
it rounds activations to 8 bits. Peers that are not installed are skipped.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest

from mlx_server import wire
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.model_config import load_config
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.models.gguf import load_gguf_tensors
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

VOCAB_SIZE = 49152
STREAMS = [1, 2, 4, 8, 16, 32]

# Answers all prompts at once, each greedily with so many tokens.
Complete = Callable[[list[list[int]], int], None]


def ours(path: Path) -> Complete:
    model = load_model(str(path))
    core = make_engine_core(model, plan_memory(model))

    def complete(prompts: list[list[int]], max_tokens: int) -> None:
        for i, prompt in enumerate(prompts):
            refused = core.submit(b"", wire.Submit(str(i), prompt, max_tokens, [], SamplingParams(temperature=0.0)))
            assert refused is None
        while core.has_work:
            core.step()

    return complete


def mlx_lm(path: Path) -> Complete:
    pytest.importorskip("mlx_lm")
    from mlx import nn  # noqa: PLC0415
    from mlx_lm.generate import BatchGenerator, generate_step  # noqa: PLC0415
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


def llama_cpp(path: Path) -> Complete:
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = max(STREAMS)
    params.n_ctx = 256 * max(STREAMS)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = psutil.cpu_count(logical=False)
    server = xllamacpp.Server(params)

    def complete(prompts: list[list[int]], max_tokens: int) -> None:
        prompt: Any = prompts if len(prompts) > 1 else prompts[0]
        answer = server.handle_completions(
            {"prompt": prompt, "n_predict": max_tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        )
        assert all(choice["finish_reason"] == "length" for choice in answer["choices"]), answer

    return complete


@pytest.fixture(scope="module", params=[ours, mlx_lm, llama_cpp], ids=["mlx-server", "mlx-lm", "llama.cpp"])
def complete(request, demo_gguf) -> Complete:
    mx.reset_peak_memory()
    return request.param(demo_gguf)


def random_prompts(num_tokens: int) -> Iterator[list[int]]:
    """A new prompt each time, so that no cache helps."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(1000, VOCAB_SIZE, num_tokens).tolist()


@pytest.mark.parametrize(
    ("num_streams", "prompt_tokens", "answer_tokens"), [(1, 128, 1), *((num_streams, 8, 32) for num_streams in STREAMS)]
)
def bench_completion(benchmark, complete, num_streams, prompt_tokens, answer_tokens):
    benchmark.group = f"{num_streams} at once: {prompt_tokens} prompt tokens, {answer_tokens} answer tokens"
    prompts = random_prompts(prompt_tokens)

    def setup():
        return ([next(prompts) for _ in range(num_streams)], answer_tokens), {}

    benchmark.pedantic(complete, setup=setup, rounds=2, warmup_rounds=0)
    num_tokens = num_streams * (prompt_tokens + answer_tokens - 1)
    benchmark.extra_info["tokens_per_s"] = round(num_tokens / benchmark.stats.stats.min, 1)
    benchmark.extra_info["mlx_peak_memory_mb"] = mx.get_peak_memory() // 1_000_000
