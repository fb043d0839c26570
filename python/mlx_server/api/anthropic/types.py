"""POST /v1/messages as Anthropic defines it: the request's fields and their ranges, the answer's fields.

After the types of the `anthropic` SDK 2.12. README says which fields are accepted without effect, and why.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

_INT64_MAX = 2**63 - 1

_Text = Annotated[str, Meta(max_length=8 << 20)]


# --- Blocks of a turn ---


class TextBlock(Struct, tag="text"):
    text: _Text
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


class ImageBlock(Struct, tag="image"):
    """Refused: the models served here read text."""

    source: Any
    cache_control: dict[str, Any] | None = None
    transformations: Any = None


class TextSource(Struct, tag="text"):
    data: _Text
    media_type: Literal["text/plain"] = "text/plain"


class ContentSource(Struct, tag="content"):
    content: "str | list[TextBlock | ImageBlock]"


class Base64Source(Struct, tag="base64"):
    data: Any = None
    media_type: str | None = None


class UrlSource(Struct, tag="url"):
    url: Any = None


class FileSource(Struct, tag="file"):
    file_id: Any = None


class DocumentBlock(Struct, tag="document"):
    """Served where its source is text."""

    source: TextSource | ContentSource | Base64Source | UrlSource | FileSource
    title: str | None = None
    context: str | None = None
    cache_control: dict[str, Any] | None = None
    citations: dict[str, Any] | None = None


class SearchResultBlock(Struct, tag="search_result"):
    content: list[TextBlock]
    source: str
    title: str
    cache_control: dict[str, Any] | None = None
    citations: dict[str, Any] | None = None


class ToolUseBlock(Struct, tag="tool_use"):
    id: Annotated[str, Meta(min_length=1, max_length=256)]
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    input: dict[str, Any]
    cache_control: dict[str, Any] | None = None
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class ToolResultBlock(Struct, tag="tool_result"):
    tool_use_id: Annotated[str, Meta(min_length=1, max_length=256)]
    content: str | list[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock] | None = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None
    toolset_name: str | None = None


class ThinkingBlock(Struct, tag="thinking"):
    thinking: _Text
    signature: str | None = None


class RedactedThinkingBlock(Struct, tag="redacted_thinking"):
    """Thoughts that only Anthropic's servers can read: left out of the prompt."""

    data: str


Block = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ToolUseBlock
    | ToolResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
)


class Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


# --- The request ---


class Tool(Struct):
    """A tool of the client's. Those with another `type` than custom have no schema here, and are refused."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    type: str | None = None
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None  # arguments are always streamed as they come
    input_examples: list[Any] | None = None
    allowed_callers: list[Any] | None = None
    defer_loading: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    """What other types than these four ask for is not known here."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=0, le=_INT64_MAX)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Struct, kw_only=True):
    """What the prompt is made of."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1, max_length=4096)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    thread: Any = None  # refused: the clients then send the whole conversation
    cache_control: dict[str, Any] | None = None  # every prompt is cached
    context_management: dict[str, Any] | None = None
    mcp_servers: list[Any] | None = None  # refused unless empty
    speed: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The request body. Null means absent everywhere."""

    max_tokens: Annotated[int, Meta(ge=0, le=_INT64_MAX)]
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Meta(max_length=64)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    container: str | dict[str, Any] | None = None
    diagnostics: dict[str, Any] | None = None
    inference_geo: str | None = None


# --- The answer ---


class OutputTokensDetails(Struct):
    thinking_tokens: int


class Usage(Struct):
    """All three kinds of input tokens together are the prompt."""

    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    cache_creation_input_tokens: int = 0  # writing to the cache costs nothing extra


class Message(Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Usage


class TokenCount(Struct):
    input_tokens: int
