"""Log-probabilities, of answers and of prompts, on a real (tiny) model."""

import msgspec
import numpy as np
import pytest

from engine.answers import answers, submit
from engine.test_runner import GREEDY, PARITY
from mlx_server import wire
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(str(PARITY / "llama" / "mlx-4bit"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    prompt: list[int] = np.load(PARITY / "llama" / "mlx-4bit" / "fixture.npz")["prompt"].tolist()
    return prompt


def test_logprobs_are_those_of_the_model(model: Model, prompt: list[int]) -> None:
    """A prompt that contains the answer scores it as the answer was scored."""
    (answer,) = answers(model, submit("a", prompt, logprobs=3))
    whole = wire.Submit("b", prompt + answer.token_ids, 0, [], GREEDY, prompt_logprobs=3)
    for max_batch_tokens in (256, 7):
        (scored,) = answers(model, whole, max_batch_tokens=max_batch_tokens)
        assert scored.token_ids == [] and scored.end.num_output_tokens == 0 and scored.end.finish_reason == "length"
        assert scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == len(whole.prompt_token_ids) - 1
        for mine, its in zip(answer.logprobs, scored.prompt_logprobs[len(prompt) - 1 :], strict=True):
            assert mine.top_ids == its.top_ids and len(its.top_ids) == 3
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)
            assert mine.top_logprobs == pytest.approx(its.top_logprobs, abs=1e-4)
            assert mine.logprob == mine.top_logprobs[0]  # greedy


def test_prompt_is_scored_with_an_answer_and_after_preemption(model: Model, prompt: list[int]) -> None:
    message = msgspec.structs.replace(submit("a", prompt, 40), prompt_logprobs=0)
    (alone,) = answers(model, message)
    assert alone.prompt_logprobs is not None
    assert all(not score.top_ids and score.logprob < 0 for score in alone.prompt_logprobs)
    others = [msgspec.structs.replace(message, request_id=name) for name in "bcd"]
    for answer in answers(model, message, *others, num_blocks=9, max_batch_tokens=16):
        assert (answer.token_ids, answer.prompt_logprobs) == (alone.token_ids, alone.prompt_logprobs)


def test_one_token_prompt_has_no_scores(model: Model, prompt: list[int]) -> None:
    (answer,) = answers(model, msgspec.structs.replace(submit("a", prompt[:1]), prompt_logprobs=2))
    assert answer.prompt_logprobs == []


def test_end_token_has_no_logprobs(model: Model, prompt: list[int]) -> None:
    (free,) = answers(model, submit("a", prompt))
    ended = msgspec.structs.replace(submit("a", prompt, logprobs=0), end_token_ids=[free.token_ids[2]])
    (answer,) = answers(model, ended)
    assert answer.token_ids == free.token_ids[:2] and answer.end.stop_token_id == free.token_ids[2]
    assert len(answer.logprobs) == 2 and answer.logprobs[0].top_ids == []
