"""Qwen3-Coder: a call as XML, whose values are text that the tool's schema gives a type.

<tool_call>
<function=get_weather>
<parameter=city>
Zürich
</parameter>
</function>
</tool_call>
"""

import json
import re
from typing import Any

from mlx_server.chat.incremental import Arguments, Malformed, Wait, held_back
from mlx_server.chat.tool_parsers.base import Marker, TaggedCalls, json_term, parameters_of, quoted
from mlx_server.chat.types import Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_VALUE_ENDS = ("\n" + _PARAMETER_END, _PARAMETER_END)
_NAME = re.compile(r"[^<>\s]")


class Qwen3Coder(TaggedCalls):
    tags = (_OPEN, _CLOSE)
    signs = (_FUNCTION,)
    tool_names = argument_names = re.compile(r"[^<>\s]+")
    lark_rules = (f"xml_text[lazy]: TEXT {quoted(_PARAMETER_END)}",)

    @classmethod
    def lark_call(cls, tool: Tool, marker: Marker) -> str:
        terms = [quoted(f"{_FUNCTION}{tool.name}>\n")]
        for name, schema, is_required in parameters_of(tool):
            term = f"{quoted(f'{_PARAMETER}{name}>' + chr(10))} {_lark_value(schema)}"
            terms.append(term if is_required else f"({term})?")
        return " ".join([*terms, quoted(_FUNCTION_END)])

    def parse(self) -> Wait[None]:
        while marker := (yield from self.text_until([_OPEN, _FUNCTION])):
            yield from self.calls(self._call(marker))

    def _call(self, marker: str) -> Wait[None]:
        if marker == _OPEN:
            yield from self.expect(_FUNCTION)
        name = yield from self._name()
        self.start(name)
        tool = self.tools.get(name)
        properties = tool.parameters.get("properties") if tool else None
        schemas = properties if isinstance(properties, dict) else {}
        before = "{"
        while True:
            yield from self.space()
            if not (yield from self.literal(_PARAMETER)):
                break
            key = yield from self._name()
            self.give(Arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: "))
            yield from self._value(schemas.get(key))
            before = ", "
        self.give(Arguments("{}" if before == "{" else "}"))
        yield from self.expect(_FUNCTION_END)
        if marker == _OPEN:
            yield from self.expect(_CLOSE)

    def _name(self) -> Wait[str]:
        name = yield from self.run(_NAME)
        yield from self.expect(">")
        return name

    def _value(self, schema: Any) -> Wait[None]:
        """Give a value, up to its end tag: strings while they arrive, others when they are whole."""
        yield from self.literal("\n")
        self.drop_read()
        types = _types(schema)
        if types == {"string"}:
            self.give(Arguments('"'))
            while text := (yield from self._piece()):
                self.give(Arguments(json.dumps(text, ensure_ascii=False)[1:-1]))
            self.give(Arguments('"'))
            return
        text = ""
        try:
            while piece := (yield from self._piece()):
                text += piece
        except Malformed:
            self.give(Arguments(text))
            raise
        self.give(Arguments(_as_json(text, types)))

    def _piece(self) -> Wait[str]:
        """The next piece of a value; empty at its end tag. Malformed if there is no end tag."""
        while True:
            for end in _VALUE_ENDS:
                if self._text.startswith(end):
                    self._at = len(end)
                    self.drop_read()
                    return ""
            found = [self._text.index(end) for end in _VALUE_ENDS if end in self._text]
            if size := min(found, default=len(self._text) - held_back(self._text, _VALUE_ENDS)):
                piece, self._at = self._text[:size], size
                self.drop_read()
                return piece
            if not (yield from self.more()):
                raise Malformed


def _lark_value(schema: Any) -> str:
    """A value and its end tag. Strings are written as they are, so of their schema only an `enum` can be enforced."""
    end = quoted(_VALUE_ENDS[0] + "\n")
    if "string" not in _types(schema):
        return f"{json_term(schema)} {end}"
    values = [quoted(value) for value in _list(schema.get("enum")) if isinstance(value, str)]
    return f"({' | '.join(values)}) {end}" if values else f"xml_text {quoted(chr(10))}"


def _types(schema: Any) -> set[str]:
    """JSON types that the schema allows; empty if it does not say."""
    if not isinstance(schema, dict):
        return set()
    types = {name for name in _list(schema.get("type")) if isinstance(name, str)}
    for option in _list(schema.get("anyOf")):
        types |= _types(option)
    return types or {"string" for value in _list(schema.get("enum")) if isinstance(value, str)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _as_json(text: str, types: set[str]) -> str:
    """The text itself, if it is JSON and need not be a string; else a string of it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if "string" in types and not (value is None and "null" in types):
        return json.dumps(text, ensure_ascii=False)
    return text
