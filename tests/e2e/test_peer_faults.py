"""What other servers get wrong, each tried on a real server. Seeds, and requests that join and leave, are in
`test_openai_client`, forms and calls that must come in `test_structured_output`."""

import json
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from e2e_server import PARIS, STORY, metric
from server_process import ServerProcess, until

pytestmark = pytest.mark.model

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
ASK: dict[str, Any] = {"model": "default", "max_tokens": 24, "temperature": 0}
Send = Callable[..., httpx2.Response]


@pytest.fixture
def send(server: ServerProcess) -> Iterator[Send]:
    with httpx2.Client(base_url=server.url(), timeout=60) as http:

        def send(path: str, **fields: Any) -> httpx2.Response:
            if path in (CHAT, MESSAGES):
                fields = {"messages": PARIS} | fields
            return http.post(path, json=ASK | fields)

        yield send


def answer(response: httpx2.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


def text(response: httpx2.Response) -> str:
    """Of a chat's answer, whole or streamed, of either API."""
    if response.headers["content-type"] == "text/event-stream":
        assert response.status_code == 200
        return "".join(map(text_of_event, events(response)))
    body = answer(response)
    content: str = body["choices"][0]["message"]["content"] if "choices" in body else body["content"][0]["text"]
    return content


def events(response: httpx2.Response) -> list[Any]:
    frames = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(frame) for frame in frames if frame != "[DONE]"]


def text_of_event(event: Any) -> str:
    if "choices" in event:
        content: str = event["choices"][0]["delta"].get("content", "")
        return content
    delta: str = event.get("delta", {}).get("text", "")
    return delta


def tokens(send: Send, text: str) -> list[int]:
    ids: list[int] = answer(send("/tokenize", content=text))["tokens"]
    return ids


