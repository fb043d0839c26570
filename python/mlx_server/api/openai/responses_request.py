"""OpenAI's request for a response as the neutral one."""

from collections.abc import Iterable, Sequence

import msgspec

from mlx_server.api.checks import check_parameters, refuse_nul
from mlx_server.api.openai import responses_types as wire
from mlx_server.api.openai.fields import GenerationFields, to_generation
from mlx_server.api.openai.responses_store import ResponseStore
from mlx_server.chat.messages import joined
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.types import ChatMessage, ChatRequest, JsonSchema, Reasoning, Tool, ToolCall, ToolChoice
from mlx_server.errors import InvalidRequestError
from mlx_server.wire import EngineInfo

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def to_items(body: wire.ResponsesRequest, store: ResponseStore | None) -> list[wire.InputItem]:
    """The whole conversation: that of the previous response, then the request's own items, none of them a reference."""
    items: list[wire.InputItem] = []
    if body.previous_response_id is not None:
        previous = store.get(body.previous_response_id) if store is not None else None
        if previous is None:
            fault = f"`previous_response_id`: there is no response {body.previous_response_id[:64]!r}."
            code = "previous_response_not_found"
            raise InvalidRequestError(fault, param="previous_response_id", code=code)
        items += previous.items
    if isinstance(body.input, str):
        refuse_nul(body.input, "input")
        return [*items, wire.InputItem(type="message", role="user", content=body.input)]
    return items + [_resolve(item, f"input[{i}]", store) for i, item in enumerate(body.input or [])]


def to_chat_request(
    body: wire.ResponsesRequest,
    items: Sequence[wire.InputItem],
    model: ServedModel,
    info: EngineInfo,
    max_tokens: int,
) -> ChatRequest:
    """The neutral request. InvalidRequestError for what the types alone can't tell.

    Args:
        items: the whole conversation, as `to_items` gives it.
        max_tokens: where the request names none.
    """
    _check_unsupported(body)
    fields = GenerationFields(
        model=body.model,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
    )
    generation = to_generation(fields, model, info)
    if wire.LOGPROBS in (body.include or []):
        generation["sampling"] = msgspec.structs.replace(generation["sampling"], logprobs=body.top_logprobs or 0)
    elif body.top_logprobs:
        raise InvalidRequestError(f"`top_logprobs` needs `include`: {wire.LOGPROBS!r}.", param="top_logprobs")
    generation["grammar"] = _to_grammar(body.text)
    num_own = 1 if isinstance(body.input, str) else len(body.input or [])
    messages = _to_messages(items, num_own - len(items))
    if not messages:
        raise InvalidRequestError("`input` holds no text.", param="input")
    if body.instructions:
        refuse_nul(body.instructions, "instructions")
        messages.insert(0, ChatMessage(role="system", content=body.instructions))
    return ChatRequest(
        **generation,
        max_tokens=body.max_output_tokens or max_tokens,
        messages=messages,
        tools=[_to_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or []) if tool.type == "function"],
        tool_choice=_to_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=Reasoning(effort=body.reasoning.effort if body.reasoning else None),
    )


def ignored_tools(body: wire.ResponsesRequest) -> list[str]:
    """Paths of the tools that are no functions: clients offer them to every server, and go on without."""
    return [f"tools[{i}]" for i, tool in enumerate(body.tools or []) if tool.type != "function"]


def _check_unsupported(body: wire.ResponsesRequest) -> None:
    unsupported = {
        "background": body.background is True,
        "conversation": body.conversation is not None,
        "prompt": body.prompt is not None,
        "context_management": bool(body.context_management),
        "moderation": body.moderation is not None,
        "truncation": body.truncation == "auto",
    }
    for field, is_unsupported in unsupported.items():
        if is_unsupported:
            hint = ": 'auto'" if field == "truncation" else ""
            raise InvalidRequestError(f"`{field}`{hint} is not supported.", param=field, code="unsupported")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("`stream_options` needs `stream`: true.", param="stream_options")


# --- Items ---


def _resolve(item: wire.InputItem, path: str, store: ResponseStore | None) -> wire.InputItem:
    """The item that a reference names: its id tells of which response it is."""
    is_reference = item.type == "item_reference" or (item.type is None and item.role is None and item.id is not None)
    if not is_reference:
        return item
    item_id = item.id or ""
    response_id = "resp_" + item_id.partition("_")[2].partition("_")[0]
    stored = store.get(response_id) if store is not None else None
    for candidate in stored.items if stored is not None else []:
        if candidate.id == item_id:
            return candidate
    fault = f"`{path}.id`: there is no item {item_id[:64]!r}; send the item itself."
    raise InvalidRequestError(fault, param=f"{path}.id", code="item_not_found")


