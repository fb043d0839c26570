"""OpenAI's chat request as the neutral one."""

from collections.abc import Mapping, Sequence

import msgspec

from mlx_server.api.checks import check_parameters, refuse_nul
from mlx_server.api.openai import types as wire
from mlx_server.api.openai.fields import to_generation
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.types import ChatMessage, ChatRequest, Reasoning, Scalar, Tool, ToolCall, ToolChoice
from mlx_server.errors import InvalidRequestError
from mlx_server.wire import EngineInfo


def to_chat_request(
    body: wire.ChatCompletionRequest, model: ServedModel, info: EngineInfo, max_tokens: int
) -> ChatRequest:
    """The neutral request. InvalidRequestError for what the types alone can't tell.

    Args:
        max_tokens: where the request names none.
    """
    _check_unsupported(body)
    generation = to_generation(body, model, info)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("`top_logprobs` needs `logprobs`: true.", param="top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        fault = "`continue_final_message` and `add_generation_prompt` can't both be true."
        raise InvalidRequestError(fault, param="continue_final_message")
    if body.logprobs:
        sampling = msgspec.structs.replace(generation["sampling"], logprobs=body.top_logprobs or 0)
        generation["sampling"] = sampling
    return ChatRequest(
        **generation,
        max_tokens=body.max_completion_tokens or body.max_tokens or max_tokens,
        messages=[_to_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)],
        tools=[_to_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or [])],
        tool_choice=_to_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=Reasoning(effort=body.reasoning_effort, budget_tokens=body.thinking_token_budget),
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=body.continue_final_message is True,
        template_kwargs=_to_template_kwargs(body.chat_template_kwargs or {}),
    )


def _check_unsupported(body: wire.ChatCompletionRequest) -> None:
    unsupported = {
        "functions": bool(body.functions),
        "function_call": body.function_call not in (None, "none", "auto"),
        "modalities": body.modalities not in (None, [], ["text"]),
        "audio": body.audio is not None,
        "web_search_options": body.web_search_options is not None,
        "moderation": body.moderation is not None,
        "return_token_ids": body.return_token_ids is True,
    }
    for field, is_unsupported in unsupported.items():
        if is_unsupported:
            hint = " Use `tools`." if field.startswith("function") else ""
            raise InvalidRequestError(f"`{field}` is not supported.{hint}", param=field, code="unsupported")


def _to_message(message: wire.Message, path: str) -> ChatMessage:
    if message.role == "function" or message.function_call is not None:
        field = f"{path}.role" if message.role == "function" else f"{path}.function_call"
        fault = f"`{field}`: functions are not supported; use tools."
        raise InvalidRequestError(fault, param=field, code="unsupported")
    if message.audio is not None:
        raise InvalidRequestError(f"`{path}.audio` is not supported.", param=f"{path}.audio", code="unsupported")
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequestError(f"`{path}.tool_call_id` is missing.", param=f"{path}.tool_call_id")
    if message.role != "assistant" and message.tool_calls:
        fault = f"`{path}.tool_calls`: only the assistant calls tools."
        raise InvalidRequestError(fault, param=f"{path}.tool_calls")
    if message.content is None and message.role != "assistant":
        raise InvalidRequestError(f"`{path}.content` is missing.", param=f"{path}.content")
    if message.content is None and not (message.tool_calls or message.refusal):
        raise InvalidRequestError(f"`{path}.content` is missing.", param=f"{path}.content")
    content = _to_text(message, f"{path}.content") or message.refusal or ""
    refuse_nul(content, f"{path}.content")
    return ChatMessage(
        role=message.role,
        content=content,
        name=message.name,
        reasoning_content=message.reasoning_content or message.reasoning,
        tool_calls=[_to_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls or [])],
        tool_call_id=message.tool_call_id,
    )


def _to_text(message: wire.Message, path: str) -> str:
    """Parts of a message as one text, a line each, as other servers join them."""
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    texts = []
    for i, part in enumerate(message.content):
        text = part.text if part.type == "text" else None
        if part.type == "refusal" and message.role == "assistant":
            text = part.refusal
        elif part.type != "text":
            fault = f"`{path}[{i}].type`: parts of type {part.type[:64]!r} are not supported; this model reads text."
            raise InvalidRequestError(fault, param=f"{path}[{i}].type", code="unsupported")
        if text is None:
            raise InvalidRequestError(f"`{path}[{i}].{part.type}` is missing.", param=f"{path}[{i}].{part.type}")
        texts.append(text)
    return "\n".join(texts)


def _to_call(call: wire.MessageToolCall, path: str) -> ToolCall:
    if call.type not in (None, "function") or call.function is None:
        fault = f"`{path}`: only calls of functions are supported."
        raise InvalidRequestError(fault, param=path, code="unsupported")
    return ToolCall(call.id, call.function.name, call.function.arguments)


def _to_tool(tool: wire.ToolDefinition, path: str) -> Tool:
    if tool.type != "function":
        fault = f"`{path}.type`: tools of type {tool.type[:64]!r} are not supported, only functions."
        raise InvalidRequestError(fault, param=f"{path}.type", code="unsupported")
    if tool.function is None:
        raise InvalidRequestError(f"`{path}.function` is missing.", param=f"{path}.function")
    function = tool.function
    check_parameters(function.parameters or {}, f"{path}.function.parameters")
    return Tool(
        name=function.name,
        description=function.description,
        parameters=function.parameters or {},
        strict=function.strict is True,
    )


def _to_tool_choice(choice: str | wire.ToolChoiceObject | None) -> ToolChoice:
    match choice:
        case None | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case "required":
            return ToolChoice("required")
        case wire.ToolChoiceObject(type="function", function=wire.FunctionName(name=name)):
            return ToolChoice("required", [name])
        case wire.ToolChoiceObject(type="allowed_tools", allowed_tools=wire.AllowedTools(mode=mode, tools=tools)):
            return ToolChoice(mode, _names(tools))
    raise InvalidRequestError("`tool_choice` names no tool.", param="tool_choice")


def _names(tools: Sequence[wire.ToolReference]) -> list[str]:
    names = [tool.function.name for tool in tools if tool.type == "function" and tool.function is not None]
    if len(names) < len(tools) or not names:
        fault = "`tool_choice.allowed_tools.tools` must name functions."
        raise InvalidRequestError(fault, param="tool_choice.allowed_tools.tools")
    return names


def _to_template_kwargs(kwargs: Mapping[str, Scalar | None]) -> dict[str, Scalar]:
    """The variables that are given; null is as if it were absent, as everywhere."""
    for name, value in kwargs.items():
        if isinstance(value, str):
            refuse_nul(value, f"chat_template_kwargs.{name[:64]}")
    return {name: value for name, value in kwargs.items() if value is not None}
