"""Embeddings from the engine on real (tiny) models: in parts, in company and after preemption, those of the model."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from engine.test_runner import GREEDY, make_core
from engine.test_scheduler import API
from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.engine.pooling import PooledStates, pooled_range
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from models.dense_kv import DenseContext, DenseKV

PARITY = Path(__file__).parents[1] / "models" / "parity"
POOLINGS: list[wire.Pooling] = ["mean", "last", "cls"]


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> Model:
    """Attention alone, with a window in some layers, and with recurrent layers."""
    return load_model(str(PARITY / request.param / "mlx-4bit"))


def prompts(model: Model) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, model.vocab_size, length).tolist() for length in (1, 5, 16, 40, 33)]


def expected(model: Model, token_ids: list[int], pooling: wire.Pooling) -> npt.NDArray[np.float64]:
    """From the hidden states of the whole prompt in one piece."""
    ctx = DenseContext(DenseKV(), {"a": len(token_ids)})
    hidden = np.array(model(mx.array(token_ids, mx.int32), ctx).astype(mx.float32)).astype(np.float64)  # [T, hidden]
    pooled = {"mean": hidden.mean(axis=0), "last": hidden[-1], "cls": hidden[0]}[pooling]
    return pooled / np.linalg.norm(pooled)


def embed(
    core: EngineCore, *messages: wire.Embed | wire.Submit, stagger: int = 0
) -> dict[str, npt.NDArray[np.float32]]:
    """The vectors of each text; `stagger` steps lie between their arrivals."""
    outputs = []
    for message in messages:
        assert core.submit(API, message) is None
        for _ in range(stagger):
            outputs += core.step()
    while core.has_work:
        outputs += core.step()
    core.check_integrity()
    embedded = [output for _, output in outputs if isinstance(output, wire.Embedded)]
    vectors = {output.request_id: np.frombuffer(output.vector, np.float32) for output in embedded}
    assert len(vectors) == len(embedded) == sum(isinstance(message, wire.Embed) for message in messages)
    assert not [output for _, output in outputs if isinstance(output, wire.Failed)]
    return vectors


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("max_batch_tokens", [7, 512])
def test_vectors_are_pooled_hidden_states(model: Model, pooling: wire.Pooling, max_batch_tokens: int) -> None:
    texts = prompts(model)
    messages = [wire.Embed(str(i), text, pooling) for i, text in enumerate(texts)]
    vectors = embed(make_core(model, max_batch_tokens=max_batch_tokens), *messages)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(vectors[str(i)], expected(model, text, pooling), atol=1e-4)
        assert abs(np.linalg.norm(vectors[str(i)]) - 1) < 1e-5


@pytest.mark.parametrize("pooling", POOLINGS)
def test_company_preemption_and_known_prefixes_change_nothing(model: Model, pooling: wire.Pooling) -> None:
    texts = prompts(model)
    alone = {str(i): embed(make_core(model), wire.Embed(str(i), text, pooling))[str(i)] for i, text in enumerate(texts)}
    requests: list[wire.Embed | wire.Submit] = []
    for i, text in enumerate(texts):
        requests += [wire.Submit(f"text {i}", text, 12, [], GREEDY), wire.Embed(str(i), text, pooling)]
    for core, stagger in [(make_core(model), 2), (make_core(model, num_blocks=7, max_batch_tokens=16), 0)]:
        vectors = embed(core, *requests, stagger=stagger)
        for name, vector in alone.items():
            np.testing.assert_allclose(vectors[name], vector, atol=1e-5)


def test_a_text_may_fill_the_context(model: Model) -> None:
    core = make_core(model, num_blocks=64)
    length = core.info.context_length
    assert embed(core, wire.Embed("a", [5] * length, "last"))["a"].size
    failed = core.submit(API, wire.Embed("b", [5] * (length + 1), "last"))
    assert failed is not None and failed.code == "invalid_request"


@pytest.mark.parametrize("token_ids", [[], [-1], [10**6]])
def test_wrong_tokens_are_refused(model: Model, token_ids: list[int]) -> None:
    core = make_core(model)
    failed = core.submit(API, wire.Embed("a", token_ids, "mean"))
    assert failed is not None and failed.code == "invalid_request"
    assert not core.has_work


def test_a_cancelled_one_gives_nothing(model: Model) -> None:
    core = make_core(model, max_batch_tokens=7)
    assert core.submit(API, wire.Embed("a", prompts(model)[3], "mean")) is None
    core.step()
    assert core.cancel(API, "a")
    while core.has_work:
        assert core.step() == []
    core.check_integrity()


# --- parts ---


@pytest.mark.parametrize("pooling", POOLINGS)
def test_parts_make_a_whole(pooling: wire.Pooling) -> None:
    states = np.random.default_rng(1).normal(size=(10, 4)).astype(np.float32)

    def add(pooled: PooledStates, start: int, end: int) -> None:
        first, last = pooled_range(pooling, start, end)
        pooled.add(start, end, states[first:last].sum(axis=0))

    whole, parts, again = (PooledStates(pooling) for _ in range(3))
    add(whole, 0, 10)
    for start, end in [(0, 3), (3, 4), (4, 10)]:
        add(parts, start, end)
    for start, end in [(0, 3), (3, 7), (0, 2), (7, 9), (2, 10)]:  # begun anew, with a part of before still to come
        add(again, start, end)
    expected = {"mean": states.mean(axis=0), "last": states[-1], "cls": states[0]}[pooling]
    expected = expected / np.linalg.norm(expected)
    for pooled in (whole, parts, again):
        vector = pooled.vector()
        assert vector is not None
        np.testing.assert_allclose(vector, expected, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_states_without_a_direction_have_no_vector(value: float) -> None:
    pooled = PooledStates("mean")
    pooled.add(0, 3, np.full(4, value, np.float32))
    assert pooled.vector() is None
