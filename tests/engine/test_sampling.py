"""Parameters of sampling on a real (tiny) model, alone, two by two, and beside a plain neighbour."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from engine.guesses import known_answers
from engine.test_runner import GREEDY, make_core
from engine.test_scheduler import API, Collector
from grammars import TOKENS, TinyGrammars, text_of
from mlx_server import wire
from mlx_server.chat.grammar import text_grammar
from mlx_server.chat.types import Regex
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams
from reference.sampling import Drawn, Params
from reference.sampling import sample as oracle

PARITY = Path(__file__).parents[1] / "models" / "parity"
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(str(PARITY / "llama" / "mlx-4bit"))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    prompt: list[int] = np.load(PARITY / "llama" / "mlx-4bit" / "fixture.npz")["prompt"].tolist()
    return prompt


@dataclass
class Answer:
    token_ids: list[int]
    end: wire.Finished
    logprobs: list[wire.TokenLogprobs]
    prompt_logprobs: list[wire.TokenLogprobs] | None

    @property
    def all_token_ids(self) -> list[int]:
        stop_token_id = self.end.stop_token_id
        return self.token_ids if stop_token_id is None else [*self.token_ids, stop_token_id]


def answers(model: Model, *messages: wire.Submit, **core: Any) -> list[Answer]:
    """What the requests get, all in one engine."""
    engine = make_core(model, grammars=TinyGrammars(model.vocab_size), **core)
    collector = Collector()
    logprobs: dict[str, list[wire.TokenLogprobs]] = {message.request_id: [] for message in messages}
    prompt_logprobs: dict[str, list[wire.TokenLogprobs]] = {}
    for message in messages:
        assert engine.submit(API, message) is None
    while engine.has_work:
        outputs = engine.step()
        collector.take(outputs)
        for _, output in outputs:
            assert isinstance(output, wire.Tokens | wire.Finished), output
            if output.logprobs is not None:
                assert len(output.logprobs) == len(output.token_ids)
                logprobs[output.request_id] += output.logprobs
            if output.prompt_logprobs is not None:
                assert output.request_id not in prompt_logprobs
                prompt_logprobs[output.request_id] = output.prompt_logprobs
    result = []
    for message in messages:
        name = message.request_id
        end = collector.ends[name]
        assert isinstance(end, wire.Finished)
        result.append(Answer(collector.tokens[name], end, logprobs[name], prompt_logprobs.get(name)))
    return result


def submit(name: str, prompt: list[int], max_tokens: int = NUM_TOKENS, **params: Any) -> wire.Submit:
    return wire.Submit(name, prompt, max_tokens, [], SamplingParams(**{"temperature": 0.0} | params))


# --- Log-probabilities ---


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


# --- Every two together, beside a plain neighbour ---


@dataclass(frozen=True)
class Feature:
    """What a request has in addition."""

    params: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)  # of Submit
    holds: Callable[[Answer], bool] = lambda answer: True  # beside the tokens, which are the oracle's


WORDS = text_grammar(Regex(pattern="[a-z ]*", param=""))
WORD_TOKENS = frozenset(i for i, token in enumerate(TOKENS) if re.fullmatch(b"[a-z ]+", token))
DRAW = {"temperature": 1.2, "seed": 2**63 + 5}
FEATURES = {
    "seed": Feature(DRAW),
    "top_k": Feature(DRAW | {"top_k": 40}),
    "typical_p": Feature(DRAW | {"typical_p": 0.7}),
    "top_p": Feature(DRAW | {"top_p": 0.8}),
    "min_p": Feature(DRAW | {"min_p": 0.2}),
    "top_n_sigma": Feature(DRAW | {"top_n_sigma": 2.0}),
    "xtc": Feature(DRAW | {"xtc_probability": 0.7, "xtc_threshold": 0.02}),
    "logit_bias": Feature({"logit_bias": {3: 9.0, 17: 4.0, 40: -100.0}}),
    "repetition_penalty": Feature({"repetition_penalty": 1.5}),
    "frequency_penalty": Feature({"frequency_penalty": 1.5, "presence_penalty": 0.5}),
    "penalty_window": Feature({"presence_penalty": 2.0, "repetition_penalty": 1.2, "penalty_window": 3}),
    "dry": Feature({"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": (3,)}),
    "stop": Feature(fields={"end_token_ids": [3]}, holds=lambda a: 3 not in a.token_ids),
    "min_tokens": Feature(
        {"min_tokens": 5, "logit_bias": {3: 9.0, 17: 4.0}}, {"end_token_ids": [3]}, lambda a: len(a.token_ids) >= 5
    ),
    "logprobs": Feature({"logprobs": 4}, holds=lambda a: all(len(entry.top_ids) == 4 for entry in a.logprobs)),
    "processed_logprobs": Feature(
        {"logprobs": 4, "processed_logprobs": True}, holds=lambda a: all(entry.logprob <= 0 for entry in a.logprobs)
    ),
    "grammar": Feature(
        fields={"grammar": WORDS}, holds=lambda a: re.fullmatch("[a-z ]*", text_of(a.token_ids)) is not None
    ),
    "prompt_logprobs": Feature(fields={"prompt_logprobs": 1}, holds=lambda a: a.prompt_logprobs is not None),
}


class Recorder:
    """The model, and the logits from which it drew."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.drawn: list[npt.NDArray[np.float32]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, token_ids, ctx):
        return self._model(token_ids, ctx)

    def logits(self, hidden):
        logits = self._model.logits(hidden)
        if len(logits) == 1:  # a prompt's scores are more
            self.drawn.append(np.array(logits[0].astype(mx.float32)))
        return logits


