"""What the API needs of the model, beside the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt for the assistant's next turn. InvalidRequestError if the template refuses the messages."""


@dataclass(frozen=True)
class ServedModel:
    name: str
    tokenizer: Tokenizer
    template: Template
    end_token_ids: list[int]  # generation stops at any of them
    default_sampling: SamplingParams  # where a request says nothing
