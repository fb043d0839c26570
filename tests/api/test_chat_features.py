"""What each feature of POST /v1/chat/completions does: to the engine, and to the answer with openai's client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from api.conftest import sdk_client
from chat.test_generation_events import THINKING, OpeningTemplate
from fake_engine import END, TIMINGS, Backend, Post, answer, endless, fake_model
from grammars import Vocabulary
from mlx_server.wire import RequestOutput, Submit

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL: ChatCompletionToolParam = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def submitted(backend: Backend, post: Post, **fields: Any) -> Submit:
    result = post(**fields)
    assert result.status_code == 200, result.text
    return backend.engine.submits[-1]


def ask(sdk: openai.OpenAI, *, streamed: bool, **fields: Any) -> Any:
    """The answer; from a stream, as the SDK puts it together."""
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 90} | fields
    if not streamed:
        return sdk.chat.completions.create(**request)
    with sdk.chat.completions.stream(**request, stream_options={"include_usage": True}) as stream:
        return stream.get_final_completion()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"frequency_penalty": 0.5, "presence_penalty": -1}, {"frequency_penalty": 0.5, "presence_penalty": -1.0}),
        ({"repetition_penalty": 1.5, "repetition_context_size": 9}, {"repetition_penalty": 1.5, "penalty_window": 9}),
        ({"repetition_context_size": -1}, {"penalty_window": 0}),
        ({"logit_bias": {"5": 1, "256": -100}}, {"logit_bias": {5: 1.0, 256: -100.0}}),
        ({"typical_p": 0.5, "top_n_sigma": 1.5}, {"typical_p": 0.5, "top_n_sigma": 1.5}),
        ({"typical_p": 0}, {"typical_p": 1.0, "top_k": 1}),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.2}, {"xtc_probability": 0.5, "xtc_threshold": 0.2}),
        (
            {"dry_multiplier": 0.5, "dry_base": 2, "dry_allowed_length": 3, "dry_penalty_last_n": 64},
            {"dry_multiplier": 0.5, "dry_base": 2.0, "dry_allowed_length": 3, "dry_window": 64},
        ),
        ({"dry_multiplier": 1}, {"dry_sequence_breakers": tuple(sorted(b'\n:"*'))}),
        ({"dry_multiplier": 1, "dry_sequence_breakers": ["x"]}, {"dry_sequence_breakers": (ord("x"),)}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"logprobs": True}, {"logprobs": 0, "processed_logprobs": False}),
        (
            {"logprobs": True, "top_logprobs": 4, "post_sampling_probs": True},
            {"logprobs": 4, "processed_logprobs": True},
        ),
    ],
)
def test_sampling(backend: Backend, post: Post, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    sampling = submitted(backend, post, **fields).sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop_token_ids": [5]}, {"end_token_ids": [5, END]}),
        ({"ignore_eos": True}, {"end_token_ids": []}),
        ({"priority": -3}, {"priority": -3}),
        ({"cache_salt": "mine"}, {"cache_salt": "mine"}),
        ({}, {"priority": 0, "cache_salt": "", "grammar": None, "end_token_ids": [END]}),
    ],
)
def test_the_engines_request(backend: Backend, post: Post, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    submit = submitted(backend, post, **fields)
    assert {name: getattr(submit, name) for name in expected} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"grammar": "start: /a+/"}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"guided_regex": "a+"},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": 'root ::= "a"'},
        {"grammar": 'root ::= "a"'},
        {"json_schema": SCHEMA},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]},
    ],
)
def test_what_must_match_is_a_grammar_for_the_engine(backend: Backend, post: Post, fields: dict[str, Any]) -> None:
    assert submitted(backend, post, **fields).grammar is not None


def test_choices(sdk: openai.OpenAI, backend: Backend) -> None:
    completion = sdk.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
    assert [(choice.index, choice.message.content) for choice in completion.choices] == [
        (i, "Hello!") for i in range(3)
    ]
    assert sorted(submit.sampling.seed for submit in backend.engine.submits) == [5, 6, 7]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (9, 21)
    with sdk.chat.completions.stream(model="tiny", messages=HELLO, n=3) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello!"] * 3


@pytest.mark.parametrize("streamed", [False, True])
def test_tool_calls(sdk: openai.OpenAI, backend: Backend, streamed: bool) -> None:
    backend.engine.script = answer(f"I look.\n{CALL}")
    (choice,) = ask(sdk, streamed=streamed, tools=[TOOL]).choices
    assert choice.finish_reason == "tool_calls"
    first = choice.message.tool_calls[0]
    assert (first.function.name, json.loads(first.function.arguments)) == ("f", {"a": 1})
    assert choice.message.content.strip() == "I look."


def allowed_tools(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("streamed", [False, True])
def test_only_allowed_tools_are_called(sdk: openai.OpenAI, backend: Backend, streamed: bool) -> None:
    other = {"type": "function", "function": {"name": "g", "parameters": SCHEMA}}
    backend.engine.script = answer(CALL)
    for name, finish_reason in (("f", "tool_calls"), ("g", "stop")):
        choice = allowed_tools("auto", name)
        (said,) = ask(sdk, streamed=streamed, tools=[TOOL, other], tool_choice=choice).choices
        assert said.finish_reason == finish_reason
        assert [call.function.name for call in said.message.tool_calls or []] == ["f"] * (name == "f")
        assert (said.message.content or "") == ("" if name == "f" else CALL)
    for submit in backend.engine.submits:
        assert bytes(submit.prompt_token_ids).startswith(b"tools: f, g\n") and submit.grammar is None


def test_one_of_the_allowed_tools_must_be_called(backend: Backend, post: Post) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g", "h")]
    grammar = submitted(backend, post, tools=tools, tool_choice=allowed_tools("required", "f", "h")).grammar
    assert grammar is not None
    for name, expected in (("f", True), ("g", False), ("h", True)):
        assert matches(grammar, CALL.replace('"f"', f'"{name}"')) is expected
    assert not matches(grammar, "Hello!")


def matches(grammar: str, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Vocabulary())), grammar)
    return matcher.consume_tokens(Vocabulary()(text)) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        (allowed_tools("auto", "g"), "tool_choice"),
        (allowed_tools("auto"), "tool_choice.allowed_tools.tools"),
        (allowed_tools("none", "f"), "tool_choice.allowed_tools.mode"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools"}, "tool_choice"),
        ({"type": "function"}, "tool_choice"),
        ({"type": "function", "function": {"name": "g"}}, "tool_choice"),
    ],
)
def test_choices_of_tools_that_are_not_there(post: Post, choice: dict[str, Any], param: str) -> None:
    result = post(tools=[TOOL], tool_choice=choice)
    assert (result.status_code, result.json["error"]["param"]) == (400, param)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_budget_of_thoughts(backend: Backend, streamed: bool) -> None:
    """The fake engine thinks for ever, unless the thoughts are closed."""

    def script(submit: Submit) -> Iterator[RequestOutput | None]:
        closed = bytes(submit.prompt_token_ids).endswith(b"\n</think>\n\n")
        return (answer("Hi.") if closed else endless)(submit)

    backend.engine.script = script
    with sdk_client(backend, model=fake_model(**THINKING, template=OpeningTemplate())) as sdk:
        for budget, thoughts, num_reasoning in ((5, "xxxxx", 16), (1, "x", 12), (0, None, 0)):
            backend.engine.submits.clear()
            answered = ask(sdk, streamed=streamed, extra_body={"thinking_token_budget": budget})
            message, usage = answered.choices[0].message, answered.usage
            assert (message.content, answered.choices[0].finish_reason) == ("Hi.", "stop")
            assert getattr(message, "reasoning_content", None) == thoughts
            assert usage.completion_tokens_details.reasoning_tokens == num_reasoning
            assert usage.completion_tokens == num_reasoning + len("Hi.") + 1
            closed = b"" if budget else b"</think>\n\n"
            prompt = backend.engine.submits[0].prompt_token_ids
            assert bytes(prompt) == b"user: hi\n<think>\n" + closed
            assert usage.prompt_tokens == len(prompt)


def test_a_conversation_with_tools_reaches_the_template(backend: Backend, post: Post) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "42", "tool_call_id": "call_1"},
    ]
    prompt = bytes(submitted(backend, post, messages=messages).prompt_token_ids).decode()
    assert prompt.endswith("tool: 42\n")


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs(sdk: openai.OpenAI, streamed: bool) -> None:
    (choice,) = ask(sdk, streamed=streamed, logprobs=True, top_logprobs=2).choices
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content == "Hello!"
    assert [bytes(token.bytes) for token in tokens] == [b"H", b"e", b"l", b"l", b"o", b"!"]
    assert tokens[0].logprob == -ord("H") / 100
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [("H", -0.72), ("I", -1.72)]


def test_without_logprobs_there_are_none(post: Post) -> None:
    assert post().json["choices"][0]["logprobs"] is None
    assert post(logprobs=False).json["choices"][0]["logprobs"] is None


def test_a_pydantic_model_is_parsed(sdk: openai.OpenAI, backend: Backend) -> None:
    class Answer(BaseModel):
        a: int

    backend.engine.script = answer('{"a": 7}')
    completion = sdk.chat.completions.parse(model="tiny", messages=HELLO, response_format=Answer)
    assert completion.choices[0].message.parsed == Answer(a=7)


def test_progress_and_timings(backend: Backend, post: Post) -> None:
    backend.engine.script = answer(num_cached=4)
    events = [
        json.loads(line.removeprefix("data: "))
        for line in post(stream=True, return_progress=True).text.split("\n\n")
        if line.startswith("data: {")
    ]
    (progress,) = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert (progress["total"], progress["cache"], progress["processed"]) == (9, 4, 9)
    (timings,) = [event["timings"] for event in events if "timings" in event]
    assert timings == {
        "cache_n": 4,
        "prompt_n": 5,
        "prompt_ms": 1e3 * TIMINGS.prefill_s,
        "prompt_per_second": 5 / TIMINGS.prefill_s,
        "predicted_n": 7,
        "predicted_ms": 1e3 * TIMINGS.decode_s,
        "predicted_per_second": 6 / TIMINGS.decode_s,
    }
    whole = post().json
    assert whole["timings"] == timings
    ChatCompletion.model_validate(whole, strict=True)
    assert all("prompt_progress" not in line for line in post(stream=True).text.split("\n\n"))


def test_cached_tokens_are_told(backend: Backend, post: Post) -> None:
    backend.engine.script = answer(num_cached=4)
    assert post().json["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_the_last_message_is_continued(backend: Backend, post: Post) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    submit = submitted(backend, post, messages=messages, continue_final_message=True)
    assert bytes(submit.prompt_token_ids).decode().endswith("I am")
    result = post(continue_final_message=True)
    assert (result.status_code, result.json["error"]["param"]) == (400, "messages")
