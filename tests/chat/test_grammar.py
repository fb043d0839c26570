"""Grammars of answers, tried with llguidance's own matcher on a tokenizer of bytes and on real ones."""

import itertools
import json
import os
import random
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mlx_server.chat.grammar import MAX_GRAMMAR_BYTES, chat_grammar, text_grammar
from mlx_server.chat.output_router import OutputRouter, join
from mlx_server.chat.reasoning import Tags
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.chat.tool_parsers import TOOL_PARSERS
from mlx_server.chat.tool_parsers.base import quoted
from mlx_server.chat.types import (
    ChatMessage,
    ChatRequest,
    Choice,
    Gbnf,
    Grammar,
    JsonSchema,
    Lark,
    Regex,
    TextDelta,
    Tool,
    ToolCallDelta,
    ToolCallStart,
    ToolChoice,
)
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams
from real_tokenizers import QWEN3, model_directory

PARAM = "response_format.json_schema.schema"
THINK = Tags("<think>", "</think>")
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"enum": ["C", "F"]},
            "where": {"$ref": "#/$defs/point"},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {"point": {"type": "array", "items": {"type": "number"}, "maxItems": 2}},
    },
)
NOW = Tool(name="now", parameters={"type": "object", "properties": {}, "additionalProperties": False})


