"""Llama 3.1 and 3.2: `{"name": "f", "parameters": {…}}` as the whole answer, or after `<|python_tag|>`; there also
`f.call(query="…")`."""

from mlx_server.chat.incremental import Wait
from mlx_server.chat.tool_parsers.base import Marker
from mlx_server.chat.tool_parsers.pythonic import PythonCalls

_TAG = "<|python_tag|>"
_BUILT_IN = ".call"


class Llama3Json(PythonCalls):
    special_tokens = (_TAG,)
    signs = (_TAG, '"parameters": dictionary of argument name')

    arguments_key = "parameters"

    @classmethod
    def lark_calls(cls, marker: Marker, *, parallel: bool) -> str:
        return 'call ("; " call)*' if parallel else "call"

    def parse(self) -> Wait[None]:
        yield from self.space()
        if (yield from self.peek()) == "{":
            yield from self.calls(self.json_calls(";"))
        else:
            self.give_back()
        while (yield from self.text_until([_TAG])):
            yield from self.calls(self._tagged())

    def _tagged(self) -> Wait[None]:
        yield from self.space()
        if (yield from self.peek()) == "{":
            yield from self.json_calls(";")
        else:
            yield from self.python_call(suffix=_BUILT_IN)
