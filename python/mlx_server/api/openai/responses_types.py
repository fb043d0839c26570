"""POST /v1/responses as OpenAI defines it: the request's fields and their ranges, the answer's fields.

After the types of the `openai` SDK 3.54. README says which fields are accepted without effect, and why.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from mlx_server.api.openai.fields import Natural, Positive, Probability, Verbosity
from mlx_server.api.openai.types import TokenLogprob
from mlx_server.chat.types import Effort

_Name = Annotated[str, Meta(min_length=1, max_length=256)]

Status = Literal["in_progress", "completed", "incomplete", "failed"]
LOGPROBS = "message.output_text.logprobs"


# --- The request ---


class ContentPart(Struct, omit_defaults=True):
    """A part of a message, of a tool's output or of thoughts. Only text is served."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
    detail: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file_id: Any = None
    file_data: Any = None
    file_url: Any = None
    filename: Any = None


class InputItem(Struct, omit_defaults=True):
    """An item of a conversation. Its type, a message if there is none, tells which of the fields it has."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None  # message
    content: str | list[ContentPart] | None = None  # message, reasoning
    summary: list[ContentPart] | None = None  # reasoning
    call_id: _Name | None = None  # function_call, function_call_output
    name: _Name | None = None  # function_call
    arguments: str | None = None  # function_call: JSON text
    output: str | list[ContentPart] | None = None  # function_call_output
    status: str | None = None
    phase: str | None = None
    encrypted_content: str | None = None
    namespace: str | None = None
    caller: dict[str, Any] | None = None
    is_async: bool | None = msgspec.field(default=None, name="async")


class ResponsesTool(Struct):
    """A function that the model may call. Tools of other types are ignored, and named in a header."""

    type: str
    name: _Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[Any] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None
    is_async: bool | None = msgspec.field(default=None, name="async")


class ResponsesToolReference(Struct):
    type: str
    name: _Name | None = None


class ResponsesToolChoice(Struct, omit_defaults=True):
    type: Literal["function", "allowed_tools"]
    name: _Name | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ResponsesToolReference] | None = None


class TextFormat(Struct, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: _Name | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None  # accepted: every schema is enforced


class TextConfig(Struct, omit_defaults=True):
    format: TextFormat | None = None
    verbosity: Verbosity | None = None


class ReasoningConfig(Struct):
    effort: Effort | None = None
    summary: str | None = None  # thoughts are given whole
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponsesStreamOptions(Struct):
    include_obfuscation: bool | None = None


class ResponsesRequest(Struct, kw_only=True):
    """The request body. Null means absent everywhere."""

    model: str
    input: str | Annotated[list[InputItem], Meta(max_length=4096)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: (
        list[
            Literal[
                "message.output_text.logprobs",
                # Of items that this server does not make, or not in that form
                "reasoning.encrypted_content",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None
    ) = None
    metadata: Annotated[dict[str, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None  # auto is refused

    # Extensions, as in the chat endpoint
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None

    # Refused, unless they ask for nothing
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: list[Any] | None = None
    moderation: Any = None

    access_programs: dict[str, Any] | None = None
    background_options: dict[str, Any] | None = None
    image: dict[str, Any] | None = None
    max_tool_calls: Natural | None = None  # of tools that the server runs: it has none
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None


class ResponseQuery(Struct):
    stream: bool | None = None  # true is refused
    starting_after: int | None = None  # of streams


# --- The answer ---


class OutputText(Struct, tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Struct, tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status = "in_progress"
    content: list[OutputText] = []


class FunctionCall(Struct, tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    arguments: str = ""  # JSON text
    status: Status = "in_progress"


class ReasoningText(Struct, tag="reasoning_text"):
    text: str


class ReasoningItem(Struct, tag="reasoning", kw_only=True):
    id: str
    summary: list[Any] = []
    content: list[ReasoningText] = []
    status: Status = "in_progress"


OutputItem = OutputMessage | FunctionCall | ReasoningItem


class FunctionTool(Struct, tag="function", kw_only=True):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class EffectiveReasoning(Struct):
    effort: Effort | None
    summary: None = None


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0  # writing to the cache costs nothing extra


class OutputTokensDetails(Struct):
    reasoning_tokens: int


class ResponseUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(Struct):
    reason: Literal["max_output_tokens"]


class Response(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int  # seconds since 1970, as in completed_at
    status: Status = "in_progress"
    completed_at: int | None = None
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: EffectiveReasoning
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str]


class DeletedResponse(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
