"""Calls that are the whole answer, as JSON: `{"name": "f", "arguments": {…}}`, or a list of them, also in a
fence."""

from mlx_server.chat.incremental import Wait
from mlx_server.chat.tool_parsers.base import Marker, ToolParser

_FENCE = "```"


class BareJson(ToolParser):
    @classmethod
    def lark_calls(cls, marker: Marker, *, parallel: bool) -> str:
        return 'call | "[" call (", " call)* "]"' if parallel else "call"

    def parse(self) -> Wait[None]:
        yield from self.space()
        yield from self.calls(self._fenced())

    def _fenced(self) -> Wait[None]:
        fenced = yield from self.literal(_FENCE)
        if fenced:
            yield from self.literal("json")
            yield from self.space()
        if (yield from self.literal("[")):
            yield from self.json_calls(",")
            yield from self.expect("]")
        else:
            yield from self.json_calls("")
        if fenced:
            yield from self.expect(_FENCE)