class ByteVocabulary:
    """What llguidance asks of a tokenizer: bytes, and an end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes([i]) for i in range(256)] + [b"<eos>"]
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


BYTES = LLTokenizer(TokenizerWrapper(ByteVocabulary()))


def accepts(grammar: str | None, text: str) -> bool:
    """Whether the grammar allows this text, whole."""
    assert grammar is not None
    matcher = LLMatcher(BYTES, grammar)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = list(text.encode())
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


def request(**fields: Any) -> ChatRequest:
    messages = [ChatMessage(role="user", content="hi")]
    return ChatRequest(**({"messages": messages, "sampling": SamplingParams(), "max_tokens": 9} | fields))


def grammar_of(name: str = "hermes", thoughts: Any = "none", tags: Tags | None = None, **fields: Any) -> str | None:
    asked = request(**fields)
    tools = [] if asked.tool_choice.mode == "none" else asked.tools
    return chat_grammar(asked, tools, TOOL_PARSERS[name], quoted, tags=tags, thoughts=thoughts)


# --- what a client may send ---

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    "grammar, good, bad",
    [
        (JsonSchema(schema=POINT, param=PARAM), ['{"x":1}', '{ "x": 1 }', '{\n  "x": 1\n}'], ["{}", '{"x":"1"}', "x"]),
        (JsonSchema(schema={"type": "object"}, param=PARAM), ["{}", '{"a": [1, null, "é"]}'], ["[]", "{", "{}{}"]),
        (JsonSchema(schema=True, param=PARAM), ["[1]", "null"], ["{", "nul"]),
        (JsonSchema(schema={"type": "object"}, param=PARAM), ["{ }"], ["{" + " " * 40 + "}"]),
        (Regex(pattern=r"[ab]+/\d\n\"", param=PARAM), ['ab/1\n"'], ["", "ab/1", 'xab/1\n"']),
        (Choice(choices=["yes", 'n"o', "é\n"], param=PARAM), ["yes", 'n"o', "é\n"], ["ye", "yesyes", ""]),
        (Lark(source='start: greeting "!"\ngreeting: "hi" | "ho"', param=PARAM), ["hi!", "ho!"], ["hi", "!"]),
        (Gbnf(source='root ::= "a" digit+\ndigit ::= [0-9]', param=PARAM), ["a1", "a123"], ["a", "1", "ab"]),
    ],
)
def test_structured_output(grammar: Grammar, good: list[str], bad: list[str]) -> None:
    for made in (grammar_of(grammar=grammar), text_grammar(grammar)):
        assert [text for text in good if not accepts(made, text)] == []
        assert [text for text in bad if accepts(made, text)] == []


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "grammar, fault",
    [
        (JsonSchema(schema={"type": "foo"}, param=PARAM), "Invalid type: foo"),
        (JsonSchema(schema={"not": {}}, param=PARAM), "Unimplemented keys"),
        (JsonSchema(schema={"$ref": "#/$defs/a"}, param=PARAM), "a"),
        (JsonSchema(schema={"pattern": "(?=a)", "type": "string"}, param=PARAM), "look-around"),
        (JsonSchema(schema={"const": "x" * MAX_GRAMMAR_BYTES}, param=PARAM), "larger than 128 kB"),
        (JsonSchema(schema=nested(100), param=PARAM), "64 levels"),
        (Regex(pattern="(a", param=PARAM), "unclosed group"),
        (Regex(pattern="a(?=b)", param=PARAM), "look-around"),
        (Lark(source='start: "a" b', param=PARAM), "unknown name"),
        (Lark(source="", param=PARAM), ""),
        (Gbnf(source="root :: 7", param=PARAM), "Expected ::="),
        (Gbnf(source="", param=PARAM), "No 'root' rule"),
        (Gbnf(source="root ::= a", param=PARAM), "Rule 'a' not found"),
        (Gbnf(source='root ::= "a"{99999999999}', param=PARAM), ""),
        (Gbnf(source="#" * 40_000, param=PARAM), "larger than 32 kB"),
        (Gbnf(source="root ::= " + "(" * 5000, param=PARAM), "nested too deep"),
    ],
)
def test_what_can_not_be_enforced_is_refused(grammar: Grammar, fault: str) -> None:
    for make in (lambda: text_grammar(grammar), lambda: grammar_of(grammar=grammar, tools=[NOW])):
        with pytest.raises(InvalidRequestError) as error:
            make()
        assert (error.value.param, error.value.code) == (PARAM, "invalid_grammar")
        assert fault in error.value.message
        assert len(error.value.message) < 600


# --- calls ---

CALLS = {
    "hermes": ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "B", "unit": "C"}}\n</tool_call>'],
    "qwen3_coder": [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nB <b>\n</parameter>\n<parameter=days>\n2\n</parameter>"
        "\n<parameter=unit>\nF\n</parameter>\n</function>\n</tool_call>"
    ],
    "mistral": ['[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "B", "days": 1, "unit": "C"}}]'],
    "llama3_json": ['{"name": "get_weather", "parameters": {"city": "B", "unit": "C", "where": [1, 2.5]}}'],
    "pythonic": ['[get_weather(city="B", unit="C", days=7)]', '[get_weather(city="B", unit="C")]'],
    "json": ['{"name": "get_weather", "arguments": {"city": "B", "unit": "C"}}'],
}
BAD_CALLS = [
    "", "Hi.", "<tool_call>", '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "B"}}\n</tool_call>', "[get_weather()]", "[now(a=1)]",
    '{"name": "get_weather", "arguments": {}}', '{"name": "now", "parameters": {"a": 1}}',
]  # fmt: skip
TWO_CALLS = {
    "hermes": 2 * ['<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'],
    "mistral": ["[TOOL_CALLS][", '{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'],
    "llama3_json": ['{"name": "now", "parameters": {}}; ', '{"name": "now", "parameters": {}}'],
    "pythonic": ["[now(), ", "now()]"],
    "json": ['[{"name": "now", "arguments": {}}, ', '{"name": "now", "arguments": {}}]'],
    "qwen3_coder": 2 * ["<tool_call>\n<function=now>\n</function>\n</tool_call>"],
}
JOINTS = {"hermes": "\n", "qwen3_coder": "\n"}


def parsed(name: str, text: str, tools: Sequence[Tool] = (WEATHER, NOW)) -> list[tuple[str, Any]]:
    """The calls that the format's parser sees; there must be nothing else."""
    ids = itertools.count()
    router = OutputRouter(0, tools=TOOL_PARSERS[name](tools), new_id=lambda: str(next(ids)))
    events = join(router.feed(text) + router.finish())
    assert not any(isinstance(event, TextDelta) for event in events)
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [json.loads(event.arguments) for event in events if isinstance(event, ToolCallDelta)]
    return list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_calls_that_must_come(name: str) -> None:
    grammar = grammar_of(name, tools=[WEATHER, NOW], tool_choice=ToolChoice("required"))
    for call in CALLS[name]:
        assert accepts(grammar, call), call
        ((called, arguments),) = parsed(name, call)
        assert called == "get_weather" and arguments["unit"] in "CF"
    assert [text for text in BAD_CALLS if accepts(grammar, text)] == []


