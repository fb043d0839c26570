"""POST /tokenize, /detokenize and /apply-template, GET /tokenizer_info: vLLM's fields and llama.cpp's."""

from pathlib import Path
from typing import Any

import falcon.testing
import pytest

from fake_engine import Backend, ByteTokenizer, fake_model
from mlx_server.chat.served_model import load_served_model
from mlx_server.chat.template_source import TemplateSource
from mlx_server.config import ResolvedModel

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
RENDERED = "system: Be kind.\nuser: hi\n"


class WithBos(ByteTokenizer):
    """Byte 1 before each prompt; the special token `<s>` is that byte."""

    bos_token, templates = "<s>", TemplateSource("{{ bos_token }}", tool_use="{{ tools }}")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [1] * add_special_tokens + list(text.replace("<s>", "\1").encode())

    def encode_chat(self, rendered: str) -> list[int]:
        return self.encode(rendered)

    def escape(self, text: str) -> str:
        return text.replace("<s>", "[s]")


@pytest.fixture
def client(backend: Backend) -> falcon.testing.TestClient:
    app = backend.app(model=fake_model(tokenizer=WithBos()))
    return falcon.testing.TestClient(app, headers={"host": "localhost"})


def post(client: falcon.testing.TestClient, path: str, **fields: Any) -> Any:
    result = client.simulate_post(path, json=fields)
    assert result.status_code == 200, result.text
    return result.json


def check_error(result: falcon.testing.Result, status: int, param: str | None) -> None:
    assert (result.status_code, result.json["error"]["param"]) == (status, param), result.text


# --- /tokenize ---


@pytest.mark.parametrize(
    "fields, tokens",
    [
        ({}, [1, *b"hi"]),
        ({"model": "tiny"}, [1, *b"hi"]),
        ({"add_special_tokens": True}, [1, *b"hi"]),
        ({"add_special_tokens": False}, [*b"hi"]),
        ({"add_special_tokens": None, "return_token_strs": False}, [1, *b"hi"]),
    ],
)
def test_prompts_as_vllm_has_them(client: falcon.testing.TestClient, fields: Any, tokens: list[int]) -> None:
    reply = post(client, "/tokenize", prompt="hi", **fields)
    assert reply == {"count": len(tokens), "max_model_len": 100, "tokens": tokens, "token_strs": None}


def test_token_strings(client: falcon.testing.TestClient) -> None:
    reply = post(client, "/tokenize", prompt="hé", add_special_tokens=False, return_token_strs=True)
    assert reply["token_strs"] == ["h", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]


def test_messages_as_vllm_has_them(client: falcon.testing.TestClient) -> None:
    assert post(client, "/tokenize", messages=MESSAGES)["tokens"] == [*RENDERED.encode()]
    assert post(client, "/tokenize", messages=MESSAGES, add_special_tokens=True)["tokens"] == [1, *RENDERED.encode()]


@pytest.mark.parametrize(
    "fields, tokens",
    [
        ({}, [*b"hi", 1]),
        ({"add_special": True}, [1, *b"hi", 1]),
        ({"parse_special": True}, [*b"hi", 1]),
        ({"parse_special": False}, [*b"hi[s]"]),
        ({"parse_special": False, "add_special": True}, [1, *b"hi[s]"]),
    ],
)
def test_content_as_llama_cpp_has_it(client: falcon.testing.TestClient, fields: Any, tokens: list[int]) -> None:
    assert post(client, "/tokenize", content="hi<s>", **fields) == {"tokens": tokens}


