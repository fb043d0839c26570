"""Every format, with its text cut at every character."""

import itertools
import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.chat.incremental import Arguments, CallStart, Part, Text, whole_object
from mlx_server.chat.template import ChatTemplate
from mlx_server.chat.tool_parsers import TOOL_PARSERS, tool_parser_of
from mlx_server.chat.types import Tool

WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "note": {"type": ["string", "null"]},
            "tags": {"type": "array"},
            "any": {},
        },
    },
)
TOOLS = [WEATHER, Tool(name="now"), Tool(name="secret"), Tool(name="a b/ü")]
ZURICH, DAYS, NOTHING = '{"city": "Zürich"}', '{"city": "東京 😀", "days": 2}', "{}"

Call = tuple[str, str]
Seen = list[str | Call]  # text, or a call's name and arguments


def seen(parts: Iterable[Part]) -> Seen:
    """The parts, with pieces that belong together joined."""
    result: Seen = []
    for part in parts:
        match part:
            case Text(text) if result and isinstance(result[-1], str):
                result[-1] += text
            case Text(text):
                result.append(text)
            case CallStart(name):
                result.append((name, ""))
            case Arguments(text):
                last = result[-1]
                assert isinstance(last, tuple), "arguments outside of a call"
                result[-1] = (last[0], last[1] + text)
    return result


def parse(name: str, pieces: Sequence[str]) -> Seen:
    parser = TOOL_PARSERS[name](TOOLS, refused=["secret"])
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    whole = "".join(pieces)
    for part in parts:
        if isinstance(part, Text):
            assert part.text
            assert whole[part.pos :].startswith(part.text)
    return seen(parts)


def text_only(text: str) -> Seen:
    return [text]


HERMES_ZURICH = f'<tool_call>\n{{"name": "get_weather", "arguments": {ZURICH}}}\n</tool_call>'
CODER = """<tool_call>
<function=get_weather>
<parameter=city>
Zürich
</parameter>
<parameter=days>
2
</parameter>
</function>
</tool_call>"""

