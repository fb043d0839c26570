"""What a tool-call format is, and how to read the JSON objects that most of them write."""

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

from mlx_server.chat.incremental import Arguments, CallStart, IncrementalParser, Malformed, Wait
from mlx_server.chat.types import Tool

Marker = Callable[[str], str]  # writes a piece of markup as a term of llguidance's Lark: its token, or its text

_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as Python writes JSON
_ARGUMENTS = ("arguments", "parameters")
_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)
_ANY_NAME = re.compile(r".*", re.DOTALL)


class ToolParser(IncrementalParser):
    """Splits an answer into text and tool calls.

    A call begins when its name is certain and its arguments begin; what does not get so far is given back as text.
    Arguments that stop being JSON end there, and the rest is text.

    Attributes:
        special_tokens: the format's special tokens, which the detokenizer must not leave out.
        signs: a template with one of these is written for this format.
        lark_rules: what `lark_call` refers to.
        arguments_key: as the format's models write it; others are read too.
        tool_names, argument_names: what the format can write.

    Args:
        tools: those that may be called. Where the markup is unmistakable, the model may call others: that is for the
            client to answer.
        refused: names that are never called.
    """

    special_tokens: ClassVar[tuple[str, ...]] = ()
    signs: ClassVar[tuple[str, ...]] = ()
    lark_rules: ClassVar[tuple[str, ...]] = ()
    arguments_key: ClassVar[str] = "arguments"
    tool_names: ClassVar[re.Pattern[str]] = _ANY_NAME
    argument_names: ClassVar[re.Pattern[str]] = _ANY_NAME

    def __init__(self, tools: Sequence[Tool], refused: Collection[str] = ()) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self._refused = refused
        super().__init__()

    def calls(self, call: Wait[None]) -> Wait[None]:
        """Read `call`; where it is malformed, text goes on, and the marker before it is text too if no call began."""
        try:
            yield from call
            yield from self.space()
            self.drop_read()
        except Malformed:
            self.give_back()

    def start(self, name: str) -> None:
        """A call begins here. Malformed if it may not be."""
        if name in self._refused or not (name in self.tools or _NAME.fullmatch(name)):
            raise Malformed
        self.give(CallStart(name))
        self.drop_read()

    # --- the format as rules of llguidance's Lark; TEXT is a terminal for any text ---

    @classmethod
    @abstractmethod
    def lark_calls(cls, marker: Marker, *, parallel: bool) -> str:
        """One `call` or, with `parallel`, one or more."""

    @classmethod
    def lark_call(cls, tool: Tool, marker: Marker) -> str:
        """A call of one tool."""
        return f"{quoted(call_head(tool.name, cls.arguments_key))} {json_term(tool.parameters)} {quoted('}')}"

    @classmethod
    def lark_answer(cls, marker: Marker, *, parallel: bool) -> list[str]:
        """Rules for `body`: text with `calls` in it."""
        return ["body: calls | OTHER", r"OTHER: /[^{\[\s`<](?s:.*)/"]

    # --- reading JSON calls ---

    def json_calls(self, separator: str) -> Wait[None]:
        """Read the JSON of one call of a tool or, if there is a separator, of several."""
        while True:
            yield from self.json_call(only_calls=True)
            yield from self.space()
            if not separator or not (yield from self.literal(separator)):
                return

    def json_call(self, *, only_calls: bool = False) -> Wait[None]:
        """Read `{"name": …, "arguments": …}`, with its keys in any order; `parameters` is as good a key.

        With `only_calls` it is no call if it has further keys or the name of no tool: text that happens to be JSON.
        """
        yield from self.expect("{")
        name = arguments = None
        is_given = False
        while True:
            key = yield from self._json_key()
            if key == "name":
                name = yield from self._json_string()
                if only_calls and name not in self.tools:
                    raise Malformed
            elif key in _ARGUMENTS and name is not None and not is_given and (yield from self.peek()) == "{":
                self.start(name)
                is_given = True
                if not (yield from self.give_object()):
                    raise Malformed
            elif key in _ARGUMENTS and not is_given:
                arguments = _as_object((yield from self.json_value()))
            elif only_calls and key not in ("id", "type"):
                raise Malformed
            else:
                yield from self.json_value()
            yield from self.space()
            if not (yield from self.literal(",")):
                break
        yield from self.expect("}")
        if is_given:
            self.drop_read()
        else:
            self.call(name, arguments or "{}")

    def call(self, name: str | None, arguments: str) -> None:
        """Give a whole call."""
        if name is None:
            raise Malformed
        self.start(name)
        self.give(Arguments(arguments))

    def _json_key(self) -> Wait[str]:
        yield from self.space()
        key = yield from self._json_string()
        yield from self.expect(":")
        yield from self.space()
        return key

    def _json_string(self) -> Wait[str]:
        if (yield from self.peek()) != '"':
            raise Malformed
        try:
            return str(json.loads((yield from self.json_value()), strict=False))
        except ValueError:
            raise Malformed from None


def _as_object(value: str) -> str:
    """Arguments that are an object, null, or an object's JSON as a string."""
    try:
        parsed = json.loads(value, strict=False)
        if isinstance(parsed, str):
            value, parsed = parsed, json.loads(parsed, strict=False)
    except (ValueError, RecursionError):
        raise Malformed from None
    if parsed is None:
        return "{}"
    if not isinstance(parsed, dict):
        raise Malformed
    return value


class TaggedCalls(ToolParser):
    """For formats where each call stands between two tags."""

    tags: ClassVar[tuple[str, str]]

    @classmethod
    def lark_calls(cls, marker: Marker, *, parallel: bool) -> str:
        call = f"({marker(cls.tags[0])} {cls._after_tag(marker)})"
        return f"{call} ({quoted(chr(10))} {call})*" if parallel else call

    @classmethod
    def lark_answer(cls, marker: Marker, *, parallel: bool) -> list[str]:
        many = "*" if parallel else "?"
        return [f"body: (lead {cls._after_tag(marker)}){many} TEXT", text_up_to("lead", marker(cls.tags[0]))]

    @classmethod
    def _after_tag(cls, marker: Marker) -> str:
        return f"{quoted(chr(10))} call {quoted(chr(10))} {marker(cls.tags[1])}"


def quoted(text: str) -> str:
    """A text as a term of Lark."""
    return json.dumps(text, ensure_ascii=False)


def json_term(schema: Any) -> str:
    """JSON that matches a schema, as a term of Lark."""
    return "%json " + json.dumps({"x-guidance": _SPACES, **schema} if isinstance(schema, dict) else schema)


def call_head(name: str, arguments_key: str) -> str:
    """What comes before the arguments of a call as JSON."""
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{arguments_key}": '


def text_up_to(rule: str, end: str) -> str:
    """A rule for any text up to the first `end`, a marker."""
    is_token = end.startswith("<")  # text has none, but a lazy rule, which is one piece of text, can't end with one
    return f"{rule}: TEXT {end}" if is_token else f"{rule}[lazy]: TEXT {end}"


def parameters_of(tool: Tool) -> list[tuple[str, Any, bool]]:
    """Each parameter's name and schema, and whether it must be given."""
    properties, required = tool.parameters.get("properties"), tool.parameters.get("required")
    if not isinstance(properties, dict):
        return []
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return [
        (name, {**shared, **schema} if isinstance(schema, dict) else schema, name in (required or []))
        for name, schema in properties.items()
    ]
