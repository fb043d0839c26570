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
from bench.completers import Complete, mlx_lm, ours
from mlx import nn

from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.model_config import load_config
from mlx_server.models.gguf import load_gguf_tensors
from mlx_server.models.loader import load_model

VOCAB_SIZE = 49152
STREAMS = [1, 2, 4, 8, 16, 32]


def load_peer(path: Path) -> nn.Module:
    """mlx-lm's model with the weights of a GGUF file, the same as ours."""
    llama = pytest.importorskip("mlx_lm.models.llama")
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
    return model


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


MAKERS: dict[str, Callable[[Path], Complete]] = {
    "mlx-server": lambda path: ours(load_model(str(path))),
    "mlx-lm": lambda path: mlx_lm(load_peer(path)),
    "llama.cpp": llama_cpp,
}


@pytest.fixture(scope="module", params=MAKERS)
def complete(request, demo_gguf) -> Complete:
    mx.reset_peak_memory()
    return MAKERS[request.param](demo_gguf)


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
