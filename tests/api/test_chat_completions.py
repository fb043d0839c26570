"""The fields of POST /v1/chat/completions: what each changes, and what is refused."""

from typing import Any

import falcon.testing
import pytest
from openai.types.chat import ChatCompletion

from fake_engine import END, Backend, Post, answer
from mlx_server.sampling_params import SamplingParams

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TEXT_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def content(result: falcon.testing.Result) -> str:
    assert result.status_code == 200, result.text
    text: str = result.json["choices"][0]["message"]["content"]
    return text


def test_the_answer_has_every_key_of_the_api(post: Post) -> None:
    reply = post().json
    ChatCompletion.model_validate(reply, strict=True)
    assert set(reply) == {
        "id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage", "timings",
    }  # fmt: skip
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (9, 7, 16)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    assert reply["id"].startswith("chatcmpl-")


def test_ids_are_unique(post: Post) -> None:
    assert post().json["id"] != post().json["id"]


@pytest.mark.parametrize("name", ["org/tiny", "tiny", "default"])
def test_the_model_is_named_as_in_the_request(post: Post, name: str) -> None:
    assert post(model=name).json["model"] == name


@pytest.mark.parametrize("name", ["", "Tiny", "org/", "org", "gpt-4o", "../tiny", "x" * 10_000, "a\nb"])
def test_another_model_is_a_404_that_says_what_is_served(post: Post, name: str) -> None:
    result = post(model=name)
    assert result.status_code == 404
    error = result.json["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
    assert "'org/tiny'" in error["message"] and len(error["message"]) < 1000


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, {"temperature": 0.5, "top_k": 7}),  # the model's defaults
        ({"temperature": 0}, {"temperature": 0.0, "top_k": 7}),
        ({"temperature": 2, "top_p": 0.25}, {"temperature": 2.0, "top_p": 0.25, "top_k": 7}),
        ({"top_p": 0}, {"temperature": 0.5, "top_p": 1.0, "top_k": 1}),
        ({"top_k": 3, "min_p": 0.125}, {"temperature": 0.5, "top_k": 3, "min_p": 0.125}),
        ({"top_k": -1}, {"temperature": 0.5, "top_k": 0}),
        ({"temperature": None, "top_p": None, "top_k": None, "min_p": None}, {"temperature": 0.5, "top_k": 7}),
    ],
)
def test_sampling_parameters_reach_the_engine(
    backend: Backend, post: Post, fields: dict[str, Any], expected: dict[str, float]
) -> None:
    assert post(**fields, seed=5).status_code == 200
    assert backend.engine.submits[0].sampling == SamplingParams(**expected, seed=5)


@pytest.mark.parametrize(
    "seed, expected", [(0, 0), (42, 42), (2**63 - 1, 2**63 - 1), (-1, 2**64 - 1), (-(2**63), 2**63)]
)
def test_seeds_are_64_bits(backend: Backend, post: Post, seed: int, expected: int) -> None:
    assert post(seed=seed).status_code == 200
    assert backend.engine.submits[0].sampling.seed == expected


@pytest.mark.parametrize("fields", [{}, {"seed": None}])
def test_without_a_seed_each_request_draws_one(backend: Backend, post: Post, fields: dict[str, Any]) -> None:
    for _ in range(4):
        post(**fields)
    assert len({submit.sampling.seed for submit in backend.engine.submits}) == 4


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, 64),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
        ({"max_tokens": None, "max_completion_tokens": None}, 64),
        ({"max_tokens": 32_000}, 91),  # the room left
        ({"max_tokens": 2**63 - 1}, 91),
    ],
)
def test_max_tokens(backend: Backend, post: Post, fields: dict[str, Any], expected: int) -> None:
    assert post(**fields).status_code == 200
    assert backend.engine.submits[0].max_tokens == expected


def test_an_answer_that_is_cut_ends_by_length(post: Post) -> None:
    reply = post(max_tokens=3).json
    assert (reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]) == ("Hel", "length")
    assert reply["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", ["lo", ["lo"], ["zzz", "lo", "o!"], ["a", "b", "c", "d", "e!", "lo"]])
def test_stop(post: Post, stop: str | list[str]) -> None:
    assert content(post(stop=stop)) == "Hel"


@pytest.mark.parametrize("stop", [None, [], "zzz", "!!"])
def test_stop_strings_that_do_not_occur(post: Post, stop: str | list[str] | None) -> None:
    assert content(post(stop=stop)) == "Hello!"


