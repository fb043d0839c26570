"""In the batch-invariant mode a greedy request gives the same tokens and, to the last bit, the same log-probabilities,
whatever the engine computes beside it and however it is cut into steps. On the default device."""

import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.answers import Answer, run, submit
from engine.guesses import known_answers
from engine.test_runner import PARITY, make_core
from mlx_server import wire
from mlx_server.config import Launch, ResolvedModel, Settings
from mlx_server.engine import __main__ as engine_main
from mlx_server.errors import ModelLoadError
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from mlx_server.status import StatusPipe

pytestmark = pytest.mark.usefixtures("batch_invariant")

# Dense, with windows, with experts, with recurrent layers; in 4 bits beside 16, as models compute on GPUs, and plain.
MODELS = {
    "llama": ("llama/mlx-4bit", mx.bfloat16),
    "gemma3_text": ("gemma3_text/mlx-4bit", mx.bfloat16),
    "qwen3_moe": ("qwen3_moe/mlx-4bit", mx.float16),
    "qwen3_next": ("qwen3_next/mlx-4bit", mx.bfloat16),
    "llama, plain": ("llama", mx.float16),
    "qwen3_next, float32": ("qwen3_next", mx.float32),
}
MAX_TOKENS = 12


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Model:
    name, dtype = MODELS[request.param]
    directory: Path = tmp_path_factory.mktemp("model")
    shutil.copy(PARITY / name / "config.json", directory)
    tensors = mx.load(str(PARITY / name / "model.safetensors"))
    cast = {key: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for key, a in tensors.items()}
    mx.save_safetensors(str(directory / "model.safetensors"), cast)
    return load_model(str(directory))


def greedy(name: str, length: int, vocab_size: int) -> wire.Submit:
    prompt = np.random.default_rng(length).integers(3, vocab_size, length).tolist()
    return submit(name, prompt, MAX_TOKENS, logprobs=3)


@pytest.fixture(scope="module")
def requests(model) -> list[wire.Submit]:
    return [greedy(f"r{length}", length, model.vocab_size) for length in (1, 15, 30, 78)]


@pytest.fixture(scope="module")
def alone(batch_invariant, model, requests) -> list[Answer]:
    """What each gets from an engine of its own."""
    return [run(make_core(model, max_batch_tokens=256), request)[0] for request in requests]


def assert_same(got: list[Answer], expected: list[Answer]) -> None:
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in expected]
    assert [answer.logprobs for answer in got] == [answer.logprobs for answer in expected]


def test_in_company(model, requests, alone) -> None:
    others = [greedy(f"o{length}", length, model.vocab_size) for length in range(2, 36, 2)]
    core = make_core(model, num_blocks=128, max_running=20)
    assert_same(run(core, *requests, *others)[: len(requests)], alone)


@pytest.mark.parametrize("max_batch_tokens", [7, 40])
def test_cut_prompts(model, requests, alone, max_batch_tokens) -> None:
    assert_same(run(make_core(model, max_batch_tokens=max_batch_tokens), *requests), alone)


def test_after_preemption(model, requests, alone) -> None:
    others = [greedy(f"o{length}", length, model.vocab_size) for length in range(24, 32)]
    # All prompts that there are blocks for enter the first step: how fast steps are decides nothing.
    core = make_core(model, num_blocks=20, max_running=20, max_batch_tokens=512)
    assert_same(run(core, *others, *requests)[len(others) :], alone)
    assert re.search(r"^vllm:num_preemptions_total{.*} [1-9]", core.metrics(), re.MULTILINE)


def test_from_cached_prefixes_with_drafts(model, requests, alone) -> None:
    answers = {request.request_id: answer.token_ids for request, answer in zip(requests, alone, strict=True)}
    core = make_core(model, speculator=known_answers(answers, model.vocab_size))
    for _ in range(2):
        assert_same(run(core, *requests), alone)
    assert re.search(r"^vllm:spec_decode_num_accepted_tokens_total{.*} [1-9]", core.metrics(), re.MULTILINE)
    assert re.search(r"^vllm:prefix_cache_hits_total{.*} [1-9]", core.metrics(), re.MULTILINE)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_setting_comes_before_the_model(monkeypatch, wanted) -> None:
    done: list[object] = []

    def load_model(path: str) -> Model:
        done.append(path)
        raise ModelLoadError("that is all")

    monkeypatch.setattr(engine_main, "set_batch_invariant", done.append)
    monkeypatch.setattr(engine_main, "load_model", load_model)
    settings = Settings(model="m", batch_invariant=wanted)
    launch = Launch(settings=settings, model=ResolvedModel("m", "its path"), engine_address="")
    with Path(os.devnull).open("wb") as file, pytest.raises(ModelLoadError, match="that is all"):
        engine_main.start(launch, 1.0, StatusPipe(file.fileno()))
    assert done == [wanted, "its path"]
