from collections.abc import Iterator
from typing import Any

import pytest

from fake_engine import END, TIMINGS, Backend, answer, endless, failing, fake_model, silent, until
from mlx_server.chat.generation import Generation
from mlx_server.chat.types import ChatMessage, ChatRequest, Done, TextDelta, Usage
from mlx_server.errors import GenerationError, InvalidRequestError, OverloadedError, RequestTimeoutError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import Finished, RequestOutput, Submit, Tokens

PROMPT = "user: hi\n"


def start(backend: Backend, *, timeout_s: float = 30.0, **changes: Any) -> Generation:
    fields: dict[str, Any] = {"sampling": SamplingParams(seed=1), "max_tokens": 50}
    request = ChatRequest(**({"messages": [ChatMessage(role="user", content="hi")]} | fields | changes))
    return Generation(fake_model(), backend.client, request, timeout_s)


def collect(generation: Generation) -> tuple[str, Done]:
    *deltas, done = generation
    assert isinstance(done, Done)
    texts = [delta.text for delta in deltas if isinstance(delta, TextDelta)]
    assert all(texts)
    return "".join(texts), done


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


def test_no_event_holds_half_a_character(backend: Backend) -> None:
    backend.engine.script = answer("é😀漢")
    assert [event.text for event in start(backend) if isinstance(event, TextDelta)] == ["é", "😀", "漢"]


def test_half_a_character_at_the_end_is_dropped(backend: Backend) -> None:
    backend.engine.script = answer("ab😀")
    text, done = collect(start(backend, max_tokens=4))
    assert (text, done.finish_reason, done.usage.num_output_tokens) == ("ab", "length", 4)


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
