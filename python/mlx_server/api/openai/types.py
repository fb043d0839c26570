"""POST /v1/chat/completions as OpenAI defines it: the request's fields and their ranges, the answer's fields."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlx_server.api.openai.fields import AnswerTimings, CompletionUsage, GenerationFields, Natural, Positive, Progress
from mlx_server.chat.types import Effort, Scalar

_Name = Annotated[str, Meta(min_length=1, max_length=256)]


# --- The request ---


class Part(Struct):
    """A part of a message's content. Only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    video_url: Any = None
    cache_control: dict[str, Any] | None = None


class CalledFunction(Struct):
    name: _Name
    arguments: str = ""  # JSON text


class MessageToolCall(Struct):
    id: str
    function: CalledFunction | None = None
    type: str | None = None
    index: int | None = None


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Meta(max_length=1024)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # extension: what the assistant thought
    reasoning: str | None = None  # the same under another name
    refusal: str | None = None
    audio: Any = None
    function_call: Any = None
    annotations: list[Any] | None = None


class FunctionTool(Struct):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Struct):
    type: str
    function: FunctionTool | None = None


class FunctionName(Struct):
    name: _Name


class ToolReference(Struct):
    type: str
    function: FunctionName | None = None


class AllowedTools(Struct):
    mode: Literal["auto", "required"]
    tools: list[ToolReference]


class ToolChoiceObject(Struct):
    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """The request body. Fields that are not listed are ignored, as OpenAI does, and named in a header."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None  # wins
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolDefinition], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    modalities: list[str] | None = None

    # Extensions of local servers
    chat_template_kwargs: Annotated[dict[str, Scalar | None], Meta(max_length=64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    thinking_token_budget: Natural | None = None

    # Refused, unless they ask for nothing
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    return_token_ids: bool | None = None


# --- The answer ---


class ScoredToken(Struct):
    token: str
    logprob: float  # >= -9999: JSON has no infinity
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ScoredToken]


class Logprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class Function(Struct):
    name: str
    arguments: str


class ToolCall(Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: Function


class AnswerMessage(Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Choice(Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
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
    timings: AnswerTimings | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(Struct, kw_only=True):
    index: int
    delta: dict[str, Any]
    logprobs: Logprobs | None = None
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
    timings: AnswerTimings | msgspec.UnsetType = msgspec.UNSET  # on a choice's last chunk
    prompt_progress: Progress | msgspec.UnsetType = msgspec.UNSET
