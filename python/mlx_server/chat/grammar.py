"""What an answer must match, as a grammar for llguidance: structured output, calls that must come, thoughts before.

A grammar is JSON that llguidance reads: our rules in its dialect of Lark, and what the client sent nested in them.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from mlx_server.chat.reasoning import Tags
from mlx_server.chat.tool_parsers.base import Marker, ToolParser, parameters_of, quoted, text_up_to
from mlx_server.chat.types import ChatRequest, Choice, Gbnf, Grammar, JsonSchema, Lark, Regex, Tool
from mlx_server.errors import InvalidRequestError

MAX_GRAMMAR_BYTES = 128 << 10
MAX_GBNF_BYTES = 32 << 10  # read by Python, 0.1 s
MAX_SCHEMA_DEPTH = 64
_MAX_ERROR_LENGTH = 500
# In llguidance's units: what it may take to read a grammar, about 0.2 s of one core.
LIMITS = LLParserLimits(initial_lexer_fuel=1_000_000, max_grammar_size=200_000, verbose_errors=False)
# A small model may go on for ever where white space has no end.
_BOUNDED_SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}

Thoughts = Literal["none", "possible", "open"]  # before the answer; open: it begins inside of them

_OUR_SOURCE = re.compile(r"^at \d+\(\d+\): |\n *\d+ \| .*", re.DOTALL)  # which llguidance quotes after its message
_ANSWER = "answer"  # the name of the client's grammar inside ours
_TEXT = "TEXT: /(?s:.*)/"


def chat_grammar(
    request: ChatRequest,
    tools: Sequence[Tool],
    parser: type[ToolParser],
    marker: Marker,
    *,
    tags: Tags | None,
    thoughts: Thoughts,
) -> str | None:
    """The grammar of a whole answer; None if it may be any text.

    Args:
        tools: those that may be called.
        parser: the format of calls.
        marker: writes markup as a term of Lark.
    Raises:
        InvalidRequestError: with llguidance's words, if it can't do what is asked for, or it is too complex.
    """
    must_call = request.tool_choice.mode == "required"
    rules: list[str] = []
    nested: list[dict[str, Any]] = []
    if request.grammar is not None and not must_call:
        nested.append(_nested(request.grammar))
    if must_call or (tools and (nested or any(tool.strict for tool in tools))):
        rules += _call_rules(tools, parser, marker, parallel=request.parallel_tool_calls)
    if not rules and not nested:
        return None
    if must_call:
        rules.append("body: calls")
    elif nested:
        rules.append(f"body: calls | @{_ANSWER}" if rules else f"body: @{_ANSWER}")
    else:
        rules += parser.lark_answer(marker, parallel=request.parallel_tool_calls)
    lark = "\n".join(["%llguidance {}", *_start(tags, thoughts, marker), *rules, _TEXT])
    return _checked([{"lark_grammar": lark}, *nested], request.grammar.param if request.grammar and nested else "tools")


def text_grammar(grammar: Grammar) -> str:
    """The grammar of a raw completion. InvalidRequestError as for `chat_grammar`."""
    return _encoded([{"lark_grammar": f"start: @{_ANSWER}"}, _nested(grammar)])


def _start(tags: Tags | None, thoughts: Thoughts, marker: Marker) -> list[str]:
    if tags is None or thoughts == "none":
        return ["start: body"]
    closing = [text_up_to("thoughts", marker(tags.close)), r"SPACE: /\s*/"]
    if thoughts == "open":
        return ["start: thoughts SPACE body", *closing]
    return [f"start: ({marker(tags.open)} thoughts SPACE)? body", *closing]


# --- What the client sent ---


def _nested(grammar: Grammar) -> dict[str, Any]:
    """The client's grammar under a name of its own, checked alone, so that an error speaks of nothing else."""
    nested = {"name": _ANSWER, **_definition(grammar)}
    _checked([{"lark_grammar": f"start: @{_ANSWER}"}, nested], grammar.param)
    return nested


