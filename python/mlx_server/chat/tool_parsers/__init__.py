"""Formats of tool calls. To add one, write its file and name it here."""

from collections.abc import Mapping

from mlx_server.chat.messages import TemplateTraits
from mlx_server.chat.tool_parsers.bare_json import BareJson
from mlx_server.chat.tool_parsers.base import ToolParser
from mlx_server.chat.tool_parsers.hermes import Hermes
from mlx_server.chat.tool_parsers.llama3_json import Llama3Json
from mlx_server.chat.tool_parsers.mistral import Mistral
from mlx_server.chat.tool_parsers.pythonic import Pythonic
from mlx_server.chat.tool_parsers.qwen3_coder import Qwen3Coder

# In this order they are looked for in a template: Qwen3-Coder's also has Hermes' tag.
TOOL_PARSERS: Mapping[str, type[ToolParser]] = {
    "qwen3_coder": Qwen3Coder,
    "hermes": Hermes,
    "mistral": Mistral,
    "llama3_json": Llama3Json,
    "pythonic": Pythonic,
    "json": BareJson,
}


def tool_parser_of(template: TemplateTraits) -> type[ToolParser]:
    """The format that a template writes; plain JSON if it shows none that is known.

    For a template that knows no tools, Hermes' format: `messages.py` tells the model of it.
    """
    if "tools" not in template.variables:
        return Hermes
    for parser in TOOL_PARSERS.values():
        if any(sign in template.source for sign in parser.signs):
            return parser
    return BareJson
