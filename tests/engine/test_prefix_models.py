"""The prefix cache on real (tiny) models of each kind: tokens with it are those without it."""

import itertools
import random
from collections.abc import Iterator

import pytest

from engine.test_runner import PARITY, make_core
from engine.test_scheduler import API, Collector
from mlx_server import wire
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

MAX_PROMPT = 150


@pytest.fixture(scope="module", params=["llama", "mistral_swa", "gemma3_text", "qwen3_moe", "qwen3_next"])
def model(request) -> Model:
    """Attention alone, with a window, with a window in some layers, with experts, and with recurrent layers."""
    return load_model(str(PARITY / request.param / "mlx-4bit"))


class Chats:
    """Conversations that begin alike, go on, and branch, as `seed` says."""

    def __init__(self, model: Model, seed: int) -> None:
        self.rng, self.vocab_size = random.Random(seed), model.vocab_size
        self.histories = [self.tokens(50)]
        self.names = map(str, itertools.count())

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(3, self.vocab_size) for _ in range(count)]

    def submit(self) -> wire.Submit:
        rng, history = self.rng, self.rng.choice(self.histories)
        begin = history if rng.random() < 0.5 else history[: rng.randint(0, len(history))]
        prompt = begin[: MAX_PROMPT - 20] + self.tokens(rng.randint(1, 20))
        temperature = rng.choice([0.0, 1.0])
        sampling = SamplingParams(temperature=temperature, seed=rng.randrange(100))
        salt = rng.choice(["", "", "", "salt"])
        return wire.Submit(next(self.names), prompt, rng.randint(1, 40), [], sampling, cache_salt=salt)


def alone(model: Model, message: wire.Submit) -> list[int]:
    """The tokens of a request in an engine that has seen nothing."""
    collector = Collector()
    core = make_core(model)
    core.submit(API, message)
    collector.run_until_idle(core)
    return collector.tokens[message.request_id]


def cached(collector: Collector) -> Iterator[int]:
    for end in collector.ends.values():
        assert isinstance(end, wire.Finished)
        yield end.num_cached_tokens


@pytest.mark.parametrize(
    "sizes",
    [{"num_blocks": 200}, {"num_blocks": 12}, {"num_blocks": 40, "max_batch_tokens": 20}],
    ids=["roomy", "under pressure", "small steps"],
)
def test_cached_prefixes_change_no_token(model, sizes) -> None:
    chats, core, collector = Chats(model, seed=5), make_core(model, **sizes), Collector()
    expected: dict[str, list[int]] = {}
    for _ in range(16):
        message = chats.submit()
        expected[message.request_id] = alone(model, message)
        chats.histories = [*chats.histories[-4:], message.prompt_token_ids + expected[message.request_id]]
        while core.submit(API, message) is not None:  # the queue is full
            collector.take(core.step())
        for _ in range(chats.rng.choice([0, 1, 3, 30])):
            if core.has_work:
                collector.take(core.step())
                core.check_integrity()
        if chats.rng.random() < 0.1 and core.cancel(API, message.request_id):
            del expected[message.request_id]
            collector.tokens.pop(message.request_id, None)
    collector.run_until_idle(core)
    assert collector.tokens == expected
    assert sum(cached(collector)) > 0


def test_a_second_turn_is_cached(model) -> None:
    core, collector = make_core(model), Collector()
    first = wire.Submit("first", Chats(model, 1).tokens(70), 60, [], SamplingParams(temperature=0.0))
    core.submit(API, first)
    collector.run_until_idle(core)
    history = first.prompt_token_ids + collector.tokens["first"]  # 130 tokens
    second = wire.Submit("second", [*history, 5, 6], 20, [], SamplingParams(temperature=0.0))
    core.submit(API, second)
    collector.run_until_idle(core)
    assert list(cached(collector)) == [0, 129 if model.state_spec is None else 128]
    assert collector.tokens["second"] == alone(model, second)
