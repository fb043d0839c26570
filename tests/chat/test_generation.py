from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from fake_engine import END, TIMINGS, Backend, answer, endless, failing, fake_model, silent, until
from generations import collect, start
from mlx_server.chat.generation import Generation
from mlx_server.chat.types import (
    ChatMessage,
    Choice,
    CompletionRequest,
    Done,
    Event,
    PromptLogprobs,
    PromptProgress,
    ScoredToken,
    TextDelta,
    Usage,
    total_usage,
)
from mlx_server.errors import GenerationError, InvalidRequestError, OverloadedError, RequestTimeoutError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import Finished, RequestOutput, Submit, Tokens

PROMPT = "user: hi\n"


def test_an_answer_is_text_and_then_done(backend: Backend) -> None:
    backend.engine.script = answer("Hello, Wörld 😀!")
    text, done = collect(start(backend))
    assert text == "Hello, Wörld 😀!"
    assert done == Done("stop", Usage(len(PROMPT), len(text.encode()) + 1), timings=TIMINGS)


def test_the_engine_gets_what_was_asked_for(backend: Backend) -> None:
    collect(start(backend, sampling=SamplingParams(temperature=0.3, top_k=4, seed=9), max_tokens=20))
    (submit,) = backend.engine.submits
    assert submit.prompt_token_ids == list(PROMPT.encode())
    assert (submit.max_tokens, submit.end_token_ids) == (20, [END])
    assert submit.sampling == SamplingParams(temperature=0.3, top_k=4, seed=9)


@pytest.mark.usefixtures("outputs_one_by_one")
def test_no_event_holds_half_a_character(backend: Backend) -> None:
    backend.engine.script = answer("é😀漢")
    assert [event.text for event in start(backend) if isinstance(event, TextDelta)] == ["é", "😀", "漢"]


def test_half_a_character_at_the_end_is_dropped(backend: Backend) -> None:
    backend.engine.script = answer("ab😀")
    text, done = collect(start(backend, max_tokens=4))
    assert (text, done.finish_reason, done.usage.num_output_tokens) == ("ab", "length", 4)


@pytest.mark.usefixtures("outputs_one_by_one")
def test_tokens_of_one_step_are_one_delta(backend: Backend) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput]:
        yield Tokens(submit.request_id, list(b"one "))
        yield Finished(submit.request_id, list(b"two"), "length", 3, 7)

    backend.engine.script = script
    *deltas, done = start(backend)
    assert deltas == [TextDelta("one "), TextDelta("two")]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.usage) == ("length", Usage(len(PROMPT), 7, 3))


@pytest.mark.parametrize("stop", ["STOP", "T", "OP!", "S"])
def test_a_stop_string_ends_the_work(backend: Backend, stop: str) -> None:
    text = "go on STOP! never"
    backend.engine.script = lambda submit: (
        Tokens(submit.request_id, [text.encode()[i % len(text)]]) for i in range(10**9)
    )
    shown, done = collect(start(backend, stop=[stop]))
    assert shown == text[: text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.usage.num_output_tokens == text.index(stop) + len(stop)
    until(lambda: backend.engine.cancelled)


@pytest.mark.parametrize("max_tokens, finish_reason", [(50, "stop"), (9, "length")])
def test_text_that_looked_like_a_stop_string_comes_at_the_end(
    backend: Backend, max_tokens: int, finish_reason: str
) -> None:
    backend.engine.script = answer("so far ST")
    text, done = collect(start(backend, stop=["STOP"], max_tokens=max_tokens))
    assert (text, done.finish_reason) == ("so far ST", finish_reason)


def test_a_stop_string_in_the_last_tokens_counts(backend: Backend) -> None:
    backend.engine.script = answer("abc!")
    text, done = collect(start(backend, stop=["c!"], max_tokens=4))
    assert (text, done.finish_reason) == ("ab", "stop")


def test_max_tokens_is_clipped_to_the_room_left(backend: Backend) -> None:
    collect(start(backend, max_tokens=32_000))
    assert backend.engine.submits[0].max_tokens == 100 - len(PROMPT)


@pytest.mark.parametrize("length, message", [(93, "100 tokens"), (700, "707 tokens"), (2000, "2007 bytes")])
def test_a_prompt_that_leaves_no_room_never_reaches_the_engine(backend: Backend, length: int, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"maximum context length is 100 tokens.* {message}") as error:
        start(backend, messages=[ChatMessage(role="user", content="x" * length)])
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "messages")
    assert not backend.engine.submits


