"""What the API needs of the model, beside the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mlx_server.chat import template, tokenizer
from mlx_server.chat.types import Scalar
from mlx_server.checkpoint.model_config import GenerationDefaults, generation_defaults
from mlx_server.config import ResolvedModel
from mlx_server.sampling_params import SamplingParams


class TextStream(Protocol):
    def push(self, token_id: int) -> str:
        """The text that this token completes: whole characters."""

    def finish(self) -> str:
        """The text of what is left, with U+FFFD for bytes that are no whole character."""


class Tokenizer(Protocol):
    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template."""

    def stream(self) -> TextStream:
        """Decodes one answer, token by token."""


class Template(Protocol):
    def render(self, messages: Sequence[Mapping[str, Any]], *, template_kwargs: Mapping[str, Scalar]) -> str:
        """The prompt for the assistant's next turn. InvalidRequestError if the template refuses the messages."""


@dataclass(frozen=True)
class ServedModel:
    name: str
    tokenizer: Tokenizer
    template: Template
    end_token_ids: list[int]  # generation stops at any of them
    default_sampling: SamplingParams  # where a request says nothing


def load_served_model(model: ResolvedModel) -> ServedModel:
    """Read tokenizer, template and defaults of a model on disk, not its weights. ModelLoadError if one is broken."""
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
        model.name, loaded, chat_template, loaded.end_token_ids, _default_sampling(generation_defaults(path))
    )


def _default_sampling(defaults: GenerationDefaults) -> SamplingParams:
    advised = {name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return SamplingParams(**{name: value for name, value in advised.items() if value is not None})
