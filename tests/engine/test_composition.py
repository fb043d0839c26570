"""Everything composes: every two features in one request, beside a plain neighbour, on a real (tiny) model."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from engine.answers import Answer, answers, run, submit
from engine.guesses import known_answers
from engine.test_runner import BLOCK_SIZE, PARITY, make_core
from engine.test_speculation import counts
from grammars import TOKENS, TinyGrammars
from mlx_server import wire
from mlx_server.chat.grammar import text_grammar
from mlx_server.chat.types import Regex
from mlx_server.models.base import Model
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams
from reference.sampling import Drawn, Params
from reference.sampling import sample as oracle

NUM_TOKENS = 16


@dataclass
class Outcome:
    """What a request got in company."""

    message: wire.Submit
    choices: list[Answer]
    num_drafts: int  # tokens that were guessed for them
    distance: float  # of the logits after its prompt from those of the plain engine
    shared_unit: int  # tokens: what is shared is a multiple of it

    @property
    def num_shared_tokens(self) -> int:
        """Of the prompt, where it may be had from the cache: what is scored must be computed, and the last token."""
        is_scored = self.message.prompt_logprobs is not None
        return 0 if is_scored else (len(self.message.prompt_token_ids) - 1) // self.shared_unit * self.shared_unit


@dataclass(frozen=True)
class Feature:
    """What a request or its engine has in addition."""

    params: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)  # of Submit
    kv_bits: int | None = None
    is_cached: bool = False  # the engine has computed the prompt before
    num_choices: int = 1
    has_drafts: bool = False
    holds: Callable[[Outcome], bool] | None = None  # what shows it; None: the oracle draws another token without it


def of_each(holds: Callable[[Answer], bool]) -> Callable[[Outcome], bool]:
    return lambda outcome: all(map(holds, outcome.choices))


def differ(outcome: Outcome) -> bool:
    """Choices of other seeds, if they are drawn."""
    num_texts = len({tuple(choice.all_token_ids) for choice in outcome.choices})
    return num_texts == (len(outcome.choices) if outcome.message.sampling.temperature else 1)


WORDS = text_grammar(Regex(pattern="[a-z ]*", param=""))
WORD_TOKENS = frozenset(i for i, token in enumerate(TOKENS) if re.fullmatch(b"[a-z ]+", token))
# Of all requests: the model's weights are random, and with a few likely tokens there are repetitions to penalize.
PLAIN = {"temperature": 0.0, "logit_bias": dict.fromkeys([3, 17, 40, 96, 161, 165, 180], 4.5)}
DRAW = {"temperature": 1.2}
END = {"end_token_ids": [5, 40, 180]}
FEATURES = {
    "seed": Feature(DRAW | {"seed": 2**63 + 5}),
    "top_k": Feature(DRAW | {"top_k": 8}),
    "typical_p": Feature(DRAW | {"typical_p": 0.6}),
    "top_p": Feature(DRAW | {"top_p": 0.5}),
    "min_p": Feature(DRAW | {"min_p": 0.14}),
    "top_n_sigma": Feature(DRAW | {"top_n_sigma": 1.5}),
    "xtc": Feature(DRAW | {"xtc_probability": 0.7, "xtc_threshold": 0.05}),
    "logit_bias": Feature({"logit_bias": {3: -100.0, 5: 6.0, 17: 5.0, 162: 5.5, 170: 5.5}}),
    "repetition_penalty": Feature({"repetition_penalty": 1.5}),
    "frequency_penalty": Feature({"frequency_penalty": 0.7}),
    "presence_penalty": Feature({"presence_penalty": 3.0}),
    "penalty_window": Feature({"presence_penalty": 1.0, "penalty_window": 6}),
    "dry": Feature({"dry_multiplier": 4.0, "dry_allowed_length": 1, "dry_sequence_breakers": (96,)}),
    "stop": Feature(fields=END, holds=of_each(lambda a: a.end.finish_reason == "stop")),
    "min_tokens": Feature({"min_tokens": 7}, END),
    "logprobs": Feature({"logprobs": 4}, holds=of_each(lambda a: len(a.logprobs) == len(a.token_ids))),
    "processed_logprobs": Feature(
        {"logprobs": 4, "processed_logprobs": True}, holds=of_each(lambda a: len(a.logprobs) == len(a.token_ids))
    ),
    "grammar": Feature(fields={"grammar": WORDS}),
    "prompt_logprobs": Feature(fields={"prompt_logprobs": 1}, holds=of_each(lambda a: a.prompt_logprobs is not None)),
    "n": Feature(num_choices=3, holds=differ),
    "kv_bits": Feature(kv_bits=8, holds=lambda outcome: 0 < outcome.distance < 0.5),
    "cached_prefix": Feature(
        is_cached=True,
        holds=lambda outcome: outcome.choices[0].end.num_cached_tokens == outcome.num_shared_tokens,
    ),
    # Rows with a grammar have no drafts.
    "speculation": Feature(
        has_drafts=True, holds=lambda outcome: (outcome.num_drafts > 0) == (outcome.message.grammar is None)
    ),
}
OF_THE_ENGINE = ["n", "kv_bits", "cached_prefix", "speculation"]
# These two cut off what is unlikely at nearly the same place, so that only one of them shows.
ALIKE = {("min_p", "top_n_sigma")}


class Recorder:
    """The model, and the logits from which it drew."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.drawn: list[npt.NDArray[np.float32]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, token_ids, ctx):
        return self.model(token_ids, ctx)

    def logits(self, hidden):
        logits = self.model.logits(hidden)
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