def test_the_longest_prompt_leaves_one_token(backend: Backend) -> None:
    text, done = collect(start(backend, messages=[ChatMessage(role="user", content="x" * 92)]))
    assert (text, done.finish_reason, done.usage.num_prompt_tokens) == ("H", "length", 99)


def test_a_request_that_takes_too_long_is_cancelled(backend: Backend) -> None:
    backend.engine.script = endless
    with pytest.raises(RequestTimeoutError):
        collect(start(backend, timeout_s=0.1))
    until(lambda: backend.engine.cancelled)


def test_closing_cancels_once(backend: Backend) -> None:
    backend.engine.script = silent
    generation = start(backend)
    until(lambda: backend.engine.running)
    generation.close()
    generation.close()
    until(lambda: backend.engine.cancelled)
    assert list(generation) == []
    other = start(backend)
    until(lambda: backend.engine.running)
    assert len(backend.engine.cancelled) == 1
    other.close()


def test_closing_a_finished_request_cancels_nothing(backend: Backend) -> None:
    generation = start(backend)
    collect(generation)
    generation.close()
    collect(start(backend))
    assert not backend.engine.cancelled


@pytest.mark.parametrize(
    "code, kind",
    [("invalid_logits", GenerationError), ("queue_full", OverloadedError), ("engine_died", OverloadedError)],
)
def test_a_failure_is_an_error(backend: Backend, code: str, kind: type[GenerationError | OverloadedError]) -> None:
    backend.engine.script = failing(code, after="x")
    generation = start(backend)
    with pytest.raises(kind) as error:
        collect(generation)
    assert error.value.code == code
    assert generation.finished


# --- several choices ---


def test_choices_have_seeds_of_their_own_and_an_index(backend: Backend) -> None:
    backend.engine.script = lambda submit: answer(f"seed {submit.sampling.seed}")(submit)
    events = list(start(backend, n=3, sampling=SamplingParams(seed=2**64 - 1)))
    assert [submit.sampling.seed for submit in backend.engine.submits] == [2**64 - 1, 0, 1]
    for index, seed in enumerate([2**64 - 1, 0, 1]):
        *deltas, done = [event for event in events if event.index == index]
        assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == f"seed {seed}"
        assert isinstance(done, Done)
    dones = [event for event in events if isinstance(event, Done)]
    assert total_usage(dones, 3) == Usage(len(PROMPT), 26 + 7 + 7)