def _definition(grammar: Grammar) -> dict[str, Any]:
    match grammar:
        case JsonSchema(schema=schema):
            if _is_deep(schema):
                raise _invalid(grammar.param, f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")
            return {"json_schema": _bounded(schema)}
        case Regex(pattern=pattern):
            return {"lark_grammar": _lark_of_regex(pattern)}
        case Lark(source=source):
            return {"lark_grammar": source}
        case Gbnf(source=source):
            return {"lark_grammar": _lark_of_gbnf(source, grammar.param)}
        case Choice(choices=choices):
            return {"lark_grammar": "start: " + " | ".join(quoted(choice) for choice in choices)}


def _bounded(schema: dict[str, Any] | bool) -> dict[str, Any] | bool:
    return schema if isinstance(schema, bool) else {"x-guidance": _BOUNDED_SPACE, **schema}


def _lark_of_regex(pattern: str) -> str:
    lark: str = json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0]["lark_grammar"]
    return lark


def _lark_of_gbnf(source: str, param: str) -> str:
    if len(source) > MAX_GBNF_BYTES:
        raise _invalid(param, f"the grammar is larger than {MAX_GBNF_BYTES >> 10} kB")
    try:
        lark: str = any_to_lark(source)
    except RecursionError:
        raise _invalid(param, "the grammar is nested too deep") from None
    except Exception as error:  # noqa: BLE001 - the type that llguidance raises
        raise _invalid(param, str(error)) from None
    return lark


def _is_deep(schema: object, depth: int = 0) -> bool:
    if depth > MAX_SCHEMA_DEPTH:
        return True
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    return any(_is_deep(child, depth + 1) for child in children)


# --- Calls ---


def _call_rules(tools: Sequence[Tool], parser: type[ToolParser], marker: Marker, *, parallel: bool) -> list[str]:
    """Rules of which `calls` is one call of any of the tools or, with `parallel`, one or more."""
    calls = [parser.lark_call(_constrained(tool, parser, marker), marker) for tool in tools]
    return [
        f"calls: {parser.lark_calls(marker, parallel=parallel)}",
        "call: " + " | ".join(f"call_{i}" for i in range(len(calls))),
        *(f"call_{i}: {call}" for i, call in enumerate(calls)),
        *parser.lark_rules,
    ]


def _constrained(tool: Tool, parser: type[ToolParser], marker: Marker) -> Tool:
    """The tool with a schema that llguidance can enforce: its own or, unless it is strict, that of any object."""
    schema = {"type": "object", **tool.parameters}
    if _is_deep(schema):
        fault = f"it is nested more than {MAX_SCHEMA_DEPTH} levels deep"
    elif strange := [name for name, *_ in parameters_of(tool) if not parser.argument_names.fullmatch(name)]:
        fault = f"the model's format of calls has no way to write an argument named {strange[0][:64]!r}"
    else:
        constrained = msgspec.structs.replace(tool, parameters=schema)
        lark = "\n".join([f"start: {parser.lark_call(constrained, marker)}", *parser.lark_rules, _TEXT])
        fault = _OUR_SOURCE.sub("", _fault(_encoded([{"lark_grammar": lark}])))
        if not fault:
            return constrained
    if tool.strict:
        raise _invalid("tools", f"the parameters of {tool.name!r}: {fault}")
    return msgspec.structs.replace(tool, parameters={"type": "object"})


# --- Checks ---


def _checked(grammars: Sequence[dict[str, Any]], param: str) -> str:
    text = _encoded(grammars)
    if fault := _fault(text):
        raise _invalid(param, fault)
    return text


def _encoded(grammars: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


@functools.lru_cache(maxsize=256)  # agents send the same tools at each turn
def _fault(grammar: str) -> str:
    """What llguidance says against it; empty if nothing."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        return f"it is larger than {MAX_GRAMMAR_BYTES >> 10} kB"
    return LLMatcher.validate_grammar(grammar, limits=LIMITS)


def _invalid(param: str, fault: str) -> InvalidRequestError:
    return InvalidRequestError(f"`{param}`: {fault.strip()[:_MAX_ERROR_LENGTH]}", param=param, code="invalid_grammar")
