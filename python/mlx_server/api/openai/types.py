"""POST /v1/chat/completions as OpenAI defines it: the request's fields and their ranges, the answer's fields."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct, field

from mlx_server.chat.types import Scalar

_ABSENT: Any = field(default_factory=lambda: Raw(b"null"))  # a plain default can't be shown in a JSON Schema
_INT64_MAX = 2**63 - 1


class Part(Struct):
    """A part of a message's content. Only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Raw = _ABSENT
    function_call: Raw = _ABSENT
    audio: Raw = _ABSENT


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted: padding that hides sizes, which this server does not send


class ChatCompletionRequest(Struct):
    """The request body. Null means absent everywhere; fields that are not listed are ignored, as OpenAI does.

    Accepted without effect: user, metadata, store, service_tier, prompt_cache_key, safety_identifier, verbosity,
    prediction, parallel_tool_calls. `unsupported_fields` tells what the fields of type Raw may hold.
    """

    model: str
    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=_INT64_MAX)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=_INT64_MAX)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # extension, as vLLM's: -1 and 0 keep all
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None  # extension, as vLLM's
    seed: Annotated[int, Meta(ge=-_INT64_MAX - 1, le=_INT64_MAX)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=64)] | None = None
    # Extension, as vLLM's: variables of the model's chat template; names that it does not read are refused.
    chat_template_kwargs: Annotated[dict[str, Scalar | None], Meta(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Raw = _ABSENT
    tools: Raw = _ABSENT
    tool_choice: Raw = _ABSENT
    functions: Raw = _ABSENT
    function_call: Raw = _ABSENT
    response_format: Raw = _ABSENT
    logprobs: Raw = _ABSENT
    top_logprobs: Raw = _ABSENT
    logit_bias: Raw = _ABSENT
    frequency_penalty: Raw = _ABSENT
    presence_penalty: Raw = _ABSENT
    repetition_penalty: Raw = _ABSENT
    reasoning_effort: Raw = _ABSENT
    modalities: Raw = _ABSENT
    audio: Raw = _ABSENT
    web_search_options: Raw = _ABSENT
    stop_token_ids: Raw = _ABSENT
    min_tokens: Raw = _ABSENT
    ignore_eos: Raw = _ABSENT
    add_generation_prompt: Raw = _ABSENT
    continue_final_message: Raw = _ABSENT
    return_token_ids: Raw = _ABSENT


# Values that ask for nothing, beside null, as compact JSON. With any other value the field would have to change the
# answer, which it can't in this version.
_NO_EFFECT: dict[str, tuple[bytes, ...]] = {
    "n": (b"1",),
    "tools": (b"[]",),
    "tool_choice": (b'"none"', b'"auto"'),
    "tool_calls": (b"[]",),
    "functions": (b"[]",),
    "function_call": (b'"none"', b'"auto"'),
    "response_format": (b'{"type":"text"}',),
    "logprobs": (b"false",),
    "top_logprobs": (b"0",),
    "logit_bias": (b"{}",),
    "frequency_penalty": (b"0", b"0.0", b"-0.0"),
    "presence_penalty": (b"0", b"0.0", b"-0.0"),
    "repetition_penalty": (b"1", b"1.0"),
    "reasoning_effort": (b'"none"',),
    "modalities": (b'["text"]',),
    "stop_token_ids": (b"[]",),
    "min_tokens": (b"0",),
    "ignore_eos": (b"false",),
    "add_generation_prompt": (b"true",),
    "continue_final_message": (b"false",),
    "return_token_ids": (b"false",),
}
_MAX_NO_EFFECT_BYTES = 256  # with any white space


def unsupported_fields(struct: Struct) -> list[str]:
    """Names of the fields of `struct` that ask for what this version can't do."""
    return [
        field
        for field in struct.__struct_fields__
        if isinstance(value := getattr(struct, field), Raw) and not _has_no_effect(field, value)
    ]


def _has_no_effect(field: str, value: Raw) -> bool:
    if len(value_bytes := bytes(value)) > _MAX_NO_EFFECT_BYTES:
        return False
    compact = msgspec.json.format(value_bytes, indent=-1)
    return compact == b"null" or compact in _NO_EFFECT.get(field, ())


class PromptTokensDetails(Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(Struct):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class CompletionUsage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class AnswerMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(Struct, kw_only=True):
    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int  # seconds since 1970
    model: str
    choices: list[Choice]
    usage: CompletionUsage
    system_fingerprint: str
    service_tier: str = "default"


class ChunkChoice(Struct, kw_only=True):
    index: int = 0
    delta: dict[str, Any]
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    service_tier: str = "default"
    usage: CompletionUsage | msgspec.UnsetType | None = msgspec.UNSET  # UNSET: the client did not ask for it