def test_pieces(client: falcon.testing.TestClient) -> None:
    reply = post(client, "/tokenize", content="hé", with_pieces=True)
    assert reply == {"tokens": [{"id": 104, "piece": "h"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]}


def test_empty_texts_have_no_tokens(client: falcon.testing.TestClient) -> None:
    assert post(client, "/tokenize", content="") == {"tokens": []}
    assert post(client, "/tokenize", prompt="", add_special_tokens=False)["tokens"] == []


@pytest.mark.parametrize(
    "fields, status, param",
    [
        ({}, 400, "prompt"),
        ({"messages": []}, 400, "prompt"),
        ({"prompt": "a", "content": "b"}, 400, "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, 400, "messages"),
        ({"prompt": 5}, 400, "prompt"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": "x" * 801}, 400, "prompt"),
        ({"content": "x" * 801}, 400, "content"),
        ({"content": "x" * 801, "parse_special": False}, 400, "content"),
        ({"messages": [{"role": "user", "content": "x" * 900}]}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ],
)
def test_wrong_requests(client: falcon.testing.TestClient, fields: Any, status: int, param: str) -> None:
    check_error(client.simulate_post("/tokenize", json=fields), status, param)


@pytest.mark.parametrize(
    "fields, ignored",
    [
        ({"prompt": "a", "with_pieces": True, "tools": []}, "with_pieces"),
        ({"prompt": "a", "seed": 1, "add_special": False}, "seed, add_special"),
        ({"content": "a", "add_special_tokens": True, "add_special": True}, "add_special_tokens"),
        ({"messages": MESSAGES, "parse_special": False, "seed": 1}, "parse_special"),
    ],
)
def test_fields_of_another_form_are_named(
    backend: Backend, client: falcon.testing.TestClient, fields: Any, ignored: str
) -> None:
    result = client.simulate_post("/tokenize", json=fields)
    assert (result.status_code, result.headers["x-mlx-server-ignored"]) == (200, ignored)
    strict = falcon.testing.TestClient(backend.app(strict=True), headers={"host": "localhost"})
    check_error(strict.simulate_post("/tokenize", json=fields), 400, ignored.partition(",")[0])


# --- /detokenize ---


def test_detokenize(client: falcon.testing.TestClient) -> None:
    assert post(client, "/detokenize", tokens=[*"hé".encode()]) == {"prompt": "hé", "content": "hé"}
    assert post(client, "/detokenize", tokens=[], model="tiny") == {"prompt": "", "content": ""}


@pytest.mark.parametrize("tokens", [[-1], [257], [10**30], [1.5], ["a"], None, "a"])
def test_tokens_that_the_model_lacks(client: falcon.testing.TestClient, tokens: Any) -> None:
    assert client.simulate_post("/detokenize", json={"tokens": tokens}).status_code == 400


# --- /tokenizer_info ---


def test_the_tokenizer_as_vllm_describes_it(client: falcon.testing.TestClient) -> None:
    assert client.simulate_get("/tokenizer_info").json == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<e>",
        "chat_template": "{{ bos_token }}",
        "model_max_length": 100,
    }


# --- /apply-template ---


def test_apply_template(client: falcon.testing.TestClient) -> None:
    assert post(client, "/apply-template", messages=MESSAGES, max_tokens=5) == {"prompt": RENDERED}
    check_error(client.simulate_post("/apply-template", json={"messages": []}), 400, "messages")
    check_error(client.simulate_post("/apply-template", json={"messages": MESSAGES, "model": "x"}), 404, "model")


@pytest.mark.model
def test_a_real_model(backend: Backend, demo_gguf: Path) -> None:
    app = backend.app(model=load_served_model(ResolvedModel("demo", str(demo_gguf))))
    client = falcon.testing.TestClient(app, headers={"host": "localhost"})
    text = "<|im_start|> wörld 😀"
    prompt = post(client, "/apply-template", messages=[{"role": "user", "content": text}])["prompt"]
    assert f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" in prompt
    pieces = post(client, "/tokenize", content=text, with_pieces=True)["tokens"]
    joined = b"".join(
        part["piece"].encode() if isinstance(part["piece"], str) else bytes(part["piece"]) for part in pieces
    )
    assert joined.decode() == text
    for parse_special, is_one_token in [(True, True), (False, False)]:
        tokens = post(client, "/tokenize", content="<|im_start|>", parse_special=parse_special)["tokens"]
        assert (len(tokens) == 1) is is_one_token
        assert post(client, "/detokenize", tokens=tokens)["content"] == "<|im_start|>"