def test_many_choices_leave_the_queue_to_others(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0

    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        nonlocal most
        most = max(most, len(backend.engine.running))
        yield None
        yield from answer(f"{submit.sampling.seed}")(submit)

    backend.engine.script = script
    monkeypatch.setattr(backend.client, "_info", msgspec.structs.replace(backend.client.info(), max_requests=15))
    events = list(start(backend, n=20, sampling=SamplingParams(seed=0)))
    for i in range(20):
        said = [event.text for event in events if isinstance(event, TextDelta) and event.index == i]
        assert "".join(said) == str(i)
    assert sum(isinstance(event, Done) for event in events) == 20
    assert most <= 3


def test_an_engine_that_is_full_ends_what_has_begun(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_limit(max_requests: int) -> None:
        monkeypatch.setattr(
            backend.client, "_info", msgspec.structs.replace(backend.client.info(), max_requests=max_requests)
        )

    backend.engine.script = answer("ab")
    set_limit(4)
    generation = start(backend, n=3)
    set_limit(0)
    with pytest.raises(OverloadedError) as error:
        list(generation)
    assert (error.value.code, generation.finished) == ("queue_full", True)
    assert len(backend.engine.submits) == 1


def test_one_choice_may_stop_early_while_others_go_on(backend: Backend) -> None:
    backend.engine.script = lambda submit: endless(submit) if submit.sampling.seed == 1 else answer("ab STOP")(submit)
    generation = start(backend, n=2, sampling=SamplingParams(seed=1), stop=["STOP", "xxxxxxxxxxxx"])
    events = list(generation)
    assert {event.stop_sequence for event in events if isinstance(event, Done)} == {"STOP", "xxxxxxxxxxxx"}
    assert generation.finished


def test_a_failure_ends_all_choices(backend: Backend) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        yield from (endless if submit.sampling.seed == 1 else failing("invalid_logits"))(submit)

    backend.engine.script = script
    with pytest.raises(GenerationError):
        list(start(backend, n=2))
    until(lambda: backend.engine.cancelled)


# --- log-probabilities ---


def test_scores_ride_on_deltas(backend: Backend) -> None:
    backend.engine.script = answer("aé! STOP")
    events = list(start(backend, sampling=SamplingParams(seed=1, logprobs=1), stop=["STOP"]))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert "".join(delta.text for delta in deltas) == "aé! "
    scored = [scored for delta in deltas for scored in delta.logprobs or ()]
    assert b"".join(each.token.utf8 for each in scored) == "aé! ".encode()
    assert [each.token.logprob for each in scored] == [-byte / 100 for byte in "aé! ".encode()]
    assert scored[0].top == [ScoredToken("a", b"a", -0.97)]


def test_prompts_are_scored(backend: Backend) -> None:
    request = CompletionRequest(
        prompts=["né"], sampling=SamplingParams(seed=1), max_tokens=0, echo=True, prompt_logprobs=0
    )
    scored, done = Generation(fake_model(), backend.client, request, 30.0)
    assert isinstance(scored, PromptLogprobs)
    assert scored.texts == ["n", "", "é"]
    first, *others = scored.logprobs
    assert first is None
    assert [each and each.token for each in others] == [
        ScoredToken("", b"\xc3", -1.95),
        ScoredToken("é", b"\xa9", -1.69),
    ]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.usage.num_output_tokens) == ("length", 0)
    assert backend.engine.submits[0].max_tokens == 0


# --- raw prompts ---


def complete(backend: Backend, **fields: Any) -> list[Event]:
    request = CompletionRequest(**({"sampling": SamplingParams(seed=1), "max_tokens": 20} | fields))
    return list(Generation(fake_model(), backend.client, request, 30.0))


def test_choices_of_several_prompts(backend: Backend) -> None:
    backend.engine.script = lambda submit: answer(bytes(submit.prompt_token_ids).upper())(submit)
    events = complete(backend, prompts=["ab", list(b"cd")], n=2, echo=True)
    texts = ["".join(e.text for e in events if isinstance(e, TextDelta) and e.index == i) for i in range(4)]
    assert texts == ["abAB", "abAB", "cdCD", "cdCD"]
    dones = [event for event in events if isinstance(event, Done)]
    assert total_usage(dones, 2) == Usage(4, 12)


@pytest.mark.parametrize(
    "fields, param, message",
    [
        ({"prompts": [[257]]}, "prompt", "0 to 256"),
        ({"prompts": [[-1]]}, "prompt", "0 to 256"),
        ({"prompts": [""]}, "prompt", "empty"),
        ({"prompts": ["x" * 101], "max_tokens": 0}, "prompt", "100 tokens, but the prompt is 101"),
        ({"prompts": ["x" * 100]}, "prompt", "no room"),
        ({"prompts": ["a"], "suffix": "b"}, "suffix", "filling in the middle"),
        ({"prompts": [[1]], "suffix": "b"}, "suffix", "text"),
        ({"prompts": ["a"], "stop_token_ids": [257]}, "stop_token_ids", "0 to 256"),
    ],
)
def test_prompts_that_can_not_be_served(backend: Backend, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as error:
        complete(backend, **fields)
    assert error.value.param == param
    assert not backend.engine.submits


def test_end_tokens_of_a_request(backend: Backend) -> None:
    complete(backend, prompts=["a"], stop_token_ids=[7])
    complete(backend, prompts=["a"], stop_token_ids=[7], ignore_eos=True)
    assert [submit.end_token_ids for submit in backend.engine.submits] == [[7, END], [7]]


# --- progress ---


def test_progress_comes_first_if_it_is_asked_for(backend: Backend) -> None:
    backend.engine.script = answer("Hi", num_cached=2)
    first, *_, done = start(backend, progress=True)
    assert isinstance(first, PromptProgress)
    assert (first.num_prompt_tokens, first.num_cached_tokens, first.num_computed_tokens) == (
        len(PROMPT),
        2,
        len(PROMPT),
    )
    assert isinstance(done, Done)
    assert done.usage.num_cached_tokens == 2
    assert not any(isinstance(event, PromptProgress) for event in start(backend))


def test_an_early_end_knows_what_was_cached(backend: Backend) -> None:
    backend.engine.script = answer("abc", num_cached=2)
    _, done = collect(start(backend, stop=["b"]))
    assert done.usage.num_cached_tokens == 2
    assert done.timings is not None


def test_whose_request_it_is(backend: Backend) -> None:
    list(start(backend, priority=-3, client="me", cache_salt="salt"))
    (submit,) = backend.engine.submits
    assert (submit.priority, submit.client, submit.cache_salt, submit.deadline_s) == (-3, "me", "salt", 30.0)


def test_structured_output_is_a_grammar(backend: Backend) -> None:
    list(start(backend, grammar=Choice(choices=["yes", "no"], param="structured_outputs.choice")))
    assert "yes" in (backend.engine.submits[0].grammar or "")
