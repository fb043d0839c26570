import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mlx_server.chat.served_model import ServedModel, load_served_model
from mlx_server.config import ResolvedModel
from mlx_server.sampling_params import SamplingParams

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TOKENS = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# The same tokenizer as transformers 4 and 5 describe it
OLD: dict[str, Any] = {
    "add_bos_token": True,
    "added_tokens_decoder": {"256": {"content": "<s>", "special": True}},
    "additional_special_tokens": TOKENS[1:3],
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
    "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": f"tools {TEMPLATE}"}],
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "legacy": True,
    "model_max_length": 1000000000000000019884624838656,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": None,
}
NEW: dict[str, Any] = {
    "backend": "tokenizers",
    "bos_token": "<s>",
    "eos_token": "<|im_end|>",
    "extra_special_tokens": TOKENS[1:3],
    "is_local": True,
    "model_max_length": 131072,
    "tokenizer_class": "TokenizersBackend",
    "tool_parser_type": "json_tools",
}


@pytest.fixture(params=["old", "new"])
def directory(request, tmp_path) -> Path:
    """A model's files without its weights, as mlx_lm.convert writes them."""
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in TOKENS])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(tmp_path / "tokenizer.json"))
    files = {
        "config.json": {"model_type": "qwen2", "vocab_size": 288, "eos_token_id": 258},
        "generation_config.json": {
            "bos_token_id": 256,
            "do_sample": True,
            "eos_token_id": [258, 259],
            "pad_token_id": 259,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "min_p": 0.1,
        },
        "tokenizer_config.json": OLD if request.param == "old" else NEW,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if request.param == "new":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(f"tools {TEMPLATE}")
    return tmp_path


def test_loads_what_is_published(directory):
    model = load_served_model(ResolvedModel("name", str(directory)))
    assert model.end_token_ids == [258, 259]
    advice = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    assert model.default_sampling == SamplingParams(**advice)


def test_bos_comes_once(directory):
    model = load_served_model(ResolvedModel("name", str(directory)))
    letter = model.tokenizer.encode("a")
    rendered = render(model, "a")
    assert model.tokenizer.encode_chat(rendered) == [256, 257, *letter, 258]
    assert model.tokenizer.encode(rendered, add_special_tokens=True) == [256, 257, *letter, 258]
    assert model.tokenizer.encode("a<s>", add_special_tokens=True) == [256, *letter, 256]
    assert model.tokenizer.encode("<s><s>") == [256, 256]


def test_the_template_for_tools_is_used_with_tools(directory):
    model = load_served_model(ResolvedModel("name", str(directory)))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert render(model, "a", tools=[tool]) == f"tools {render(model, 'a')}"


def render(model: ServedModel, content: str, tools: list[dict[str, Any]] | None = None) -> str:
    messages = [{"role": "user", "content": content}]
    return model.template.render(messages, tools=tools, add_generation_prompt=True, template_kwargs={})
