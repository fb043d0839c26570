"""Conversations as chat templates read them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from mlx_server.chat.types import ChatMessage, Tool, ToolCall

_MISTRAL_ID_LENGTH = 9
_ASKS_FOR_MISTRAL_IDS = f"length != {_MISTRAL_ID_LENGTH}"

Message = dict[str, Any]


class TemplateTraits(Protocol):
    @property
    def source(self) -> str:
        """Of all templates."""

    @property
    def variables(self) -> frozenset[str]:
        """What the templates read."""


def joined(first: ChatMessage, second: ChatMessage) -> ChatMessage:
    """Two messages of one role, the second behind the first, as one."""
    thoughts = [text for text in (first.reasoning_content, second.reasoning_content) if text]
    return msgspec.structs.replace(
        first,
        content="\n".join(text for text in (first.content, second.content) if text),
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=first.tool_calls + second.tool_calls,
    )


def template_messages(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], template: TemplateTraits
) -> list[Message]:
    """Messages in OpenAI's form. Where a template knows no tools, they become texts that it can show."""
    shown = [_to_message(message, template.source) for message in messages]
    return shown if "tools" in template.variables else _without_tools(shown, tools)


def in_plain_turns(messages: Sequence[Message]) -> list[Message] | None:
    """The same as at most one system message and alternating turns of user and assistant; None if it is that already.

    Agents send several system messages, also within conversations, to be kept in mind from there on (they become parts
    of the user's turns), and several messages of the user in a row. Some templates refuse them.
    """
    shown: list[Message] = []
    for message in messages:
        is_later = message["role"] == "system" and any(before["role"] != "system" for before in shown)
        turn = {**message, "role": "user"} if is_later else message
        if shown and shown[-1]["role"] == turn["role"] and turn["role"] in ("system", "user"):
            shown[-1] = {**shown[-1], "content": f"{shown[-1]['content']}\n\n{turn['content']}"}
        else:
            shown.append(turn)
    return None if shown == list(messages) else shown


def template_tools(tools: Sequence[Tool]) -> list[Message]:
    """Tools in OpenAI's form."""
    return [{"type": "function", "function": _function(tool)} for tool in tools]


def _function(tool: Tool) -> Message:
    description = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **description, "parameters": tool.parameters or {"type": "object", "properties": {}}}


def _to_message(message: ChatMessage, source: str) -> Message:
    role = "system" if message.role == "developer" and "developer" not in source else message.role
    shown: Message = {"role": role, "content": message.content}
    if message.name is not None:
        shown["name"] = message.name
    if message.reasoning_content is not None:
        shown["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        shown["tool_calls"] = [_to_call(call, source) for call in message.tool_calls]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = _to_call_id(message.tool_call_id, source)
    return shown


def _to_call(call: ToolCall, source: str) -> Message:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": _to_call_id(call.id, source), "type": "function", "function": function}


def _to_call_id(call_id: str, source: str) -> str:
    """Mistral's templates refuse ids of another length than theirs."""
    if _ASKS_FOR_MISTRAL_IDS not in source or len(call_id) == _MISTRAL_ID_LENGTH:
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:_MISTRAL_ID_LENGTH]


# --- Templates without tools ---

_INSTRUCTIONS = """You may call these functions:
{functions}

To call a function, write, for each call:
<tool_call>
{{"name": "its name", "arguments": {{"argument": "value"}}}}
</tool_call>"""


def _without_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Tools as a part of the system message, calls and results as texts, in the form of Hermes."""
    shown: list[Message] = []
    before = None
    for message in messages:
        text = _as_text(message)
        # Results are a user's turn, and templates want turns to alternate.
        if before == "tool" and text["role"] == "user":
            shown[-1] = {**shown[-1], "content": f"{shown[-1]['content']}\n{text['content']}"}
        else:
            shown.append(text)
        before = message["role"]
    if not tools:
        return shown
    functions = "\n".join(json.dumps(_function(tool), ensure_ascii=False) for tool in tools)
    instructions = _INSTRUCTIONS.format(functions=functions)
    if shown and shown[0]["role"] == "system":
        return [{**shown[0], "content": f"{shown[0]['content']}\n\n{instructions}"}, *shown[1:]]
    return [{"role": "system", "content": instructions}, *shown]


def _as_text(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls", [])
    texts = [message["content"]] if message["content"] or not calls else []
    for call in calls:
        name = json.dumps(call["function"]["name"], ensure_ascii=False)
        arguments = call["function"]["arguments"]
        texts.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": "\n".join(texts)}
