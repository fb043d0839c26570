"""Hermes 2 Pro, Qwen 2.5 and Qwen 3: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, one after the other."""

from mlx_server.chat.incremental import Wait
from mlx_server.chat.tool_parsers.base import TaggedCalls

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes(TaggedCalls):
    tags = (_OPEN, _CLOSE)
    signs = (_OPEN,)

    def parse(self) -> Wait[None]:
        while (yield from self.text_until([_OPEN])):
            yield from self.calls(self._call())

    def _call(self) -> Wait[None]:
        yield from self.json_call()
        yield from self.expect(_CLOSE)
