"""The one neutral request and the one neutral stream of events that every API protocol translates to and from."""

import msgspec

from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import FinishReason

Scalar = bool | int | float | str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, as chat templates see it."""

    role: str  # system, user or assistant
    content: str
    name: str | None = None


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate, checked and with every default filled in."""

    messages: list[ChatMessage]
    sampling: SamplingParams
    max_tokens: int  # >= 1; more than the context leaves room for is clipped
    template_kwargs: dict[str, Scalar] = {}  # further variables of the chat template
    stop: list[str] = []  # generation ends before the first of these; none is empty


class Usage(msgspec.Struct, frozen=True):
    num_prompt_tokens: int
    num_output_tokens: int  # with the end token, which is not part of the text
    num_cached_tokens: int = 0  # prompt tokens that were not computed again


class TextDelta(msgspec.Struct, frozen=True):
    """The next piece of the answer: whole characters, never part of a stop string, never empty."""

    text: str


class Done(msgspec.Struct, frozen=True):
    """The last event of a request."""

    finish_reason: FinishReason
    usage: Usage


Event = TextDelta | Done
