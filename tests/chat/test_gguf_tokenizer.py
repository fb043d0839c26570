"""Tokenizers built from GGUF metadata, held against llama.cpp's token ids and against SentencePiece's algorithm."""

import json
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_writer import write_gguf
from mlx_server.chat.gguf_tokenizer import token_of, tokenizer_from_gguf
from mlx_server.chat.template_source import templates_of_gguf
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.checkpoint.gguf import GGUF, read_gguf
from mlx_server.errors import ModelLoadError

# The demo model's vocabulary and merges with each pre-tokenizer, as llama.cpp (xllamacpp 2026.10) tokenizes the texts,
# special tokens recognized and none added.
GOLDEN = json.loads((Path(__file__).parent / "data" / "token_ids.json").read_text("utf-8"))


@pytest.mark.model
@pytest.mark.parametrize("pre", GOLDEN["token_ids"])
def test_token_ids_are_those_of_llama_cpp(demo_gguf, pre):
    demo = read_gguf(demo_gguf)
    tokenizer = tokenizer_from_gguf(GGUF(demo.path, demo.metadata | {"tokenizer.ggml.pre": pre}, {}))
    for text, token_ids in zip(GOLDEN["texts"], GOLDEN["token_ids"][pre], strict=True):
        if pre == "qwen2" and not unicodedata.is_normalized("NFC", text):
            continue  # Qwen's own tokenizer composes characters first; llama.cpp leaves that out
        assert tokenizer.encode(text, add_special_tokens=False).ids == token_ids, text
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == text


def sentencepiece(**changes: object) -> GGUF:
    """A small vocabulary in SentencePiece's manner: bytes, letters, and pieces with scores."""
    pieces = {"▁": -1.0, "h": -1.0, "e": -1.0, "l": -1.0, "o": -1.0}
    pieces |= {"▁h": -10.0, "he": -2.0, "ll": -3.0, "hell": -4.0, "lo": -5.0, "hello": -6.0, "▁hello": -7.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return GGUF(Path("model.gguf"), metadata | changes, {})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello", ["▁hello"]),
        ("hell", ["▁", "hell"]),  # the best pair first: "he" (-2), not "▁h" (-10)
        ("hellohello", ["▁hello", "hello"]),
        ("hi", ["▁h", "<0x69>"]),
        ("é", ["▁", "<0xC3>", "<0xA9>"]),
        (" hello", ["▁", "▁hello"]),
        ("</s>hello", ["</s>", "▁hello"]),
        ("", []),
    ],
)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(text, tokens):
    tokenizer = tokenizer_from_gguf(sentencepiece())
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == tokens
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == text.removeprefix("</s>")


def test_sentencepiece_without_space_prefix():
    tokenizer = tokenizer_from_gguf(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    encoding = tokenizer.encode("hello hello", add_special_tokens=False)
    assert encoding.tokens == ["hello", "▁hello"]
    assert tokenizer.decode(encoding.ids) == "hello hello"


def test_an_escape_adds_no_space():
    tokenizer = Tokenizer(tokenizer_from_gguf(sentencepiece()))
    token_ids = tokenizer.encode_chat("hello" + tokenizer.escape("</s>hell<s> hello"))
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "hello</s>hell<s> hello"
    assert not {1, 2} & set(token_ids)


@pytest.mark.parametrize(
    ("templates", "source"),
    [
        ({}, (None, None)),
        ({"": "a"}, ("a", None)),
        ({"": "a", ".tool_use": "b", ".rag": "c"}, ("a", "b")),
    ],
)
def test_templates(templates, source):
    gguf = sentencepiece(**{f"tokenizer.chat_template{name}": text for name, text in templates.items()})
    assert templates_of_gguf(gguf) == source
    with pytest.raises(ModelLoadError, match="larger than 1 MB"):
        templates_of_gguf(sentencepiece(**{"tokenizer.chat_template": "x" * (1 << 20 | 1)}))


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ({}, ["<s>", "▁hello"]),
        ({"tokenizer.ggml.add_bos_token": False}, ["▁hello"]),
        ({"tokenizer.ggml.add_eos_token": True}, ["<s>", "▁hello", "</s>"]),
    ],
)
def test_tokens_around_a_prompt(flags, tokens):
    assert tokenizer_from_gguf(sentencepiece(**flags)).encode("hello").tokens == tokens


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported (supported: gpt2, llama)"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "has the same token twice"),
        ({"tokenizer.ggml.scores": [0.0]}, "must have an entry for each token"),
        ({"tokenizer.ggml.bos_token_id": 7000}, "bos_token_id is 7000, outside the vocabulary"),
        ({"tokenizer.ggml.model": "gpt2"}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "pre-tokenizer 'new' is not supported"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["h e", "x y"]}, "joins 'x y'"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["he"]}, "joins 'he'"),
        ({"tokenizer.ggml.tokens": 7}, "tokenizer.ggml.tokens must be an array of str"),
    ],
)
def test_refuses_what_is_inconsistent(changes, fault):
    with pytest.raises(ModelLoadError) as caught:
        tokenizer_from_gguf(sentencepiece(**changes))
    assert fault in caught.value.message


def test_control_tokens_alone_are_special():
    metadata = sentencepiece().metadata
    types = {"</s>": 3, "hello": 4}  # what a user defined is part of the text, as Qwen's <think> is
    kinds = [types.get(token, 1) for token in metadata["tokenizer.ggml.tokens"]]
    tokenizer = tokenizer_from_gguf(sentencepiece(**{"tokenizer.ggml.token_type": kinds}))
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"</s>": True, "hello": False}


def test_token_of():
    gguf = sentencepiece()
    assert token_of(gguf, "eos") == "</s>"
    assert token_of(gguf, "eot") is None


GOOD = write_gguf(
    sentencepiece().metadata
    | {"tokenizer.ggml.add_eos_token": True, "tokenizer.chat_template": "{{ messages[0].content }}"}
    | {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64}
    | {"llama.embedding_length": 4, "llama.feed_forward_length": 4, "llama.attention.head_count": 1}
    | {"llama.attention.layer_norm_rms_epsilon": 1e-5},
    {"token_embd.weight": np.zeros((300, 4), np.float32)},
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


def test_the_file_that_is_fuzzed_is_good(fuzzed):
    fuzzed.write_bytes(GOOD)
    assert Tokenizer.load(fuzzed).encode("hello", add_special_tokens=True) == [1, 270, 2]


HEADER_BYTES = GOOD.rindex(b"token_embd") + 60


@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=500)
def test_fuzz_changed_bytes(fuzzed, changes):
    data = bytearray(GOOD)
    for index, value in changes:
        data[index] = value
    fuzzed.write_bytes(data)
    with suppress(ModelLoadError):
        Tokenizer.load(fuzzed).encode("hello", add_special_tokens=True)
