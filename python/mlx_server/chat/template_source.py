"""Where models keep their chat templates."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mlx_server.checkpoint.gguf import GGUF
from mlx_server.checkpoint.json_file import JsonObject, read_json_if_there, read_text
from mlx_server.errors import ModelLoadError

MAX_TEMPLATE_BYTES = 1 << 20


class TemplateSource(NamedTuple):
    """Sources of a model's chat templates. Of several, these are the names that transformers uses by itself."""

    default: str | None = None
    tool_use: str | None = None  # for conversations with tools, where the model has one of its own for them


def templates_of_directory(directory: Path, tokenizer_config: JsonObject) -> TemplateSource:
    """chat_template.jinja and additional_chat_templates/tool_use.jinja, else what JSON files hold.

    Of these chat_template.json goes before tokenizer_config.json.
    ModelLoadError if the first of them that there is holds no template.
    """
    text = read_text(directory / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if text is not None:
        tool_path = directory / "additional_chat_templates" / "tool_use.jinja"
        return TemplateSource(text, read_text(tool_path, MAX_TEMPLATE_BYTES))
    path = directory / "chat_template.json"
    content = read_json_if_there(path, max_bytes=MAX_TEMPLATE_BYTES)
    if content is not None:
        return _from_json(path, content.get("chat_template"))
    return _from_json(directory / "tokenizer_config.json", tokenizer_config.get("chat_template"))


def templates_of_gguf(gguf: GGUF) -> TemplateSource:
    """The templates in the metadata. ModelLoadError if one is too large or no text."""
    key = "tokenizer.chat_template"
    named = {"default": gguf.get(key, str), "tool_use": gguf.get(f"{key}.tool_use", str)}
    return _choose(gguf.path, {name: template for name, template in named.items() if template is not None})


def _from_json(path: Path, value: object) -> TemplateSource:
    """A `chat_template`: absent, one template, or a list of `{"name": …, "template": …}`."""
    match value:
        case None:
            return TemplateSource()
        case str():
            return _choose(path, {"default": value})
        case list() if all(isinstance(item, dict) for item in value):
            return _choose(path, {item.get("name"): item.get("template") for item in value})
    raise ModelLoadError(f"{path}: chat_template must be a string or a list of named strings")


def _choose(path: Path, named: Mapping[object, object]) -> TemplateSource:
    for template in named.values():
        if not isinstance(template, str):
            raise ModelLoadError(f"{path}: chat_template must be a string or a list of named strings")
        if len(template) > MAX_TEMPLATE_BYTES:
            raise ModelLoadError(f"{path}: the chat template is larger than {MAX_TEMPLATE_BYTES >> 20} MB")
    sources = {name: named.get(name) for name in ("default", "tool_use")}
    return TemplateSource(**{name: source for name, source in sources.items() if isinstance(source, str)})
