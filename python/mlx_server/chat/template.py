"""Renders a conversation with the model's chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_server.chat.sandbox import Program
from mlx_server.chat.types import Scalar
from mlx_server.errors import InvalidRequestError, ModelLoadError

Message = Mapping[str, object]  # `role`, `content` (text, a list of text parts, or None), what the API adds

# Variables that are not a caller's to set.
_RESERVED = {"messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt"}
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}


class ChatTemplate:
    """A model's chat template, compiled; some models have a second one for conversations with tools.

    Args:
        source: Jinja in the dialect of transformers; None if the model has no template, then `render` refuses.
        tool_source: the template for conversations with tools, if it is another one.
        bos_token, eos_token: what the template writes for these names.
        escape: applied to every text of a conversation, see `Tokenizer.escape`.
    Raises:
        ModelLoadError: a template has a fault, or can't render a single message.
    """

    def __init__(
        self,
        source: str | None,
        *,
        tool_source: str | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        escape: Callable[[str], str] = str,
    ) -> None:
        self.source = (source or "") + (tool_source or "")
        self._escape = escape
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._for_text = None if source is None else _Template(source, self._tokens)
        self._for_tools = self._for_text if tool_source is None else _Template(tool_source, self._tokens, [_PROBE_TOOL])

    @property
    def variables(self) -> frozenset[str]:
        """Names that the templates read."""
        templates = [template for template in (self._for_text, self._for_tools) if template is not None]
        return frozenset().union(*(template.variables for template in templates))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        template_kwargs: Mapping[str, Scalar] | None = None,
    ) -> str:
        """The prompt for a conversation, to be encoded by `Tokenizer.encode_chat`.

        Args:
            messages: a tool call's `arguments` may be JSON text, as in OpenAI's API, or what it stands for.
            tools: in OpenAI's form, `{"type": "function", "function": …}`.
            template_kwargs: further variables of the template, such as Qwen's `enable_thinking`.
        Raises:
            InvalidRequestError: the template refuses the conversation, can't take it, runs into a limit, or does not
                know one of `template_kwargs`.
        """
        template = self._for_tools if tools else self._for_text
        if template is None:
            raise InvalidRequestError("the model has no chat template, so it can't chat", code="no_chat_template")
        kwargs = template_kwargs or {}
        template.check_kwargs(kwargs)
        variables: dict[str, object] = {
            **self._escaped(kwargs),
            **self._tokens,
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:  # some templates look whether the name exists
            variables["tools"] = self._escaped(tools)
        return template.render([self._escaped(_parse_arguments(message)) for message in messages], variables)

    def _escaped(self, value: Any) -> Any:
        """A copy with every text escaped."""
        if isinstance(value, str):
            return self._escape(value)
        if isinstance(value, Mapping):
            return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._escaped(item) for item in value]
        return value


class _Template:
    """One template, and the form of content that it takes: text or a list of parts, learnt by rendering one message."""

    def __init__(self, source: str, tokens: Mapping[str, str], tools: Sequence[Mapping[str, object]] = ()) -> None:
        self._program = Program(source)
        variables = {**tokens, "add_generation_prompt": True} | ({"tools": tools} if tools else {})
        for self._wants_parts in (False, True):
            fault = self._probe_fault(variables)
            if fault is None:
                return
        raise ModelLoadError(f"the model's chat template can't render a user's message: {fault}")

    @property
    def variables(self) -> frozenset[str]:
        return self._program.variables

    def check_kwargs(self, kwargs: Mapping[str, Scalar]) -> None:
        """InvalidRequestError unless the template reads all these variables, and they are left to the caller."""
        for name in kwargs:
            param = f"chat_template_kwargs.{name[:64]}"
            if name not in (known := self._program.variables - _RESERVED):
                names = ", ".join(sorted(known)) or "none"
                raise InvalidRequestError(f"`{param}`: the model's chat template reads only: {names}.", param=param)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, object]) -> str:
        prepared = [{**message, "content": self._content(message.get("content"))} for message in messages]
        return self._program.run({**variables, "messages": prepared})

    def _content(self, content: Any) -> Any:
        if isinstance(content, list) and not self._wants_parts:
            return "\n".join(part["text"] for part in content)
        if isinstance(content, str) and self._wants_parts:
            return [{"type": "text", "text": content}]
        return "" if content is None else content

    def _probe_fault(self, variables: Mapping[str, object]) -> str | None:
        text = "mlx-server probe"
        try:
            rendered = self.render([{"role": "user", "content": text}], variables)
        except InvalidRequestError as error:
            return error.message
        return None if text in rendered else "it leaves out the message"


def _parse_arguments(message: Message) -> Message:
    """The message with arguments of tool calls as objects, which most templates want, where they are JSON text."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_parse_call(call) for call in calls]} if isinstance(calls, list) else message


def _parse_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # a model wrote it; the template gets what it wrote
        return call
    return {**call, "function": {**function, "arguments": arguments}}
