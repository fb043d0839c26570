"""The engine on a real (tiny) model: paged, chunked, batched and pipelined, tokens are those of transformers."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.test_scheduler import API, Collector, run_with_failures
from mlx_server import wire
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.core import EngineCore
from mlx_server.engine.grammar import Grammars
from mlx_server.engine.memory import MemoryPlan
from mlx_server.engine.speculation import Speculator
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

PARITY = Path(__file__).parents[1] / "models" / "parity"
GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 16


@pytest.fixture(scope="module", params=["llama", "mistral_swa", "gemma3_text", "qwen3_moe", "qwen3_next"])
def directory(request) -> Path:
    """Attention alone, with a window, with a window in some layers, with experts, and with recurrent layers."""
    return PARITY / request.param / "mlx-4bit"


@pytest.fixture(scope="module")
def model(directory) -> Model:
    return load_model(str(directory))


@pytest.fixture(scope="module")
def fixture(directory) -> dict[str, list[int]]:
    arrays = np.load(directory / "fixture.npz")
    return {name: arrays[name].tolist() for name in ("prompt", "greedy")}


def make_core(
    model: Model,
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 64,
    max_running: int = 8,
    kv_bits: int | None = None,
    grammars: Grammars | None = None,
    speculator: Speculator | None = None,
) -> EngineCore:
    plan = MemoryPlan(num_blocks, BLOCK_SIZE, max_batch_tokens, max_running, num_snapshots=16, kv_bits=kv_bits)
    return make_engine_core(model, plan, grammars=grammars, max_queue=99, speculator=speculator)


def generate(core: EngineCore, *messages: wire.Submit, stagger: int = 0) -> dict[str, list[int]]:
    """Tokens of each request; `stagger` steps lie between their arrivals."""
    collector = Collector()
    for message in messages:
        assert core.submit(API, message) is None
        for _ in range(stagger):
            collector.take(core.step())
    collector.run_until_idle(core)
    assert all(isinstance(end, wire.Finished) for end in collector.ends.values())
    return collector.tokens


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 512])
def test_greedy_tokens_are_those_of_transformers(model, fixture, max_batch_tokens) -> None:
    message = wire.Submit("a", fixture["prompt"], 32, [], GREEDY)
    tokens = generate(make_core(model, max_batch_tokens=max_batch_tokens), message)
    assert tokens == {"a": fixture["greedy"]}


def test_a_cache_of_eight_bits_gives_the_same_tokens_in_any_batch(model) -> None:
    def core() -> EngineCore:
        return make_core(model, max_batch_tokens=16, kv_bits=8)

    messages = seeded(model)
    alone = {name: tokens for message in messages for name, tokens in generate(core(), message).items()}
    assert generate(core(), *messages, stagger=1) == alone


def test_a_window_lets_a_request_be_longer_than_the_pool() -> None:
    directory = PARITY / "mistral_swa"
    fixture = np.load(directory / "fixture.npz")
    core = make_core(load_model(str(directory)), num_blocks=4, max_batch_tokens=16)  # 64 of its 80 tokens
    message = wire.Submit("a", fixture["prompt"].tolist(), 32, [], GREEDY)
    assert generate(core, message) == {"a": fixture["greedy"].tolist()}


def test_blocks_behind_the_window_serve_other_requests() -> None:
    directory = PARITY / "mistral_swa"
    fixture = np.load(directory / "fixture.npz")
    messages = [wire.Submit(name, fixture["prompt"].tolist(), 32, [], GREEDY) for name in "abc"]
    core = make_core(load_model(str(directory)), num_blocks=10, max_batch_tokens=16)  # all of one take 5
    assert generate(core, *messages, stagger=3) == dict.fromkeys("abc", fixture["greedy"].tolist())


def seeded(model: Model) -> list[wire.Submit]:
    """Eight requests of different lengths, each with parameters of its own."""
    rng = np.random.default_rng(7)
    params = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_k=20, seed=2**63),
        GREEDY,
        SamplingParams(temperature=1.3, top_p=0.8, seed=3),
        SamplingParams(temperature=2.0, min_p=0.1, seed=4),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.05, seed=1),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, dry_multiplier=2.0, seed=6),
        SamplingParams(temperature=1.5, top_n_sigma=2.0, xtc_probability=0.5, xtc_threshold=0.05, seed=7),
    ]
    return [
        wire.Submit(f"r{i}", rng.integers(3, model.vocab_size, 3 + 9 * i).tolist(), 12 + 2 * i, [], sampling)
        for i, sampling in enumerate(params)
    ]


@pytest.mark.parametrize("stagger", [0, 1, 5])
def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_batch(model, stagger) -> None:
    messages = seeded(model)
    alone = {message.request_id: generate(make_core(model), message)[message.request_id] for message in messages}
    assert len({tuple(tokens[:10]) for tokens in alone.values()}) == len(messages)
    assert generate(make_core(model), *messages, stagger=stagger) == alone


def test_a_preempted_request_gives_the_same_tokens(model) -> None:
    messages = seeded(model)
    alone = generate(make_core(model, max_running=1), *messages)
    # All prompts that there are blocks for enter the first step: how fast steps are decides nothing.
    core = make_core(model, num_blocks=7, max_batch_tokens=512)
    assert generate(core, *messages) == alone
    assert re.search(r"^vllm:num_preemptions_total{.*} [1-9]", core.metrics(), re.MULTILINE)


class Poisoned:
    """The model, whose logits after one token are not numbers."""

    def __init__(self, model: Model, poison: int) -> None:
        self._model, self._poison = model, poison
        self.kv_spec, self.state_spec = model.kv_spec, model.state_spec
        self.context_length, self.vocab_size = model.context_length, model.vocab_size
        self.logits = model.logits

    def __call__(self, token_ids, ctx):
        hidden = self._model(token_ids, ctx)
        return mx.where((token_ids == self._poison)[:, None], mx.nan, hidden)


def test_invalid_logits_end_their_own_request_only(model, fixture) -> None:
    poison = next(token_id for token_id in range(99) if token_id not in fixture["prompt"] + fixture["greedy"])
    core = make_core(Poisoned(model, poison), max_batch_tokens=256)
    neighbour = wire.Submit("neighbour", fixture["prompt"], 32, [], GREEDY)
    poisoned = wire.Submit("poisoned", [poison] * 5, 10, [], GREEDY)
    collector = Collector()
    for message in (neighbour, poisoned):
        assert core.submit(API, message) is None
    collector.run_until_idle(core)
    failed = collector.ends["poisoned"]
    assert isinstance(failed, wire.Failed) and failed.code == "invalid_logits"
    assert collector.tokens["neighbour"] == fixture["greedy"]


class OutOfMemory:
    """The model, which at its call number `at` finds no memory."""

    def __init__(self, model: Model, at: int) -> None:
        self._model, self._calls_left = model, at
        self.kv_spec, self.state_spec = model.kv_spec, model.state_spec
        self.context_length, self.vocab_size = model.context_length, model.vocab_size

    def __call__(self, token_ids, ctx):
        hidden = self._model(token_ids, ctx)  # KV pools are handed on by now
        self._calls_left -= 1
        if self._calls_left == 0:
            raise MemoryError("std::bad_alloc")
        return hidden

    def logits(self, hidden):
        return self._model.logits(hidden)


@pytest.mark.parametrize("at", [1, 2, 5, 20])
def test_a_step_without_memory_costs_no_request(model, at) -> None:
    messages = seeded(model)
    alone = generate(make_core(model), *messages)
    core = make_core(OutOfMemory(model, at))
    collector = Collector()
    for message in messages:
        assert core.submit(API, message) is None
    run_with_failures(core, collector, MemoryError)
    assert collector.tokens == alone