@pytest.mark.parametrize(
    "messages, prompt",
    [
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "system: s\nuser: u\n"),
        ([{"role": "developer", "content": "d"}, {"role": "user", "content": "u"}], "system: d\nuser: u\n"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "user: a\nb\n"),
        ([{"role": "user", "content": "u", "name": "Bob"}], "user: u\n"),
        ([{"role": "user", "content": ""}], "user: \n"),
        ([{"role": "user", "content": []}], "user: \n"),
        ([{"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}], "assistant: a\n"),
        ([{"role": "assistant", "content": "a", "tool_calls": []}], "assistant: a\n"),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "assistant: no\n"),
        ([{"role": "user", "content": "日本 😀"}], "user: 日本 😀\n"),
    ],
)
def test_messages_reach_the_template(backend: Backend, post: Post, messages: list[Any], prompt: str) -> None:
    content(post(messages=messages))
    assert bytes(backend.engine.submits[0].prompt_token_ids).decode() == prompt


def test_the_end_tokens_are_the_models(backend: Backend, post: Post) -> None:
    post()
    assert backend.engine.submits[0].end_token_ids == [END]


NO_EFFECT: dict[str, list[Any]] = {
    "n": [1],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "logprobs": [False],
    "logit_bias": [{}],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0, 0.0],
    "repetition_penalty": [1, 1.0],
    "reasoning_effort": ["none"],
    "modalities": [["text"]],
    "audio": [],
    "web_search_options": [],
    "stop_token_ids": [[]],
    "min_tokens": [0],
    "ignore_eos": [False],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "return_token_ids": [False],
}
UNSUPPORTED: dict[str, list[Any]] = {
    "functions": [[{"name": "f"}]],
    "function_call": [{"name": "f"}],
    "modalities": [["text", "audio"]],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "web_search_options": [{}],
    "moderation": [{"model": "omni-moderation-latest"}],
    "return_token_ids": [True],
}


@pytest.mark.parametrize("field", NO_EFFECT)
def test_a_value_that_asks_for_nothing_is_served(post: Post, field: str) -> None:
    for value in [None, *NO_EFFECT[field]]:
        assert content(post(**{field: value})) == "Hello!"


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_can_not_be_done_is_refused(backend: Backend, post: Post, field: str) -> None:
    for value in UNSUPPORTED[field]:
        result = post(**{field: value})
        assert result.status_code == 400
        error = result.json["error"]
        assert (error["param"], error["code"]) == (field, "unsupported")
        assert "not supported" in error["message"]
    assert not backend.engine.submits


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"},
        {"safety_identifier": "s", "verbosity": "low", "prediction": {"type": "content", "content": "x"}},
        {"parallel_tool_calls": False, "unknown": {"deep": [1, 2, {"x": None}]}, "stream": False},
        {"user": None, "metadata": None, "stream": None, "stream_options": None},
    ],
)
def test_fields_without_effect_are_accepted(post: Post, fields: dict[str, Any]) -> None:
    assert content(post(**fields)) == "Hello!"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [5]}]}, "messages[1].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "name": 5}]}, "messages[0].name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "c"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "content": "x", "function_call": {}}]}, "messages[0].function_call"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [TEXT_TOOL]}, "tools[0].function.parameters.type"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"response_format": 1}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": "no json"}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {str(10**12): 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"top_k": 2**31}, "top_k"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": 7}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "a\0"}, "stop"),
        ({"stop": ["ok", ""]}, "stop[1]"),
        ({"stop": ["ok", 7]}, "stop[1]"),
        ({"stop": ["x" * 4097]}, "stop[0]"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
    ],
)
def test_wrong_types_and_ranges_are_refused_by_name(
    backend: Backend, post: Post, fields: dict[str, Any], param: str
) -> None:
    result = post(**fields)
    assert result.status_code == 400
    error = result.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert param in error["message"]
    assert not backend.engine.submits


@pytest.mark.parametrize("field", ["model", "messages"])
def test_required_fields(client: falcon.testing.TestClient, field: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    del body[field]
    result = client.simulate_post("/v1/chat/completions", json=body)
    assert (result.status_code, result.json["error"]["param"]) == (400, field)


def test_a_prompt_longer_than_the_context_names_both_numbers(backend: Backend, post: Post) -> None:
    for stream in (False, True):
        result = post(messages=[{"role": "user", "content": "x" * 200}], stream=stream)
        assert result.status_code == 400
        error = result.json["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert "100" in error["message"] and "207" in error["message"]
    assert not backend.engine.submits


def test_empty_answers(backend: Backend, post: Post) -> None:
    backend.engine.script = answer("")
    reply = post().json
    assert (reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]) == ("", 1)