def random_text(grammar: str, seed: int) -> str:
    """A text that the grammar allows, one random byte after the other; most likely one that leads to the end."""
    rng = random.Random(seed)
    matcher = LLMatcher(BYTES, grammar)
    output = bytearray()
    while not matcher.is_stopped() and len(output) < 2000:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token_id for token_id in range(257) if mask >> token_id & 1]
        if len(allowed) > 100 and rng.random() < 0.3:  # free text: it never ends by itself
            num_taken = matcher.try_consume_tokens(list(b"</parameter>\n"))
            output += b"</parameter>\n"[:num_taken]
            continue
        ends = [token_id for token_id in allowed if token_id == 256 or chr(token_id) in '"}])<>/\n']
        token_id = rng.choice(ends if ends and rng.random() < 0.7 else allowed)
        matcher.consume_token(token_id)
        if token_id < 256:
            output.append(token_id)
    assert matcher.is_stopped() and not matcher.is_error()
    return output.decode()


ODD_NAMES = [
    "f-1",
    "a.b",
    "a/b",
    "a b",
    "a<b",
    "a>b",
    "a(b",
    "a=b",
    'a"b',
    "a,b",
    "a\nb",
    "{a",
    "[a",
    "class",
    "é",
    "日本",
]


@pytest.mark.parametrize("odd", ODD_NAMES)
@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_names_that_a_format_can_write_are_read(name: str, odd: str) -> None:
    parser = TOOL_PARSERS[name]
    one = {"type": "integer", "minimum": 1, "maximum": 1}

    def call(tool_name: str, argument: str) -> list[tuple[str, Any]]:
        schema = {
            "type": "object",
            "properties": {argument: one},
            "required": [argument],
            "additionalProperties": False,
        }
        tool = Tool(name=tool_name, parameters=schema, strict=True)
        grammar = grammar_of(name, tools=[tool], tool_choice=ToolChoice("required"), parallel_tool_calls=False)
        assert grammar is not None
        return parsed(name, random_text(grammar, seed=1), [tool])

    if parser.tool_names.fullmatch(odd):
        assert call(odd, "x") == [(odd, {"x": 1})]
    if parser.argument_names.fullmatch(odd):
        assert call("f", odd) == [("f", {odd: 1})]
    else:
        with pytest.raises(InvalidRequestError, match="no way to write an argument"):
            call("f", odd)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_whatever_the_grammar_allows_is_a_call(name: str, parallel: bool) -> None:
    tools, choice = [WEATHER, NOW], ToolChoice("required")
    grammar = grammar_of(name, tools=tools, tool_choice=choice, parallel_tool_calls=parallel)
    assert grammar is not None
    for seed in range(20):
        calls = parsed(name, random_text(grammar, seed))
        assert len(calls) == 1 or (calls and parallel)
        for called, arguments in calls:
            assert called in ("now", "get_weather")
            if called == "get_weather":
                assert isinstance(arguments["city"], str) and arguments["unit"] in ("C", "F")
                assert arguments.get("days", 1) >= 1
                assert len(arguments.get("where", [])) <= 2


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_several_calls(name: str) -> None:
    text = JOINTS.get(name, "").join(TWO_CALLS[name])
    for parallel in (True, False):
        fields: dict[str, Any] = {
            "tools": [NOW],
            "tool_choice": ToolChoice("required"),
            "parallel_tool_calls": parallel,
        }
        assert accepts(grammar_of(name, **fields), text) == parallel
    assert parsed(name, text) == [("now", {}), ("now", {})]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_strict_tools_in_free_text(name: str) -> None:
    strict = Tool(name="get_weather", parameters=WEATHER.parameters, strict=True)
    grammar = grammar_of(name, tools=[strict])
    for text in ("Hi there.", *CALLS[name]):
        assert accepts(grammar, text), text
    if name in ("hermes", "qwen3_coder", "mistral"):
        assert accepts(grammar, f"Well. {CALLS[name][0]} So.")
    bad = CALLS[name][0].replace("get_weather", "get_wether")
    assert not accepts(grammar, bad)
    assert grammar_of(name, tools=[WEATHER]) is None