CASES: list[tuple[str, str, Seen]] = [
    # text alone
    *[(name, text, text_only(text)) for name in TOOL_PARSERS for text in (
        "Just text. 漢 ", " ", "a < b [TOOL <tool_ca", "{", "[", "x\n\n", "\n{a}",
    )],
    # Hermes
    ("hermes", HERMES_ZURICH, [("get_weather", ZURICH)]),
    ("hermes", f"Let me see.\n{HERMES_ZURICH}\n", ["Let me see.", ("get_weather", ZURICH)]),
    ("hermes", f"{HERMES_ZURICH}\n{HERMES_ZURICH}\nDone.", [("get_weather", ZURICH), ("get_weather", ZURICH), "Done."]),
    ("hermes", '<tool_call>{"name":"now","arguments":{}}</tool_call>', [("now", NOTHING)]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', [("now", NOTHING)]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", NOTHING)]),
    ("hermes", '<tool_call>{"id": 7, "arguments": {"a": 1}, "name": "now"}</tool_call>', [("now", '{"a": 1}')]),
    ("hermes", r'<tool_call>{"name": "now", "arguments": "{\"a\": 1}"}</tool_call>', [("now", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}, "arguments": {"a": 1}}</tool_call>', [("now", NOTHING)]),
    ("hermes", '<tool_call>{"name": "a b/ü", "arguments": {}}</tool_call>', [("a b/ü", NOTHING)]),
    ("hermes", '<tool_call>{"name": "unknown", "parameters": {}}</tool_call>', [("unknown", NOTHING)]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>}\\""}}</tool_call>',
        [("now", '{"a": "</tool_call>}\\""}')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": [1, {"b": 2}]}}', [("now", '{"a": [1, {"b": 2}]}')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": [1, ', [("now", '{"a": [1, ')]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {\'a\'}}</tool_call>', [("now", "{"), "'a'}}</tool_call>"]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {]}</tool_call>', [("now", "{"), "]}</tool_call>"]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}}</tool_call>', [("now", "{}"), "}</tool_call>"]),
    *[("hermes", text, text_only(text)) for text in (
        "<tool_call>", "<tool_call> \n", "<tool_call>hello</tool_call>", "<tool_call>{}</tool_call>",
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>', '<tool_call>{"name": "no w"}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": oops}</tool_call>', '<tool_call>{"name": "secret"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "no"}</tool_call>', '<tool_call>{"name": "no',
    )],
    ("hermes", f"<tool_call>oops</tool_call>{HERMES_ZURICH}", ["<tool_call>oops</tool_call>", ("get_weather", ZURICH)]),
    ("hermes", f"  <tool_call>{HERMES_ZURICH}", ["  <tool_call>", ("get_weather", ZURICH)]),
    # Qwen3-Coder
    ("qwen3_coder", CODER, [("get_weather", '{"city": "Zürich", "days": 2}')]),
    ("qwen3_coder", f"Well.\n\n{CODER}\n{CODER}", ["Well.", *2 * [("get_weather", '{"city": "Zürich", "days": 2}')]]),
    ("qwen3_coder", "<function=now>\n</function>", [("now", NOTHING)]),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n\"b\" <c> \\ </\n\n</parameter>\n"
        "</function>\n</tool_call>", [("get_weather", '{"city": "a\\n\\"b\\" <c> \\\\ </\\n"}')]),
    ("qwen3_coder", "<function=get_weather><parameter=note>null</parameter><parameter=tags>[1, 2]</parameter>"
        "<parameter=any>x y</parameter><parameter=new>{}</parameter></function>",
        [("get_weather", '{"note": null, "tags": [1, 2], "any": "x y", "new": {}}')]),
    ("qwen3_coder", "<function=get_weather><parameter=note>12</parameter></function>",
        [("get_weather", '{"note": "12"}')]),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nZür", [("get_weather", '{"city": "Zür')]),
    ("qwen3_coder", "<function=get_weather>\n<parameter=days>\n1", [("get_weather", '{"days": 1')]),
    ("qwen3_coder", "<function=now>what</function>", [("now", "{}"), "what</function>"]),
    *[("qwen3_coder", text, text_only(text)) for text in (
        "<tool_call>\n{}", "<function=", "<function=a b>", "<function=secret></function>", "<tool_call><function=now",
    )],
    # Llama 3
    ("llama3_json", f'{{"name": "get_weather", "parameters": {ZURICH}}}', [("get_weather", ZURICH)]),
    ("llama3_json", f' {{"type": "function", "name": "get_weather", "parameters": {DAYS}}}', [("get_weather", DAYS)]),
    ("llama3_json", f'{{"name": "now"}}; {{"name": "get_weather", "parameters": {ZURICH}}}',
        [("now", NOTHING), ("get_weather", ZURICH)]),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', [("now", NOTHING)]),
    ("llama3_json", 'So: <|python_tag|>get_weather.call(city="Zürich")', ["So:", ("get_weather", ZURICH)]),
    ("llama3_json", '{"name": "now"} And?', [("now", NOTHING), "And?"]),
    *[("llama3_json", text, text_only(text)) for text in (
        '{"name": "Bob", "parameters": {}}', '{"name": "now", "age": 7}', "{'name': 'now'}", '{"a": {"b": 1}}',
        "<|python_tag|>print(1)", '<|python_tag|>other.call(q="x")', 'So {"name": "now", "parameters": {}}',
    )],
    # Mistral
    ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ZURICH}}}]', [("get_weather", ZURICH)]),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {}, "id": "abcdefghi"}, {"name": "now", "arguments": {}}]',
        [("now", NOTHING), ("now", NOTHING)]),
    ("mistral", f"Hm. [TOOL_CALLS]get_weather[ARGS]{ZURICH}[TOOL_CALLS]now[ARGS]{{}}",
        ["Hm.", ("get_weather", ZURICH), ("now", NOTHING)]),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]{ZURICH}", [("get_weather", ZURICH)]),
    ("mistral", "[TOOL_CALLS]now{}", [("now", NOTHING)]),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}', [("now", NOTHING)]),
    ("mistral", '[TOOL_CALLS][{"name": "now"}, nothing]', [("now", NOTHING), ", nothing]"]),
    *[("mistral", text, text_only(text)) for text in (
        "[TOOL_CALLS]", "[TOOL_CALLS]what?", "[TOOL_CALLS][]", "[TOOL_CALLS]a[ARGS]",
    )],
    # Python
    ("pythonic", '[get_weather(city="Zürich")]', [("get_weather", ZURICH)]),
    ("pythonic", "[now(), get_weather(city='東京 😀', days=2)]", [("now", NOTHING), ("get_weather", DAYS)]),
    ("pythonic", "[get_weather(tags=[1, 'a, (b)', {'c': None}], any=true, note='it\\'s')]",
        [("get_weather", '{"tags": [1, "a, (b)", {"c": null}], "any": true, "note": "it\'s"}')]),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", [("now", NOTHING)]),
    ("pythonic", r"[get_weather(city='\d\n')]", [("get_weather", r'{"city": "\\d\n"}')]),
    ("pythonic", "[now(), oops]", [("now", NOTHING), ", oops]"]),
    ("pythonic", "[get_weather(city='a', days=", [("get_weather", '{"city": "a"'), ", days="]),
    *[("pythonic", text, text_only(text)) for text in (
        "[1, 2]", "[other()]", "[now(1)]", "[now(", "[now(a=open('x'))]", "[now(a=1", "[now(a={1})]", "[now(a=1e999)]",
        "[now(a='\\",
    )],
    # plain JSON
    ("json", f'{{"name": "get_weather", "arguments": {ZURICH}}}', [("get_weather", ZURICH)]),
    ("json", f'```json\n[{{"name": "get_weather", "arguments": {ZURICH}}}, {{"name": "now"}}]\n```',
        [("get_weather", ZURICH), ("now", NOTHING)]),
    ("json", '```\n{"name": "now", "arguments": {}}\n```\nDone', [("now", NOTHING), "Done"]),
    *[("json", text, text_only(text)) for text in (
        '{"name": "Bob"}', '{"answer": 42}', "[]", "``", "```python\nnow()\n```", '{"name": "now", "x": 1}',
    )],
]  # fmt: skip


