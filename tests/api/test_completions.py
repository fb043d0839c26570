"""POST /v1/completions on the fake engine, with openai's client."""

import json
from collections.abc import Iterator
from typing import Any

import falcon.testing
import openai
import pytest
from openai.types import Completion

from api.conftest import sdk_client
from fake_engine import END, Backend, answer
from mlx_server.wire import Finished, RequestOutput, Submit, TokenLogprobs


# Not strict: the SDK's type knows neither the null of the first token's log-probability nor that of an open choice.
@pytest.fixture
def lenient_sdk(backend: Backend) -> Iterator[openai.OpenAI]:
    with sdk_client(backend, strict=False) as client:
        yield client


def post(client: falcon.testing.TestClient, **fields: Any) -> falcon.testing.Result:
    return client.simulate_post("/v1/completions", json={"model": "tiny", "prompt": "ab"} | fields)


def test_an_answer(sdk: openai.OpenAI, backend: Backend) -> None:
    completion = sdk.completions.create(model="tiny", prompt="ab")
    Completion.model_validate(completion.model_dump(), strict=True)
    (choice,) = completion.choices
    assert (choice.text, choice.index, choice.finish_reason, choice.logprobs) == ("Hello!", 0, "stop", None)
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 7)
    assert backend.engine.submits[0].prompt_token_ids == list(b"ab")
    assert backend.engine.submits[0].max_tokens == 16


def test_the_servers_own_default(backend: Backend) -> None:
    client = falcon.testing.TestClient(backend.app(completion_tokens=5), headers={"host": "localhost"})
    assert post(client).json["choices"][0]["text"] == "Hello"
    assert post(client, max_tokens=6).json["choices"][0]["text"] == "Hello!"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
        (["ab", [99]], [b"ab", b"c"]),
    ],
)
def test_prompts(sdk: openai.OpenAI, backend: Backend, prompt: Any, expected: list[bytes]) -> None:
    completion = sdk.completions.create(model="tiny", prompt=prompt, n=2)
    assert [choice.index for choice in completion.choices] == list(range(2 * len(expected)))
    sent = sorted(bytes(submit.prompt_token_ids) for submit in backend.engine.submits)
    assert sent == sorted(expected * 2)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == sum(map(len, expected))
    assert completion.usage.completion_tokens == 7 * 2 * len(expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_logprobs(client: falcon.testing.TestClient, streamed: bool) -> None:
    result = post(client, logprobs=2, max_tokens=3, stream=streamed)
    logprobs: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    text = ""
    for part in events(result.text) if streamed else [result.json]:
        Completion.model_validate(part | {"choices": []}, strict=True)
        (choice,) = part["choices"]
        text += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            logprobs[name] += values
    assert text == "Hel"
    assert logprobs == {
        "tokens": ["H", "e", "l"],
        "token_logprobs": [-0.72, -1.01, -1.08],
        "top_logprobs": [{"H": -0.72, "I": -1.72}, {"e": -1.01, "f": -2.01}, {"l": -1.08, "m": -2.08}],
        "text_offset": [0, 1, 2],
    }


def test_the_prompt_is_echoed(sdk: openai.OpenAI) -> None:
    completion = sdk.completions.create(model="tiny", prompt=["ab", "c"], echo=True)
    assert [choice.text for choice in completion.choices] == ["abHello!", "cHello!"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_prompt_is_scored(lenient_sdk: openai.OpenAI, max_tokens: int) -> None:
    completion = lenient_sdk.completions.create(
        model="tiny", prompt=[[97, 98, 99]], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234
    )
    (choice,) = completion.choices
    assert choice.text == "abcH"[: 3 + max_tokens]
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    assert logprobs.tokens == list("abcH")[: 3 + max_tokens]
    assert logprobs.token_logprobs == [None, -0.98, -0.99, -0.72][: 3 + max_tokens]
    assert logprobs.top_logprobs[:2] == [None, {"b": -0.98}]
    assert logprobs.text_offset == list(range(3 + max_tokens))


@pytest.mark.parametrize("streamed", [False, True])
def test_the_prompt_alone_is_echoed(client: falcon.testing.TestClient, streamed: bool) -> None:
    result = post(client, echo=True, max_tokens=0, stream=streamed)
    choices = [event["choices"][0] for event in (events(result.text) if streamed else [result.json])]
    assert "".join(choice["text"] for choice in choices) == "ab"
    assert all(choice["logprobs"] is None for choice in choices)
    assert choices[-1]["finish_reason"] == "length"


def test_the_best_of_several(sdk: openai.OpenAI, backend: Backend) -> None:
    def script(submit: Submit) -> Iterator[RequestOutput]:
        k = submit.sampling.seed - 5
        scores = [TokenLogprobs(-float((k - 2) ** 2), [], [])]
        yield Finished(submit.request_id, [ord("a") + k], "length", 0, 1, logprobs=scores)

    backend.engine.script = script
    completion = sdk.completions.create(model="tiny", prompt="x", n=2, best_of=4, seed=5, max_tokens=1)
    assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "c"), (1, "b")]
    assert completion.choices[0].logprobs is None
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1, 4)


def test_a_stream(lenient_sdk: openai.OpenAI) -> None:
    texts = ["", ""]
    chunks = list(
        lenient_sdk.completions.create(
            model="tiny", prompt=["a", "b"], stream=True, stream_options={"include_usage": True}, stop="lo"
        )
    )
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
        assert chunk.usage is None
    assert texts == ["Hel", "Hel"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 2


def events(text: str) -> list[dict[str, Any]]:
    *data, last = text.strip().split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(item.removeprefix("data: ")) for item in data]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [END + 1]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a\0"}, "prompt"),
        ({"prompt": "x" * 101}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 129}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"prompt": ["a"] * 9, "n": 114}, "n"),
        ({"prompt": ["a"] * 64, "best_of": 17}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "c"}, "suffix"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
    ],
)
def test_refusals(backend: Backend, client: falcon.testing.TestClient, fields: dict[str, Any], param: str) -> None:
    result = post(client, **fields)
    assert result.status_code == 400, result.text
    error = result.json["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not backend.engine.submits


def test_end_tokens_can_be_ignored(backend: Backend, client: falcon.testing.TestClient) -> None:
    backend.engine.script = answer("x" * 40)
    assert post(client, ignore_eos=True).json["choices"][0]["finish_reason"] == "length"
    assert backend.engine.submits[0].end_token_ids == []