def expected(logits: npt.NDArray[np.float32], message: wire.Submit, output: list[int]) -> Drawn:
    params = message.sampling
    bias = dict(params.logit_bias)
    if len(output) < params.min_tokens:
        bias |= dict.fromkeys(message.end_token_ids, -np.inf)
    history = (*message.prompt_token_ids, *output)
    shared = {f.name: getattr(params, f.name) for f in fields(Params) if hasattr(params, f.name)}
    return oracle(
        logits,
        Params(
            **shared,
            bias=bias,
            allowed=None if message.grammar is None else WORD_TOKENS.union(message.end_token_ids),
            history=history,
            num_output=len(output),
            breakers=params.dry_sequence_breakers,
            position=len(history),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        ),
    )


def check_with_oracle(answer: Answer, drawn: list[npt.NDArray[np.float32]], message: wire.Submit) -> None:
    tokens = answer.all_token_ids
    for i, token_id in enumerate(tokens):
        step = expected(drawn[i], message, tokens[:i])
        if step.margin < 1e-5:
            continue
        assert token_id == step.token, (i, step)
        if i < len(answer.logprobs):
            scored = answer.logprobs[i]
            assert scored.logprob == pytest.approx(step.logprob, abs=1e-4)
            assert scored.top_ids == [top_id for top_id, _ in step.top]
            assert scored.top_logprobs == pytest.approx([logprob for _, logprob in step.top], abs=1e-4)


@pytest.fixture(scope="module")
def neighbour(model: Model, prompt: list[int]) -> tuple[wire.Submit, list[int]]:
    message = submit("neighbour", prompt[3:], 20)
    return message, answers(model, message)[0].token_ids


@pytest.mark.parametrize("names", list(itertools.combinations(FEATURES, 2)), ids="+".join)
def test_every_two_work_together_and_leave_their_neighbour_alone(
    model: Model, prompt: list[int], neighbour: tuple[wire.Submit, list[int]], names: tuple[str, str]
) -> None:
    features = [FEATURES[name] for name in names]
    params = {"temperature": 0.0} | features[0].params | features[1].params
    message = wire.Submit(
        "both",
        prompt,
        NUM_TOKENS,
        **{"end_token_ids": []} | features[0].fields | features[1].fields,
        sampling=SamplingParams(**params),
    )
    recorder = Recorder(model)
    (alone,) = answers(recorder, message)  # type: ignore[arg-type]
    check_with_oracle(alone, recorder.drawn, message)
    both, beside = answers(model, message, neighbour[0])
    assert beside.token_ids == neighbour[1]
    assert both.token_ids == alone.token_ids and both.end.finish_reason == alone.end.finish_reason
    assert [entry.top_ids for entry in both.logprobs] == [entry.top_ids for entry in alone.logprobs]
    assert all(feature.holds(both) for feature in features)
    drafts = known_answers({"both": alone.all_token_ids, "neighbour": neighbour[1]}, model.vocab_size)
    guessed, beside = answers(model, message, neighbour[0], speculator=drafts)
    assert beside.token_ids == neighbour[1]
    assert replace(guessed, end=alone.end) == alone and guessed.end.finish_reason == alone.end.finish_reason


def test_all_together_after_preemption(model: Model, prompt: list[int]) -> None:
    params: dict[str, Any] = {}
    for feature in FEATURES.values():
        params |= feature.params
    messages = [submit(name, prompt, 40, **params | {"seed": i}) for i, name in enumerate("abcd")]
    alone = [answers(model, message)[0] for message in messages]
    drafts = known_answers({name: answer.all_token_ids for name, answer in zip("abcd", alone, strict=True)}, 50)
    for speculator in None, drafts:
        together = answers(model, *messages, num_blocks=9, max_batch_tokens=16, speculator=speculator)
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        assert [answer.logprobs for answer in together] == [answer.logprobs for answer in alone]