@pytest.mark.parametrize("name, text, expected", CASES)
def test_formats(name: str, text: str, expected: Seen) -> None:
    assert parse(name, [text]) == expected
    assert parse(name, list(text)) == expected
    for i in range(1, len(text)):
        assert parse(name, [text[:i], text[i:]]) == expected


@given(st.sampled_from(CASES), st.sampled_from(CASES), st.lists(st.integers(0, 400)))
def test_any_cuts_of_any_text(case: tuple[str, str, Seen], other: tuple[str, str, Seen], cuts: list[int]) -> None:
    name, text = case[0], case[1] + other[1]
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    assert parse(name, pieces) == parse(name, [text])


@pytest.mark.parametrize("name, text, expected", CASES)
def test_whole_calls_have_whole_arguments(name: str, text: str, expected: Seen) -> None:
    calls = [part for part in expected if isinstance(part, tuple)]
    if calls and not isinstance(expected[-1], str) and text[-1] in ">]}`":
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@pytest.mark.parametrize(
    "cut, whole",
    [
        ('{"a": {"b": [1, "é"]}}', '{"a": {"b": [1, "é"]}}'),
        ('{"a": {"b": [1, "é', '{"a": {"b": [1, "é"]}}'),
        ('{"a": 1, "b": tr', '{"a": 1}'),
        ('{"a": 1, "b', '{"a": 1}'),
        ('{"a": 1, "b": "x\\', '{"a": 1, "b": ""}'),
        ('{"a": 1, "b": "x,\\u00', '{"a": 1, "b": "x"}'),
        ('{"a": -', "{}"),
        ("{'a'", "{}"),
        ("{]", "{}"),
        ("{", "{}"),
        ("", "{}"),
        ("[" * 100_000, "{}"),
    ],
)
def test_arguments_that_are_cut(cut: str, whole: str) -> None:
    assert whole_object(cut) == whole


def test_arguments_stream() -> None:
    parser = TOOL_PARSERS["hermes"](TOOLS)
    given_at = {}
    for i, char in enumerate(HERMES_ZURICH):
        for part in parser.feed(char):
            given_at[i] = part
    first, *pieces = given_at.values()
    assert first == CallStart("get_weather") or isinstance(first, CallStart | Arguments)
    assert len(pieces) >= len(ZURICH) - 1
    at = HERMES_ZURICH.index(ZURICH)
    assert {*range(at, at + len(ZURICH))} <= given_at.keys()


def test_strings_of_xml_stream() -> None:
    parser = TOOL_PARSERS["qwen3_coder"](TOOLS)
    parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\n")
    assert [parser.feed(char) for char in "ab"] == [[Arguments("a")], [Arguments("b")]]


@pytest.mark.parametrize(
    "source, name",
    [
        ("… <tool_call>\n<function=example_function_name> …", "qwen3_coder"),
        ("… <tool_call></tool_call> XML tags …", "hermes"),
        ("… [TOOL_CALLS] …", "mistral"),
        ("… <|python_tag|> …", "llama3_json"),
        ('… {"name": function name, "parameters": dictionary of argument name and its value} …', "llama3_json"),
        ("… [func_name1(params_name1=params_value1)] …", "pythonic"),
        ("…", "json"),
    ],
)
def test_a_template_shows_its_format(source: str, name: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}{% if tools %}{% raw %}" + source + "{% endraw %}{% endif %}")
    assert tool_parser_of(template) is TOOL_PARSERS[name]


@pytest.mark.parametrize(
    "tool", [{"properties": 7}, {"properties": {"a": 7}}, {"properties": {"a": {"type": [{}, 7]}}}]
)
def test_schemas_that_are_none_are_no_fault(tool: dict[str, object]) -> None:
    parser = TOOL_PARSERS["qwen3_coder"]([Tool(name="f", parameters=tool)])
    text = "<function=f><parameter=a>1</parameter></function>"
    assert seen(parser.feed(text) + parser.finish()) == [("f", '{"a": 1}')]
