"""Mistral: `[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]`, later models
`[TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[ARGS]{…}`."""

import re

from mlx_server.chat.incremental import Malformed, Wait
from mlx_server.chat.tool_parsers.base import Marker, ToolParser, json_term, quoted, text_up_to
from mlx_server.chat.types import Tool

_OPEN, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.-]", re.ASCII)


class Mistral(ToolParser):
    special_tokens = (_OPEN, _ID, _ARGUMENTS)
    signs = (_OPEN,)

    @classmethod
    def lark_calls(cls, marker: Marker, *, parallel: bool) -> str:
        return f"{marker(_OPEN)} {cls._after_marker(marker, parallel)}"

    @classmethod
    def lark_call(cls, tool: Tool, marker: Marker) -> str:
        if _is_named(marker):
            return f"{quoted(tool.name)} {marker(_ARGUMENTS)} {json_term(tool.parameters)}"
        return super().lark_call(tool, marker)

    @classmethod
    def lark_answer(cls, marker: Marker, *, parallel: bool) -> list[str]:
        return [f"body: (lead {cls._after_marker(marker, parallel)})? TEXT", text_up_to("lead", marker(_OPEN))]

    @classmethod
    def _after_marker(cls, marker: Marker, parallel: bool) -> str:
        if _is_named(marker):
            return f"call ({marker(_OPEN)} call)*" if parallel else "call"
        return '"[" call (", " call)* "]"' if parallel else '"[" call "]"'

    def parse(self) -> Wait[None]:
        while (yield from self.text_until([_OPEN])):
            yield from self.calls(self._calls())

    def _calls(self) -> Wait[None]:
        yield from self.space()
        if (yield from self.literal("[")):
            yield from self.json_calls(",")
            yield from self.expect("]")
        elif (yield from self.peek()) == "{":
            yield from self.json_call()
        else:
            yield from self._named()

    def _named(self) -> Wait[None]:
        name = yield from self.run(_NAME)
        if (yield from self.literal(_ID)):
            yield from self.run(_NAME)
        yield from self.literal(_ARGUMENTS)
        yield from self.space()
        if (yield from self.peek()) != "{":
            raise Malformed
        self.start(name)
        if not (yield from self.give_object()):
            raise Malformed


def _is_named(marker: Marker) -> bool:
    """Whether the model writes the later form: then it has a token for its markup."""
    return marker(_ARGUMENTS) != quoted(_ARGUMENTS)