def _to_messages(items: Iterable[wire.InputItem], start: int) -> list[ChatMessage]:
    """What the assistant thought, said and called, one after the other, is one turn. `start`: the first item's index,
    less than 0 for those of the previous response."""
    messages: list[ChatMessage] = []
    for i, item in enumerate(items, start):
        message = _to_message(item, f"input[{i}]")
        if message.role == "assistant" and messages and messages[-1].role == "assistant":
            messages[-1] = joined(messages[-1], message)
        else:
            messages.append(message)
    return [message for message in messages if message.role != "assistant" or message.content or message.tool_calls]


def _to_message(item: wire.InputItem, path: str) -> ChatMessage:
    match item.type:
        case None | "message":
            if item.role is None:
                raise _missing(f"{path}.role")
            if item.content is None:
                raise _missing(f"{path}.content")
            return ChatMessage(role=item.role, content=_to_text(item.content, f"{path}.content"))
        case "reasoning":
            thoughts = _to_text(item.content or item.summary or "", f"{path}.content")
            return ChatMessage(role="assistant", reasoning_content=thoughts or None)
        case "function_call":
            return ChatMessage(role="assistant", tool_calls=[_to_call(item, path)])
        case "function_call_output":
            if item.call_id is None:
                raise _missing(f"{path}.call_id")
            if item.output is None:
                raise _missing(f"{path}.output")
            return ChatMessage(role="tool", content=_to_text(item.output, f"{path}.output"), tool_call_id=item.call_id)
    fault = f"`{path}.type`: items of type {item.type[:64]!r} are not supported."
    raise InvalidRequestError(fault, param=f"{path}.type", code="unsupported")


def _to_call(item: wire.InputItem, path: str) -> ToolCall:
    if item.call_id is None:
        raise _missing(f"{path}.call_id")
    if item.name is None:
        raise _missing(f"{path}.name")
    return ToolCall(item.call_id, item.name, item.arguments or "{}")


def _to_text(content: str | Sequence[wire.ContentPart], path: str) -> str:
    """Parts as one text, a line each, as in the chat endpoint."""
    if isinstance(content, str):
        refuse_nul(content, path)
        return content
    texts = []
    for i, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type != "refusal" and part.type not in _TEXT_PARTS:
            fault = f"`{path}[{i}].type`: parts of type {part.type[:64]!r} are not supported; this model reads text."
            raise InvalidRequestError(fault, param=f"{path}[{i}].type", code="unsupported")
        if text is None:
            raise _missing(f"{path}[{i}].{'refusal' if part.type == 'refusal' else 'text'}")
        refuse_nul(text, f"{path}[{i}]")
        texts.append(text)
    return "\n".join(texts)


def _missing(path: str) -> InvalidRequestError:
    return InvalidRequestError(f"`{path}` is missing.", param=path)


# --- Tools and structure ---


def _to_tool(tool: wire.ResponsesTool, path: str) -> Tool:
    if tool.name is None:
        raise _missing(f"{path}.name")
    check_parameters(tool.parameters or {}, f"{path}.parameters")
    return Tool(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters or {},
        strict=tool.strict is True,
    )


def _to_tool_choice(choice: str | wire.ResponsesToolChoice | None) -> ToolChoice:
    match choice:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "required":
            return ToolChoice("required")
        case wire.ResponsesToolChoice(type="function", name=str() as name):
            return ToolChoice("required", [name])
        case wire.ResponsesToolChoice(type="allowed_tools", mode=("auto" | "required") as mode, tools=[*tools]):
            return ToolChoice(mode, _names(tools))
    raise InvalidRequestError("`tool_choice` names no tool.", param="tool_choice")


def _names(tools: Sequence[wire.ResponsesToolReference]) -> list[str]:
    names = [tool.name for tool in tools if tool.type == "function" and tool.name is not None]
    if len(names) < len(tools) or not names:
        raise InvalidRequestError("`tool_choice.tools` must name functions.", param="tool_choice.tools")
    return names


def _to_grammar(text: wire.TextConfig | None) -> JsonSchema | None:
    form = text.format if text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return JsonSchema(schema={"type": "object"}, param="text.format")
    if form.name is None:
        raise _missing("text.format.name")
    if form.schema is None:
        raise _missing("text.format.schema")
    return JsonSchema(schema=form.schema, param="text.format.schema")
