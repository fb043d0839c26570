"""Thoughts, text, calls and stop strings, cut at every character and at every token."""

import functools
import itertools
import os
import shutil
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server import wire
from mlx_server.chat.logprobs import LogprobTape
from mlx_server.chat.output_router import OutputRouter, join
from mlx_server.chat.reasoning import ReasoningParser, Tags, opens_reasoning, reasoning_tags
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.chat.tool_parsers import TOOL_PARSERS
from mlx_server.chat.types import Event, ReasoningDelta, TextDelta, Tool, ToolCallDelta, ToolCallStart
from real_tokenizers import REAL_TOKENIZERS, model_directory

THINK = Tags("<think>", "</think>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "ä😀"}}\n</tool_call>'


def thought(text: str) -> ReasoningDelta:
    return ReasoningDelta(text)


def text(text: str) -> TextDelta:
    return TextDelta(text)


def call(i: int, arguments: str = '{"x": "ä😀"}') -> list[Event]:
    return [ToolCallStart(i, f"call_{i}", "f"), ToolCallDelta(i, arguments)]


def make(
    *,
    is_open: bool | None = None,
    tools: str | None = "hermes",
    stop: Sequence[str] = (),
    max_calls: int | None = None,
    tape: LogprobTape | None = None,
) -> OutputRouter:
    ids = itertools.count()
    return OutputRouter(
        0,
        reasoning=None if is_open is None else ReasoningParser(THINK, is_open=is_open),
        tools=None if tools is None else TOOL_PARSERS[tools]([Tool(name="f")]),
        stop=stop,
        max_calls=max_calls,
        tape=tape,
        new_id=lambda: f"call_{next(ids)}",
    )


def route(router: OutputRouter, pieces: Sequence[str]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        if not router.ended:
            events += router.feed(piece)
    return join(events + router.finish())


# What the router is made of, the answer, its events.
CASES: list[tuple[dict[str, object], str, list[Event]]] = [
    ({}, "", []),
    ({}, "Hi.", [text("Hi.")]),
    ({"tools": None}, CALL, [text(CALL)]),
    ({}, CALL, call(0)),
    ({}, f"One.\n{CALL}\n{CALL}\nTwo.", [text("One."), *call(0), *call(1), text("Two.")]),
    ({"max_calls": 1}, f"One. {CALL} Two. {CALL} Three.", [text("One."), *call(0), text("Two.")]),
    ({"max_calls": 1}, CALL, call(0)),
    # thoughts
    ({"is_open": False}, "<think>\nHm. </think>\n\nHi.", [thought("Hm."), text("Hi.")]),
    ({"is_open": False}, f" \n<think>Hm.\n\nSo.\n</think>{CALL}", [thought("Hm.\n\nSo."), *call(0)]),
    ({"is_open": False}, "Hi. <think>x</think>", [text("Hi. <think>x</think>")]),
    ({"is_open": False}, " <thin", [text(" <thin")]),
    ({"is_open": False}, "  ", [text("  ")]),
    ({"is_open": False}, "<think>\n\n</think>\n\nHi.", [text("Hi.")]),
    ({"is_open": False}, "<think>", []),
    ({"is_open": False}, "<think>a </thi", [thought("a </thi")]),
    ({"is_open": False}, "<think>a</think></think>", [thought("a"), text("</think>")]),
    ({"is_open": True}, "\nHm.\n</think>\n\nHi. ", [thought("Hm."), text("Hi. ")]),
    ({"is_open": True}, f"I call {CALL}\n</think>", [thought(f"I call {CALL}")]),
    ({"is_open": True}, "Hm", [thought("Hm")]),
    ({"is_open": True, "tools": None}, "a\n</think>\nb", [thought("a"), text("b")]),
    # stop strings: in the text only, and across pieces of markup they don't match
    ({"stop": ["END"]}, "go END never", [text("go ")]),
    ({"stop": ["END"], "is_open": True}, "END</think> so ENDED", [thought("END"), text("so ")]),
    ({"stop": ["x"]}, f"{CALL}ax", [*call(0), text("a")]),
    ({"stop": ["ENDED"]}, f"EN{CALL}DED", [text("EN"), *call(0), text("DED")]),
    ({"stop": ["END"]}, "EN", [text("EN")]),
    ({"stop": ["\n"]}, f"a\nb{CALL}", [text("a")]),
]  # fmt: skip


@pytest.mark.parametrize("settings, answer, expected", CASES)
def test_events(settings: dict[str, object], answer: str, expected: list[Event]) -> None:
    assert route(make(**settings), [answer]) == expected
    assert route(make(**settings), list(answer)) == expected
    for i in range(1, len(answer)):
        assert route(make(**settings), [answer[:i], answer[i:]]) == expected


def test_a_stop_string_is_named() -> None:
    router = make(stop=["b", "abc"])
    route(router, ["xabc"])
    assert router.stop_sequence == "b"
    router = make(stop=["bc", "abc"])
    assert route(router, ["x", "ab", "c"]) == [text("x")]
    assert router.stop_sequence == "abc"


def test_in_reasoning_follows_the_tags() -> None:
    router = make(is_open=False)
    states = []
    for piece in ("<th", "ink>", "a", "</think", ">", "b"):
        router.feed(piece)
        states.append(router.in_reasoning)
    assert states == [False, True, True, True, False, False]


def test_ids_of_calls_are_unique() -> None:
    router = OutputRouter(0, tools=TOOL_PARSERS["hermes"]([Tool(name="f")]))
    ids = [event.id for event in route(router, [CALL * 20]) if isinstance(event, ToolCallStart)]
    assert len({*ids}) == 20
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)


# --- where thoughts begin ---


@pytest.mark.parametrize(
    "prompt, prefill, is_open",
    [
        ("<|assistant|><think>\n", "", True),
        ("<|assistant|><think>", "", True),
        ("<|assistant|>\n", "", False),
        ("<|assistant|><think>\n\n</think>\n\n", "", False),
        ("<|user|><think> is a tag<|assistant|>", "", False),
        ("<|assistant|><think>So", "<think>So", True),
        ("<|assistant|><think>a</think>So", "<think>a</think>So", False),
        ("<|assistant|>So", "So", False),
    ],
)
def test_prompts_that_open_the_thoughts(prompt: str, prefill: str, is_open: bool) -> None:
    assert opens_reasoning(prompt, prefill, THINK) == is_open


def test_tags_are_the_templates_or_the_vocabularys() -> None:
    assert reasoning_tags("… [THINK] …", lambda _: True) == Tags("[THINK]", "[/THINK]")
    assert reasoning_tags("…split('</think>')…", lambda _: False) == THINK
    assert reasoning_tags("", lambda text: text in THINK) == THINK
    assert reasoning_tags("", lambda text: text == "<think>") is None


# --- log-probabilities ---


def route_scored(router: OutputRouter, tape: LogprobTape, tokens: Sequence[tuple[int, str]]) -> list[Event]:
    events: list[Event] = []
    for token_id, piece in tokens:
        if not router.ended:
            tape.add(token_id, piece, wire.TokenLogprobs(-float(token_id), [], []))
            events += router.feed(piece)
    return events + router.finish()


def check_scores(events: Sequence[Event]) -> list[float]:
    """Each delta's tokens are its text; returns all their log-probabilities."""
    logprobs: list[float] = []
    for event in events:
        if isinstance(event, TextDelta):
            assert event.logprobs
            assert "".join(scored.token.text for scored in event.logprobs) == event.text
            assert b"".join(scored.token.utf8 for scored in event.logprobs) == event.text.encode()
            logprobs += [scored.token.logprob for scored in event.logprobs]
    return logprobs


@pytest.mark.parametrize(
    "settings, tokens, shown, scored",
    [
        ({}, "ab cd", "ab cd", "0 1 2 3 4"),
        ({}, ["ab", " c", "d"], "ab cd", "0 1 2"),
        ({"stop": ["bc"]}, ["ab", "c"], "a", "0"),
        ({"stop": ["bcX"]}, ["ab", "c", "d"], "abcd", "0 1 2"),
        ({"stop": ["X"]}, ["a", "bXc", "d"], "ab", "0 1"),
        ({}, ["Hi", "\n<tool", CALL[5:-2], "l>", " yes"], "Hiyes", "0 4"),
        ({"is_open": True}, ["Hm", "</thi", "nk>\n\nSo", " be it"], "So be it", "2 3"),
        ({}, ["a <", "b"], "a <b", "0 1"),
        ({}, ["a ", " ", "b"], "a  b", "0 1 2"),
    ],
)
def test_scores_ride_on_their_text(settings: dict[str, object], tokens: Sequence[str], shown: str, scored: str) -> None:
    tape = LogprobTape(lambda _: b"")
    events = route_scored(make(tape=tape, **settings), tape, list(enumerate(tokens)))
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == shown
    assert [-int(logprob) for logprob in check_scores(events)] == [int(i) for i in scored.split()]


def test_characters_of_several_tokens() -> None:
    utf8 = "a😀b".encode()
    tape = LogprobTape(lambda token_id: utf8[token_id : token_id + 1])
    events = route_scored(make(tape=tape), tape, list(enumerate(["a", "", "", "", "😀", "b"])))
    assert check_scores(events) == [0, -1, -2, -3, -4, -5]
    tokens = [scored.token for event in events if isinstance(event, TextDelta) for scored in event.logprobs or ()]
    assert [token.text for token in tokens] == ["a", "", "", "", "😀", "b"]
    assert [token.utf8 for token in tokens] == [utf8[i : i + 1] for i in range(6)]


def test_special_tokens_without_text_have_no_scores() -> None:
    tape = LogprobTape(lambda token_id: [b"a", b"<eos>", b"b"][token_id])
    events = route_scored(make(tape=tape), tape, list(enumerate(["a", "", "b"])))
    assert check_scores(events) == [0, -2]


def test_impossible_tokens_have_finite_scores() -> None:
    tape = LogprobTape(lambda _: b"\xf0")
    tape.add(7, "a", wire.TokenLogprobs(-float("inf"), [1], [-float("inf")]))
    tape.show(0, 1)
    _, (scored,) = tape.take(1, final=True)
    assert (scored.token.logprob, scored.top[0].logprob) == (-9999.0, -9999.0)
    assert (scored.top[0].text, scored.top[0].utf8) == ("\ufffd", b"\xf0")


@given(st.lists(st.sampled_from([*"ab <>\n", "<think>", "</think>", CALL, "END", "é😀", "</tool_call>"])).map("".join),
       st.lists(st.integers(0, 200)), st.booleans())  # fmt: skip
def test_any_answer_in_any_pieces(answer: str, cuts: list[int], is_open: bool) -> None:
    borders = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[start:end] for start, end in itertools.pairwise(borders)]
    expected = route(make(is_open=is_open, stop=["END"]), [answer])
    assert route(make(is_open=is_open, stop=["END"]), pieces) == expected
    tape = LogprobTape(lambda _: b"")
    scored = route_scored(make(is_open=is_open, stop=["END"], tape=tape), tape, list(enumerate(pieces)))
    texts = "".join(event.text for event in expected if isinstance(event, TextDelta))
    assert "".join(event.text for event in scored if isinstance(event, TextDelta)) == texts
    check_scores(scored)


