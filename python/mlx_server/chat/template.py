"""Renders a conversation with the model's chat template, in a sandbox: templates are programs that come with a model.

The sandbox keeps a template from Python's internals. Limits of time and output end one that runs away, as far as that
can be checked: between two pieces of output, and at each call that the template makes. An expression that takes for
ever or all memory (`'x' * 10**10`), and loops without output or calls, end only with the process.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mlx_server.errors import InvalidRequestError, ModelLoadError

MAX_RENDER_S = 1.0  # of this thread's CPU time, so that a busy machine makes no difference
MAX_OUTPUT_CHARS = 16 << 20

Message = Mapping[
    str, object
]  # `role`, `content` (a string, a list of text parts, or None) and what else the API defines

_render_end_s: ContextVar[float] = ContextVar("render_end_s")  # time.thread_time() at which the render must be done


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja in the dialect of transformers; None if the model has no template, then `render` refuses.
        bos_token, eos_token: what the template writes for these names.
        escape: applied to every text of a conversation, see `Tokenizer.escape`.
    Raises:
        ModelLoadError: the template has a fault, or can't render a single message.
    """

    def __init__(
        self,
        source: str | None,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        escape: Callable[[str], str] = str,
    ) -> None:
        self._escape = escape
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._wants_parts = False
        self._template = None
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except TemplateSyntaxError as error:
                raise ModelLoadError(f"the model's chat template has a fault in line {error.lineno}") from error
            except RecursionError as error:
                raise ModelLoadError("the model's chat template is nested too deep") from error
            self._probe()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **kwargs: bool | float | str,
    ) -> str:
        """The prompt for a conversation, to be encoded by `Tokenizer.encode_chat`.

        InvalidRequestError if the template refuses the conversation, can't take it, or runs into a limit.
        """
        if self._template is None:
            raise InvalidRequestError("the model has no chat template, so it can't chat", code="no_chat_template")
        variables: dict[str, object] = {
            **kwargs,
            **self._tokens,
            "messages": [self._prepare(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        if tools is not None:  # some templates look whether the name exists
            variables["tools"] = self._escaped(list(tools))
        return _run(self._template, variables)

    def _prepare(self, message: Message) -> dict[str, object]:
        """A message as the template wants it: content as text, or as parts if it can't take text."""
        prepared: dict[str, Any] = self._escaped(message)
        content = prepared.get("content")
        if isinstance(content, list) and not self._wants_parts:
            prepared["content"] = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self._wants_parts:
            prepared["content"] = [{"type": "text", "text": content}]
        elif content is None:
            prepared["content"] = ""
        return prepared

    def _escaped(self, value: Any) -> Any:
        """A copy with every text escaped."""
        if isinstance(value, str):
            return self._escape(value)
        if isinstance(value, Mapping):
            return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._escaped(item) for item in value]
        return value

    def _probe(self) -> None:
        """Render one message, as text and then as a list of parts, to learn which form the template takes."""
        for self._wants_parts in (False, True):
            fault = self._probe_fault()
            if fault is None:
                return
        raise ModelLoadError(f"the model's chat template can't render a user's message: {fault}")

    def _probe_fault(self) -> str | None:
        text = "mlx-server probe"
        try:
            rendered = self.render([{"role": "user", "content": text}])
        except InvalidRequestError as error:
            return error.message
        return None if text in rendered else "it leaves out the message"


def _run(template: jinja2.Template, variables: dict[str, object]) -> str:
    pieces: list[str] = []
    num_chars = 0
    token = _render_end_s.set(time.thread_time() + MAX_RENDER_S)
    try:
        for piece in template.generate(variables):
            num_chars += len(piece)
            _check_limits(num_chars)
            pieces.append(piece)
    except InvalidRequestError:
        raise
    except Exception as error:  # a template can fail in any way that Python can
        message = "the model's chat template can't render this conversation"
        raise InvalidRequestError(message, param="messages", code="chat_template_error") from error
    finally:
        _render_end_s.reset(token)
    return "".join(pieces)


def _check_limits(num_chars: int = 0) -> None:
    if num_chars > MAX_OUTPUT_CHARS:
        raise InvalidRequestError("the conversation is too long for the chat template", param="messages")
    if time.thread_time() > _render_end_s.get():
        raise InvalidRequestError("the chat template takes too long on this conversation", param="messages")


class _Environment(ImmutableSandboxedEnvironment):
    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_limits()
        return super().call(context, function, *args, **kwargs)


class _Namespace(Namespace):
    """`namespace()` without attributes that Python gives a meaning."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in dict(*args, **kwargs):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": time.strftime,
        "namespace": _Namespace,
        "dict": _dict,
    }
    del environment.globals["lipsum"]
    return environment


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter: no HTML escapes, non-ASCII text as it is."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise InvalidRequestError(str(message)[:500], param="messages", code="chat_template_error")
