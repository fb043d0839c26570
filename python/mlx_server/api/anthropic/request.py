"""Anthropic's request as the neutral one."""

import secrets
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from mlx_server.api.anthropic import types as wire
from mlx_server.api.checks import check_parameters, refuse_nul
from mlx_server.api.errors import THREAD_UNSUPPORTED
from mlx_server.chat.messages import joined
from mlx_server.chat.types import ChatMessage, ChatRequest, JsonSchema, Reasoning, Tool, ToolCall, ToolChoice
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams

# Claude Code's first system block says who pays and changes with each request: with it no prompt would begin like
# another, and no cache would help.
_BILLING_HEADER = "x-anthropic-billing-header"
_MAX_STOP_LENGTH = 4096


def to_chat_request(body: wire.MessagesRequest, defaults: SamplingParams) -> ChatRequest:
    """The neutral request. InvalidRequestError for what the types alone can't tell."""
    prompt = to_prompt(body)
    top_k = defaults.top_k if body.top_k is None else body.top_k
    top_p = defaults.top_p if body.top_p is None else body.top_p
    if top_p == 0:  # the smallest set of tokens that reaches no probability at all: the likeliest one
        top_p, top_k = 1.0, 1
    sampling = msgspec.structs.replace(
        defaults,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=top_p,
        seed=secrets.randbits(64),
    )
    return msgspec.structs.replace(
        prompt,
        sampling=sampling,
        max_tokens=max(body.max_tokens, 1),  # 0 fills the cache only; the one token is not sent
        stop=_to_stop(body.stop_sequences or []),
        progress=True,
    )


def to_prompt(body: wire.CountTokensRequest) -> ChatRequest:
    """All of the neutral request that the prompt depends on."""
    _check_unsupported(body)
    messages = [*_to_system(body.system), *_to_messages(body.messages)]
    if not messages:
        raise InvalidRequestError("`messages` hold no text.", param="messages")
    is_prefill = body.messages[-1].role == "assistant"
    if is_prefill and messages[-1].tool_calls:
        fault = "`messages`: the last turn calls tools, but the results (`tool_result`) are missing."
        raise InvalidRequestError(fault, param="messages")
    choice = body.tool_choice or wire.ToolChoice("auto")
    return ChatRequest(
        messages=messages,
        tools=_to_tools(body.tools or []),
        tool_choice=_to_tool_choice(choice, body.tools or []),
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        reasoning=_to_reasoning(body),
        grammar=_to_grammar(body.output_config),
        add_generation_prompt=not is_prefill,
        continue_final_message=is_prefill,
        sampling=SamplingParams(),
        max_tokens=1,
    )


def _check_unsupported(body: wire.CountTokensRequest) -> None:
    if body.thread is not None:
        fault = "`thread` is not supported: send the whole conversation."
        raise InvalidRequestError(fault, param="thread", code=THREAD_UNSUPPORTED)
    if body.mcp_servers:
        raise InvalidRequestError("`mcp_servers` are not supported.", param="mcp_servers", code="unsupported")


def _to_system(system: str | list[wire.TextBlock] | None) -> list[ChatMessage]:
    if isinstance(system, str):
        refuse_nul(system, "system")
        system = [wire.TextBlock(system)]
    for i, block in enumerate(system or []):
        refuse_nul(block.text, f"system[{i}].text")
    texts = [block.text for block in system or [] if block.text and not block.text.startswith(_BILLING_HEADER)]
    return [ChatMessage(role="system", content="\n".join(texts))] if texts else []


def _to_messages(turns: Iterable[wire.Turn]) -> list[ChatMessage]:
    """Turns of one role that follow each other are one turn."""
    messages: list[ChatMessage] = []
    for i, turn in enumerate(turns):
        path = f"messages[{i}].content"
        if isinstance(turn.content, str):
            refuse_nul(turn.content, path)
        if turn.role == "assistant":
            parts: Iterable[ChatMessage] = [_to_assistant(turn.content, path)]
        else:
            parts = _to_user(turn.content, path, turn.role)
        for message in parts:
            if messages and messages[-1].role == message.role and message.role != "tool":
                messages[-1] = joined(messages[-1], message)
            else:
                messages.append(message)
    return messages


def _to_assistant(content: str | Sequence[wire.Block], path: str) -> ChatMessage:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate([wire.TextBlock(content)] if isinstance(content, str) else content):
        match block:
            case wire.TextBlock():
                refuse_nul(block.text, f"{path}[{i}].text")
                texts.append(block.text)
            case wire.ThinkingBlock():
                refuse_nul(block.thinking, f"{path}[{i}].thinking")
                thoughts.append(block.thinking)
            case wire.ToolUseBlock():
                calls.append(ToolCall(block.id, block.name, msgspec.json.encode(block.input).decode()))
            case wire.RedactedThinkingBlock():
                pass
            case _:
                raise _misplaced(block, f"{path}[{i}]", "assistant")
    return ChatMessage(
        role="assistant",
        content="\n".join(texts),
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=calls,
    )


