"""What the API needs of the model, beside the engine."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_server.chat import template, tokenizer
from mlx_server.chat.messages import TemplateTraits
from mlx_server.chat.reasoning import Tags, reasoning_tags
from mlx_server.chat.template_source import TemplateSource
from mlx_server.chat.tool_parsers import TOOL_PARSERS, tool_parser_of
from mlx_server.chat.tool_parsers.base import ToolParser
from mlx_server.chat.tool_parsers.hermes import Hermes
from mlx_server.chat.types import Scalar
from mlx_server.checkpoint.model_config import GenerationDefaults, generation_defaults
from mlx_server.checkpoint.pooling import DEFAULT_POOLING, pooling_of
from mlx_server.config import ResolvedModel
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import Pooling


class TextStream(Protocol):
    def push(self, token_id: int) -> str:
        """The text that this token completes: whole characters."""

    def finish(self) -> str:
        """The text of what is left, with U+FFFD for bytes that are no whole character."""


class Tokenizer(Protocol):
    bos_token: str | None
    eos_token: str | None
    templates: TemplateSource

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` those that the model wants around a prompt too."""

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template."""

    def escape(self, text: str) -> str:
        """`text` such that `encode_chat` takes special tokens in it for plain text."""

    def unescape(self, rendered: str) -> str:
        """What `escape` was given."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens."""

    def token_id(self, text: str) -> int | None:
        """The id of the token that is `text`, if there is one."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, which may be part of a character."""

    def stream(self, *, after: Sequence[int] = (), keep: Collection[str] = ()) -> TextStream:
        """Decodes one answer, token by token; special tokens have no text, but for those to `keep`.

        Args:
            after: the last tokens of the text that the answer continues.
        """


class Template(TemplateTraits, Protocol):
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Scalar],
    ) -> str:
        """The prompt for the assistant's next turn. InvalidRequestError if the template refuses the messages."""


@dataclass(frozen=True)
class ServedModel:
    name: str
    tokenizer: Tokenizer
    template: Template
    end_token_ids: list[int]  # generation stops at any of them
    default_sampling: SamplingParams  # where a request says nothing
    tool_parser: type[ToolParser] = Hermes  # the format of its tool calls
    reasoning_tags: Tags | None = None  # if it thinks
    pooling: Pooling | None = DEFAULT_POOLING  # of embeddings; None: they need more than that


def load_served_model(model: ResolvedModel, tool_parser: str | None = None) -> ServedModel:
    """Read tokenizer, template and defaults of a model on disk, not its weights. ModelLoadError if one is broken.

    Args:
        tool_parser: name of the format of tool calls; None: the template tells.
    """
    path = Path(model.path)
    loaded = tokenizer.Tokenizer.load(path)
    chat_template = template.ChatTemplate(
        loaded.templates.default,
        tool_source=loaded.templates.tool_use,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        escape=loaded.escape,
    )
    return ServedModel(
        model.name,
        loaded,
        chat_template,
        loaded.end_token_ids,
        _default_sampling(generation_defaults(path)),
        TOOL_PARSERS[tool_parser] if tool_parser else tool_parser_of(chat_template),
        reasoning_tags(chat_template.source, lambda text: loaded.token_id(text) is not None),
        pooling_of(path),
    )


def _default_sampling(defaults: GenerationDefaults) -> SamplingParams:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    advised = {name: getattr(defaults, name) for name in names}
    return SamplingParams(**{name: value for name, value in advised.items() if value is not None})