def refusal(response: httpx2.Response, param: str) -> str:
    """The message of a 400 that blames `param`."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    message: str = error["message"]
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_inside_a_token_cuts_there(send: Send, stream: bool) -> None:
    whole = text(send(CHAT))
    assert " capital" in whole  # one token
    cut = whole[: whole.index("apit")]
    for stop in ("apit", ["apit", "never"]):
        assert text(send(CHAT, stop=stop, stream=stream)) == cut
    response = send(MESSAGES, stop_sequences=["apit"], stream=stream)
    assert text(response) == cut
    last = events(response)[-2]["delta"] if stream else answer(response)
    assert (last["stop_reason"], last["stop_sequence"]) == ("stop_sequence", "apit")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": 7}, "stop"),
        ({"logit_bias": {str(10**12): 1}}, "logit_bias"),
        ({"logit_bias": {str(10**6): 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
    ],
)
def test_a_wrong_request_is_refused_and_harms_nobody(send: Send, fields: dict[str, Any], param: str) -> None:
    refusal(send(CHAT, **fields), param)
    assert "Paris" in text(send(CHAT))


@pytest.mark.parametrize("prompt", [[10**6], [[1, 2], [10**6]]])
def test_a_prompt_beyond_the_vocabulary_is_refused(send: Send, prompt: Any) -> None:
    refusal(send(COMPLETIONS, prompt=prompt), "prompt")
    assert "Paris" in text(send(CHAT))


def test_a_bias_forbids_and_forces_tokens(send: Send) -> None:
    whole = text(send(CHAT))
    first, *_ = tokens(send, whole)
    assert not text(send(CHAT, logit_bias={str(first): -100})).startswith(whole[:3])
    [mark] = tokens(send, "!")
    assert text(send(CHAT, logit_bias={str(mark): 100}, max_tokens=4)) == "!!!!"


@pytest.mark.parametrize("temperature", [0, 1])
def test_n_is_the_number_of_choices(send: Send, temperature: float) -> None:
    body = answer(send(CHAT, messages=STORY, n=2, seed=5, temperature=temperature))
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    first, second = (choice["message"]["content"] for choice in body["choices"])
    assert (first == second) is (temperature == 0)
    assert body["usage"]["completion_tokens"] == 48


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_says_so(send: Send, stream: bool) -> None:
    response = send(CHAT, max_tokens=None, max_completion_tokens=3, stream=stream)
    body = events(response)[-1] if stream else answer(response)
    assert body["choices"][0]["finish_reason"] == "length"
    response = send(MESSAGES, max_tokens=3, stream=stream)
    message = events(response)[-2] if stream else answer(response)
    assert message["usage"]["output_tokens"] == 3
    assert (message["delta"] if stream else message)["stop_reason"] == "max_tokens"
    response = send(COMPLETIONS, prompt="Once upon a time", max_tokens=3, stream=stream)
    body = events(response)[-1] if stream else answer(response)
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_have_the_bytes_of_the_text(send: Send, stream: bool) -> None:
    messages = [{"role": "user", "content": "Repeat exactly: 👩‍🚀 crème brûlée 東京"}]
    response = send(CHAT, messages=messages, logprobs=True, top_logprobs=2, stream=stream)
    bodies = events(response) if stream else [answer(response)]
    scored = [
        token
        for body in bodies
        for token in (body["choices"][0]["logprobs"] or {"content": []})["content"]
    ]  # fmt: skip
    whole = text(response)
    assert b"".join(bytes(token["bytes"]) for token in scored).decode() == whole
    assert any(len(char.encode()) > 1 for char in whole)
    assert len(scored) > 10
    for token in scored:
        assert token["logprob"] <= 0
        top = [item["logprob"] for item in token["top_logprobs"]]
        assert len(top) == 2 and top == sorted(top, reverse=True)
        assert token["logprob"] == pytest.approx(top[0], abs=1e-5)  # greedy


def test_a_list_of_prompts_and_token_ids(send: Send) -> None:
    texts = ["The capital of France is", "Once upon a time"]
    single = [answer(send(COMPLETIONS, prompt=text))["choices"][0]["text"] for text in texts]
    assert "Paris" in single[0]
    ids = [tokens(send, text) for text in texts]
    for prompt in (texts, ids):
        body = answer(send(COMPLETIONS, prompt=prompt))
        assert [choice["text"] for choice in body["choices"]] == single
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer(send(COMPLETIONS, prompt=ids[0]))["choices"][0]["text"] == single[0]


def test_a_prompt_beyond_the_context_is_refused_by_each_api(send: Send) -> None:
    messages = [{"role": "user", "content": "word " * 9000}]
    for path, fields in ((COMPLETIONS, {"prompt": "word " * 9000}), (MESSAGES, {"messages": messages})):
        response = send(path, **fields)
        assert response.status_code == 400
        assert "8192" in response.json()["error"]["message"].replace(",", "")


def test_an_unknown_field_is_named(send: Send) -> None:
    for path in (CHAT, MESSAGES):
        response = send(path, tempreature=0.5)
        assert response.headers["x-mlx-server-ignored"] == "tempreature"
        assert "Paris" in text(response)


def test_greedy_beside_requests_with_other_parameters_is_the_same(server: ServerProcess, send: Send) -> None:
    alone = text(send(CHAT, messages=STORY))
    others: list[dict[str, Any]] = [
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.8, "frequency_penalty": 2},
        {"temperature": 1, "top_k": 3, "logit_bias": {"28": 100}},
        {"temperature": 0, "min_tokens": 60, "stop": ["the"]},
    ]
    with httpx2.Client(base_url=server.url(), timeout=60) as http:
        streams = [
            http.send(
                http.build_request(
                    "POST", CHAT, json=ASK | {"messages": STORY, "max_tokens": 400, "stream": True} | it
                ),
                stream=True,
            )
            for it in others
        ]
        assert text(send(CHAT, messages=STORY)) == alone
        assert text(send(CHAT, messages=STORY, stream=True)) == alone
        for stream in streams:
            stream.close()


def test_a_client_that_leaves_without_a_stream_leaves_the_engine_idle(server: ServerProcess) -> None:
    until(lambda: metric(server, "vllm:num_requests_running") == 0, "the others' end")
    connection = HTTPConnection(urlsplit(server.url()).netloc, timeout=60)
    body = ASK | {"messages": STORY, "max_tokens": 8000, "ignore_eos": True}
    connection.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
    until(lambda: metric(server, "vllm:num_requests_running") == 1, "the request runs")
    connection.close()
    until(lambda: metric(server, "vllm:num_requests_running") == 0, "the request's end")
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_count_tokens_counts_what_usage_counts(send: Send) -> None:
    tool = {"name": "f", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
    fields: dict[str, Any] = {"system": "Be brief.", "tools": [tool], "messages": STORY}
    usage = answer(send(MESSAGES, max_tokens=1, **fields))["usage"]
    counted = answer(send(f"{MESSAGES}/count_tokens", **fields))["input_tokens"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted > 40