def check_that_both_matter(
    answer: Answer, drawn: list[npt.NDArray[np.float32]], message: wire.Submit, pair: dict[str, Feature]
) -> None:
    """Without one of the features that show in tokens, another token would be drawn at some place."""
    tokens = answer.all_token_ids
    shown = set()
    for name, feature in pair.items():
        others = [other for other in pair.values() if other is not feature]
        without = choices_of(message.prompt_token_ids, *others)[0]
        steps = ((expected(drawn[i], without, tokens[:i]).token, token_id) for i, token_id in enumerate(tokens))
        if feature.holds is not None or without == message or any(token != mine for token, mine in steps):
            shown.add(name)
    assert shown == set(pair) or (shown and tuple(pair) in ALIKE)


@dataclass(frozen=True)
class Plain:
    """A model, and what there is without any feature."""

    model: Model
    prompt: list[int]  # longer than a step
    logits: npt.NDArray[np.float32]  # [V] after it
    neighbour: wire.Submit
    its_token_ids: dict[int | None, list[int]]  # by kv_bits

    @staticmethod
    def of(name: str) -> "Plain":
        directory = PARITY / name / "mlx-4bit"
        recorder = Recorder(load_model(str(directory)))
        prompt = np.load(directory / "fixture.npz")["prompt"].tolist()
        answers(recorder, submit("a", prompt, 1))  # type: ignore[arg-type]
        neighbour = submit("neighbour", prompt[3:], NUM_TOKENS + 2)
        its_token_ids = {bits: answers(recorder.model, neighbour, kv_bits=bits)[0].token_ids for bits in (None, 8)}
        return Plain(recorder.model, prompt, recorder.drawn[0], neighbour, its_token_ids)


@pytest.fixture(scope="module")
def llama() -> Plain:
    return Plain.of("llama")


@pytest.fixture(scope="module")
def qwen3_next() -> Plain:
    return Plain.of("qwen3_next")


@pytest.mark.parametrize("names", list(itertools.combinations(FEATURES, 2)), ids="+".join)
def test_every_two_work_together_and_leave_their_neighbour_alone(llama: Plain, names: tuple[str, str]) -> None:
    check_pair(llama, names)


@pytest.mark.parametrize("names", list(itertools.combinations(OF_THE_ENGINE, 2)), ids="+".join)
def test_those_of_the_engine_work_together_with_recurrent_states(qwen3_next: Plain, names: tuple[str, str]) -> None:
    check_pair(qwen3_next, names)


def check_pair(plain: Plain, names: tuple[str, str]) -> None:
    model, prompt = plain.model, plain.prompt
    pair = [FEATURES[name] for name in names]
    choices = choices_of(prompt, *pair)
    kv_bits = max((feature.kv_bits for feature in pair if feature.kv_bits), default=None)
    recorder = Recorder(model)
    alone = answers(recorder, choices[0], kv_bits=kv_bits)  # type: ignore[arg-type]
    check_with_oracle(alone[0], recorder.drawn, choices[0])
    check_that_both_matter(alone[0], recorder.drawn, choices[0], {name: FEATURES[name] for name in names})
    distance = float(np.abs(recorder.drawn[0] - plain.logits).max())
    assert kv_bits or not distance
    alone += [answers(model, choice, kv_bits=kv_bits)[0] for choice in choices[1:]]
    known = {choice.request_id: answer.all_token_ids for choice, answer in zip(choices, alone, strict=True)}
    drafts = known_answers(known | {"neighbour": plain.its_token_ids[kv_bits]}, model.vocab_size)
    core = make_core(
        model,
        kv_bits=kv_bits,
        grammars=TinyGrammars(model.vocab_size),
        speculator=drafts if any(feature.has_drafts for feature in pair) else None,
    )
    is_cached = any(feature.is_cached for feature in pair)
    if is_cached:
        run(core, submit("before", prompt, 1))
    *together, beside = run(core, *choices, plain.neighbour)
    assert beside.token_ids == plain.its_token_ids[kv_bits]
    shared_unit = 1 if model.state_spec is None else BLOCK_SIZE
    outcome = Outcome(choices[0], together, sum(drafts.num_drafts[name] for name in known), distance, shared_unit)
    for i, (mine, its) in enumerate(zip(together, alone, strict=True)):
        assert replace(mine, end=its.end) == its and mine.end.finish_reason == its.end.finish_reason
        assert mine.end.num_cached_tokens == (outcome.num_shared_tokens if is_cached or i > 0 else 0)
    assert all(feature.holds is None or feature.holds(outcome) for feature in pair)
    assert (counts(core)["accepted_tokens"] > 0) == any(feature.has_drafts for feature in pair)


def choices_of(prompt: list[int], *features: Feature) -> list[wire.Submit]:
    """The request with these features, and its other choices."""
    params = dict(PLAIN)
    its_fields: dict[str, Any] = {"end_token_ids": []}
    for feature in features:
        params |= feature.params
        its_fields |= feature.fields
    sampling = SamplingParams(**params)
    return [
        wire.Submit(
            f"choice {k}",
            prompt,
            NUM_TOKENS,
            sampling=msgspec.structs.replace(sampling, seed=sampling.seed + k),
            **its_fields,
        )
        for k in range(max(feature.num_choices for feature in features))
    ]


def test_all_together_after_preemption(llama: Plain) -> None:
    model, prompt = llama.model, llama.prompt
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