def test_structured_output_beside_tools() -> None:
    schema = JsonSchema(schema=POINT, param=PARAM)
    grammar = grammar_of(tools=[NOW], grammar=schema)
    assert accepts(grammar, '{"x": 1}')
    assert accepts(grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(grammar, "Hi.")
    grammar = grammar_of(tools=[NOW], grammar=schema, tool_choice=ToolChoice("none"))
    assert not accepts(grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')


def test_schemas_of_tools_that_can_not_be_enforced() -> None:
    tool = Tool(name="f", parameters={"type": "object", "not": {}})
    grammar = grammar_of(tools=[tool], tool_choice=ToolChoice("required"))
    assert accepts(grammar, '<tool_call>\n{"name": "f", "arguments": {"any": 1}}\n</tool_call>')
    with pytest.raises(InvalidRequestError, match=r"'f': .*Unimplemented") as error:
        grammar_of(tools=[Tool(name="f", parameters={"not": {}}, strict=True)])
    assert error.value.param == "tools"
    assert "start:" not in error.value.message  # llguidance quotes our own grammar too


# --- thoughts ---


def test_thoughts_before_an_answer() -> None:
    schema = JsonSchema(schema=POINT, param=PARAM)
    answers = {
        "none": ['{"x": 1}'],
        "possible": ['{"x": 1}', '<think>\nHm < 2 </ </think>\n\n{"x": 1}'],
        "open": ['Hm.\n</think>\n\n{"x": 1}', '</think>{"x": 1}'],
    }
    for thoughts, good in answers.items():
        grammar = grammar_of(grammar=schema, thoughts=thoughts, tags=THINK)
        assert [text for text in good if not accepts(grammar, text)] == []
        assert accepts(grammar, '{"x": 1}') == (thoughts != "open")
        assert accepts(grammar, answers["possible"][1]) == (thoughts != "none")
        assert not accepts(grammar, "Hm.</think>Hi.")


@pytest.mark.model
@pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="npm is missing")
def test_markup_that_is_a_token() -> None:
    path = model_directory(QWEN3)
    tokenizer = Tokenizer.load(path)
    tokens = LLTokenizer((path / "tokenizer.json").read_text("utf-8"))

    def marker(text: str) -> str:
        token_id = tokenizer.token_id(text)
        return quoted(text) if token_id is None else f"<[{token_id}]>"

    asked = request(tools=[WEATHER], tool_choice=ToolChoice("required"))
    grammar = chat_grammar(asked, [WEATHER], TOOL_PARSERS["hermes"], marker, tags=THINK, thoughts="possible")
    assert grammar is not None
    for thoughts in ("", "<think>\nHm.\n</think>\n\n"):
        token_ids = tokenizer.encode(thoughts + CALLS["hermes"][0])
        matcher = LLMatcher(tokens, grammar)
        assert matcher.try_consume_tokens(token_ids) == len(token_ids)
        assert matcher.is_accepting()
