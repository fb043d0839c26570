"""Llama 3.2 and 4: a list of calls as Python, `[f(city="Zürich"), g(n=1)]`, as the whole answer."""

import ast
import json
import re
from typing import Any

from mlx_server.chat.incremental import Arguments, Malformed, Wait
from mlx_server.chat.tool_parsers.base import Marker, ToolParser, json_term, parameters_of, quoted
from mlx_server.chat.types import Tool

_START, _END = "<|python_start|>", "<|python_end|>"
_NAME = re.compile(r"[\w.-]", re.ASCII)
_KEY = re.compile(r"\w")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class PythonCalls(ToolParser):
    """For formats with calls as Python writes them."""

    def python_call(self, suffix: str = "") -> Wait[None]:
        """Read `f(key=value, …)`, with `suffix` after the name. Values are literals of Python or JSON.

        Malformed if it is no call of a tool, before anything was given.
        """
        name = yield from self.run(_NAME)
        if not name.endswith(suffix) or (name := name.removesuffix(suffix)) not in self.tools:
            raise Malformed
        yield from self.expect("(")
        before = "{"
        while True:
            yield from self.space()
            if (yield from self.literal(")")):
                break
            key = yield from self.run(_KEY)
            yield from self.expect("=")
            value = yield from self._value()
            if before == "{":
                self.start(name)
            self.give(Arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {value}"))
            self.drop_read()
            before = ", "
            if not (yield from self.literal(",")):
                yield from self.expect(")")
                break
        if before == "{":
            self.call(name, "{}")
        else:
            self.give(Arguments("}"))

    def _value(self) -> Wait[str]:
        """Read a value, up to a comma or bracket that is not its own, as JSON."""
        start, depth, quote = self._at, 0, ""
        while char := (yield from self.peek()):
            if char == "\\" and quote:
                self._at += 1
                yield from self.peek()
            elif quote:
                quote = "" if char == quote else quote
            elif depth == 0 and char in ",)":
                return _to_json(self._text[start : self._at].strip())
            else:
                quote = char if char in "\"'" else ""
                depth += (char in "([{") - (char in ")]}")
            self._at += 1
        raise Malformed


class Pythonic(PythonCalls):
    special_tokens = (_START, _END)
    signs = (_START, "func_name1(params_name1=")
    tool_names = re.compile(r"[\w.-]+", re.ASCII)
    argument_names = re.compile(r"\w+")

    @classmethod
    def lark_calls(cls, marker: Marker, *, parallel: bool) -> str:
        return '"[" call (", " call)* "]"' if parallel else '"[" call "]"'

    @classmethod
    def lark_call(cls, tool: Tool, marker: Marker) -> str:
        required: list[str] = []
        optional: list[str] = []
        for name, schema, is_required in parameters_of(tool):
            (required if is_required else optional).append(f"{quoted(name + '=')} {json_term(schema)}")
        first = required or optional[:1]
        others = optional if required else optional[1:]
        arguments = " ".join([' ", " '.join(first), *(f'(", " {other})?' for other in others)])
        if not required and arguments:
            arguments = f"({arguments})?"
        return f"{quoted(tool.name + '(')} {arguments} {quoted(')')}"

    def parse(self) -> Wait[None]:
        yield from self.space()
        yield from self.literal(_START)
        yield from self.calls(self._list())

    def _list(self) -> Wait[None]:
        yield from self.expect("[")
        while True:
            yield from self.space()
            yield from self.python_call()
            yield from self.space()
            if not (yield from self.literal(",")):
                break
        yield from self.expect("]")
        yield from self.literal(_END)


def _to_json(text: str) -> str:
    try:
        return json.dumps(json.loads(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        pass
    try:
        # Python warns of escapes that it does not know, which models write in patterns and paths.
        value: Any = ast.literal_eval(_ESCAPE.sub(_known_escape, text))
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise Malformed from None


def _known_escape(match: re.Match[str]) -> str:
    return match[0] if match[1] in "\\'\"abfnrtvxuUN01234567\n" else "\\" + match[0]