# --- the tokens of real models ---

MARKUP = {
    "hermes": f"\n{CALL}",
    "qwen3_coder": "\n<tool_call>\n<function=f>\n<parameter=x>\nä😀\n</parameter>\n</function>\n</tool_call>",
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"x": "ä😀"}}]',
    "llama3_json": ' <|python_tag|>{"name": "f", "parameters": {"x": "ä😀"}}',
    "pythonic": "[f(x='ä😀')]",
    "json": '```json\n{"name": "f", "arguments": {"x": "ä😀"}}\n```',
}


@functools.cache
def load(name: str) -> Tokenizer:
    return Tokenizer.load(model_directory(name))


@pytest.mark.model
@pytest.mark.parametrize("parser", MARKUP)
@pytest.mark.parametrize("name", REAL_TOKENIZERS)
@pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="npm is missing")
def test_tokens_of_real_models(name: str, parser: str) -> None:
    tokenizer = load(name)
    shown = "" if parser in ("pythonic", "json") else "I do."
    answer = f"<think>\nHm, 漢字 </think>\n\n{shown}{MARKUP[parser]}"
    stream = tokenizer.stream(keep=TOOL_PARSERS[parser].special_tokens)
    router = make(is_open=False, tools=parser)
    pieces = [*map(stream.push, tokenizer.encode(answer)), stream.finish()]
    assert "".join(pieces) == answer
    assert route(router, pieces) == [thought("Hm, 漢字"), *([text(shown)] if shown else []), *call(0)]


@pytest.mark.model
@pytest.mark.parametrize("name", REAL_TOKENIZERS)
@pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="npm is missing")
def test_bytes_of_real_tokens(name: str) -> None:
    tokenizer = load(name)
    for sample in ("Hello, wörld 漢字 👩‍👧‍👦\n\n\tx", " leading", "नमस्ते"):
        token_ids = tokenizer.encode(sample)
        assert b"".join(map(tokenizer.token_bytes, token_ids)).decode() == tokenizer.decode(token_ids)
    assert tokenizer.token_bytes(10**6) == b""