def _to_user(content: str | Sequence[wire.Block], path: str, role: str) -> Iterator[ChatMessage]:
    """A user's turn, or the system's within the conversation: its tools' results and its texts, in order."""
    blocks: Sequence[wire.Block] = [wire.TextBlock(content)] if isinstance(content, str) else content
    texts: list[str] = []
    for i, block in enumerate(blocks):
        block_path = f"{path}[{i}]"
        match block:
            case wire.ToolResultBlock() if role == "user":
                if texts:
                    yield ChatMessage(role="user", content="\n".join(texts))
                    texts = []
                yield _to_tool_result(block, block_path)
            case wire.TextBlock() | wire.ImageBlock() | wire.DocumentBlock() | wire.SearchResultBlock():
                texts.append(_to_text(block, block_path))
            case _:
                raise _misplaced(block, block_path, role)
    if texts or not blocks:
        yield ChatMessage(role="system" if role == "system" else "user", content="\n".join(texts))


def _to_tool_result(block: wire.ToolResultBlock, path: str) -> ChatMessage:
    if block.content is None or isinstance(block.content, str):
        text = block.content or ""
        refuse_nul(text, f"{path}.content")
    else:
        text = "\n".join(_to_text(part, f"{path}.content[{i}]") for i, part in enumerate(block.content))
    if block.is_error:
        text = f"Error: {text}"
    return ChatMessage(role="tool", content=text, tool_call_id=block.tool_use_id)


def _to_text(block: wire.TextBlock | wire.ImageBlock | wire.DocumentBlock | wire.SearchResultBlock, path: str) -> str:
    match block:
        case wire.TextBlock():
            refuse_nul(block.text, f"{path}.text")
            return block.text
        case wire.SearchResultBlock():
            parts = [block.title, block.source, *(text.text for text in block.content)]
        case wire.DocumentBlock():
            parts = [block.title or "", block.context or "", _document_text(block, path)]
        case wire.ImageBlock():
            fault = f"`{path}`: images are not supported; this model reads text."
            raise InvalidRequestError(fault, param=path, code="unsupported")
    text = "\n".join(part for part in parts if part)
    refuse_nul(text, path)
    return text


def _document_text(block: wire.DocumentBlock, path: str) -> str:
    source = block.source
    if isinstance(source, wire.TextSource):
        return source.data
    if not isinstance(source, wire.ContentSource):
        fault = f"`{path}.source`: only documents of plain text are supported; this model reads text."
        raise InvalidRequestError(fault, param=f"{path}.source", code="unsupported")
    if isinstance(source.content, str):
        return source.content
    return "\n".join(_to_text(part, f"{path}.source.content[{i}]") for i, part in enumerate(source.content))


def _misplaced(block: wire.Block, path: str, role: str) -> InvalidRequestError:
    kind = block.__struct_config__.tag
    return InvalidRequestError(f"`{path}`: a turn of role {role} can't hold blocks of type {kind}.", param=path)


def _to_tools(tools: Sequence[wire.Tool]) -> list[Tool]:
    names = [tool.name for tool in tools]
    for i, name in enumerate(names):
        if name in names[:i]:
            fault = f"`tools[{i}].name`: names must be unique, but {name!r} was given before."
            raise InvalidRequestError(fault, param=f"tools[{i}].name")
    return [_to_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _to_tool(tool: wire.Tool, path: str) -> Tool:
    if tool.type not in (None, "custom"):
        fault = f"`{path}.type`: tools of type {tool.type[:64]!r} are not supported, only custom ones."
        raise InvalidRequestError(fault, param=f"{path}.type", code="unsupported")
    if tool.input_schema is None:
        raise InvalidRequestError(f"`{path}.input_schema` is missing.", param=f"{path}.input_schema")
    check_parameters(tool.input_schema, f"{path}.input_schema")
    return Tool(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict is True)


def _to_tool_choice(choice: wire.ToolChoice, tools: Sequence[wire.Tool]) -> ToolChoice:
    match choice.type:
        case "auto" | "none":
            return ToolChoice(choice.type)
        case "any" | "tool" if not tools:
            raise InvalidRequestError("`tool_choice` needs `tools`.", param="tool_choice")
        case "any":
            return ToolChoice("required")
        case "tool":
            if choice.name not in {tool.name for tool in tools}:
                fault = f"`tool_choice.name`: there is no tool {(choice.name or '')[:256]!r} in `tools`."
                raise InvalidRequestError(fault, param="tool_choice.name")
            return ToolChoice("required", [choice.name])


def _to_reasoning(body: wire.CountTokensRequest) -> Reasoning:
    effort = body.output_config.effort if body.output_config else None
    thinking = body.thinking
    if thinking is None:
        return Reasoning(effort=effort)
    if thinking.type == "enabled" and thinking.budget_tokens is None:
        raise InvalidRequestError("`thinking.budget_tokens` is missing.", param="thinking.budget_tokens")
    enabled = {"enabled": True, "disabled": False}.get(thinking.type)
    return Reasoning(enabled=enabled, effort=effort, budget_tokens=thinking.budget_tokens)


def _to_grammar(config: wire.OutputConfig | None) -> JsonSchema | None:
    if config is None or config.format is None:
        return None
    return JsonSchema(schema=config.format.schema, param="output_config.format.schema")


def _to_stop(stop: Sequence[str]) -> list[str]:
    for i, text in enumerate(stop):
        if not 1 <= len(text) <= _MAX_STOP_LENGTH:
            fault = f"`stop_sequences[{i}]` must have 1 to {_MAX_STOP_LENGTH} characters."
            raise InvalidRequestError(fault, param=f"stop_sequences[{i}]")
        refuse_nul(text, f"stop_sequences[{i}]")
    return list(stop)
