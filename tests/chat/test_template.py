import copy
import threading
import time

import pytest

from mlx_server.chat import sandbox
from mlx_server.chat.template import ChatTemplate
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.errors import InvalidRequestError, ModelLoadError

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
    {%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}
"""
CONTENTS = "{% for message in messages %}{{ message.content }}{% endfor %}"  # what every template must show
HI = [{"role": "user", "content": "hi"}]


def render(source: str) -> str:
    """What a template gives after the conversation's text."""
    return ChatTemplate(CONTENTS + source).render(HI).removeprefix("hi")


def test_renders_as_transformers_does():
    conversation = [*HI, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "bye"}]
    assert ChatTemplate(CHATML).render(conversation) == (
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ChatTemplate(CHATML).render(HI, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02345678"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ {'b': 1} | tojson(indent=2) }}", '{\n  "b": 1\n}'),
        ("{% set ns = namespace(n=1) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{{ dict(a=1).a }}", "1"),
        ("{{ nothing }}{{ nothing is defined }}{{ tools is defined }}", "FalseFalse"),
        ("<b>{{ '<&>' }}</b>", "<b><&></b>"),
        ("{{ ', '.join(['a', 'b']) }} {{ ['a', 'b'] | map('upper') | join('-') }}", "a, b A-B"),
        ("{{ '-'.join(['a'] | map('upper')) }}{{ 'aa'.replace('a', 'b') | replace('b', 'c', 1) }}", "Acb"),
        ("{{ [{'a': 1}, {'a': 2}] | join(', ', attribute='a') }}", "1, 2"),
        ("{{ '<{}>'.format(7) }}{{ 2 * 3 + 1 }}{{ '-' * 3 }}{{ 7 % 4 }}", "<7>7---3"),
        ("{{ 'a' ~ 1 ~ nothing ~ none }}", "a1None"),
        ("{{ 'a\\nb' | indent(2) }}", "a\n  b"),
    ],
)
def test_dialect(source, rendered):
    assert ChatTemplate(CONTENTS + source, bos_token="<s>", eos_token="</s>").render(HI) == f"hi{rendered}"


def test_dates():
    assert render("{{ strftime_now('%Y') }}") in {str(time.localtime().tm_year - offset) for offset in (0, 1)}


def test_tools_and_other_variables():
    template = ChatTemplate(CONTENTS + "{% if tools is defined %} {{ tools[0].name }}{% endif %} {{ enable_thinking }}")
    assert template.render(HI) == "hi "
    assert template.render(HI, tools=[{"name": "f"}], template_kwargs={"enable_thinking": False}) == "hi f False"


CALL = {"name": "f", "arguments": '{"a": [1, "é"]}'}


@pytest.mark.parametrize(
    ("arguments", "rendered"),
    [
        ('{"a": [1, "é"]}', '{"a": [1, "é"]}'),
        ({"a": 1}, '{"a": 1}'),
        ("", '""'),  # no JSON: as the model wrote it
        ('{"a"', '"{\\"a\\""'),
        ("[" * 10_000, '"' + "[" * 10_000 + '"'),
    ],
)
def test_arguments_of_tool_calls_are_objects(arguments, rendered):
    source = CONTENTS + "{% for c in messages[-1].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert ChatTemplate(source).render([*HI, call]) == f"hi{rendered}"


def test_a_template_for_tools_is_used_with_tools_only():
    template = ChatTemplate(CONTENTS, tool_source=CONTENTS + " {{ tools[0].function.name }}{{ style }}")
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert template.render(HI) == template.render(HI, tools=[]) == "hi"
    assert template.render(HI, tools=tools) == "hi f"
    assert template.render(HI, tools=tools, template_kwargs={"style": 1}) == "hi f1"
    with pytest.raises(InvalidRequestError, match="reads only: none"):
        template.render(HI, template_kwargs={"style": 1})
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatTemplate(None, tool_source=CONTENTS).render(HI)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{{ a }}{% if b is defined %}{% endif %}{{ c | default(1) }}", "a, b, c"),
        ("{% if a is not defined %}{% set a = 1 %}{% endif %}{% set b = b | default(2) %}", "a, b"),
        ("{% if 1 %}{% set a = 1 %}{% else %}{% set a = 2 %}{% endif %}{{ a }}", "none"),
        ("{% for a in messages %}{{ a }}{{ loop.index }}{% endfor %}{% macro f(b) %}{{ b }}{% endmacro %}", "none"),
        ("{{ bos_token }}{{ tools }}{{ range(1) }}{{ strftime_now('') }}{{ add_generation_prompt }}", "none"),
    ],
)
def test_variables_that_can_be_set_are_known(source, names):
    template = ChatTemplate(CONTENTS + source)
    with pytest.raises(InvalidRequestError, match=f"reads only: {names}\\.$") as caught:
        template.render(HI, template_kwargs={"unknown": True})
    assert caught.value.param == "chat_template_kwargs.unknown"


def test_variables_are_escaped_as_messages_are():
    template = ChatTemplate(CONTENTS + "{{ date }}", escape=lambda text: text.replace("<x>", "_"))
    assert template.render(HI, template_kwargs={"date": "<x>"}) == "hi_"


# --- Forms of content ---

PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]


def test_parts_become_text():
    assert ChatTemplate(CONTENTS).render(PARTS) == "one\ntwo"


def test_a_template_that_needs_parts_gets_parts():
    source = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"
    template = ChatTemplate(source)
    assert template.render(PARTS) == "[one][two]"
    assert template.render(HI) == "[hi]"


def test_no_content_is_empty_text():
    assert ChatTemplate(CONTENTS).render([*HI, {"role": "assistant", "content": None}, {"role": "user"}]) == "hi"


def test_every_text_of_users_is_escaped():
    message = {"role": "user", "content": "<x>", "parts": [{"<x>": "<x>", "number": 1}]}
    source = "<x>{% for m in messages %}{{ m.role }} {{ m.content }} {{ m.parts | default | tojson }}{% endfor %}"
    rendered = ChatTemplate(source, escape=lambda text: text.replace("<x>", "_")).render([message])
    assert rendered == '<x>user _ [{"_": "_", "number": 1}]'


# --- Faults ---


def test_the_templates_own_refusal_reaches_the_client():
    source = CONTENTS + "{% if messages | length > 1 %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    with pytest.raises(InvalidRequestError, match=r"^Roles must alternate$") as caught:
        ChatTemplate(source).render(HI * 2)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "expression", ["1 / (2 - messages | length)", "'a' + 1", "nothing.x", "messages[0].nothing.x", "{}['a'].b"]
)
def test_other_faults_tell_nothing(expression):
    source = CONTENTS + "{% if messages | length > 1 %}{{ " + expression + " }}{% endif %}"
    with pytest.raises(InvalidRequestError, match=r"^the model's chat template can't render this conversation$"):
        ChatTemplate(source).render(HI * 2)


def test_a_model_without_a_template_can_not_chat():
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        ChatTemplate(None).render(HI)
    assert caught.value.code == "no_chat_template"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("a\n{% for %}", "has a fault in line 2"),
        ("{{ " + "(" * 5000, "chat template"),
        ("{% include 'secret' %}", "can't render"),
        ("{{ raise_exception('I want tools') }}", "can't render a user's message: I want tools"),
        ("no message", "it leaves out the message"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "can't render"),
    ],
)
def test_a_bad_template_fails_the_load(source, fault):
    with pytest.raises(ModelLoadError, match=fault):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "payload",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'].__subclasses__() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__dict__ = 1 %}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        # CVE-2024-56326: a reference to str.format, called by somebody else
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ ['{0.__class__}'.format] | map('call', 1) | join }}",
        "{{ dict(f='{0.__class__.__init__}'.format).f(1) }}",
        # CVE-2025-27516: the same reference, through |attr
        "{{ ('{0.__class__}' | attr('format'))(1) }}",
        "{{ ('{x.__class__}' | attr('format_map'))({'x': 1}) }}",
        "{% import 'os' as os %}",
        "{{ ''.__init_subclass__() }}{{ ().__class__.__bases__[0].__subclasses__() }}",
    ],
)
def test_the_sandbox_holds(payload):
    try:
        rendered = render(payload)
    except ModelLoadError:
        return
    assert "class" not in rendered and "module" not in rendered and "function" not in rendered
    assert rendered == ""


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ 'long text' }}{% endfor %}{% endfor %}", "too long"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too long"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}", "too long"),
    ],
)
def test_a_template_that_runs_away_is_stopped(source, fault, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.05)
    monkeypatch.setattr(sandbox, "MAX_CHARS", 1 << 16)
    with pytest.raises(ModelLoadError, match=fault):
        ChatTemplate(source + CONTENTS)


@pytest.mark.parametrize(
    "expression",
    [
        "'x' * 10 ** 10",
        "10 ** 10 ** 10",
        "[0] * 10 ** 10",
        "10 ** 10 * messages",
        "'x' | center(10000000000)",
        "'x'.ljust(10000000000)",
        "'%10000000000d' % 1",
        "'%10000000000d' | format(1)",
        "'{:10000000000}'.format(1)",
        "'{:{}}'.format(1, '10000000000')",
        "'x\n' | indent(10000000000)",
        "'\t'.expandtabs(10000000000)",
        "range(10000000000)",
        "[1] | batch(10000000000, 0) | list",
        "[1] | slice(10000000000) | list",
        "{'x': 1} | tojson(indent=10000000000)",
        "('x' * 10 ** 6).replace('x', 'x' * 10 ** 6)",
        "('x' * 10 ** 6) | replace('x', 'x' * 10 ** 6)",
        "('x' * 10 ** 6).join(['x'] * 10 ** 6)",
        "['x'] * 10 ** 6 | join('x' * 10 ** 6)",
        "('x' * 10 ** 6).join(['x'] * 10 ** 6 | map('upper'))",
    ],
)
def test_no_expression_makes_a_huge_value(expression):
    with pytest.raises(ModelLoadError):
        ChatTemplate(CONTENTS + "{{ (" + expression + ") | length }}")


@pytest.mark.parametrize(
    "step",
    [
        "{% set x = x ~ x %}",
        "{% set x = x + x %}",
        "{% set x %}{{ x }}{{ x }}{% endset %}",
        "{% set x = [x, x] | join %}",
        "{% set x = x | replace('x', 'xx') %}",
        "{% set x = x.replace('x', 'xx') %}",
    ],
)
def test_no_steps_make_a_huge_value(step):
    with pytest.raises(ModelLoadError, match="too long"):
        ChatTemplate(CONTENTS + "{% set x = 'x' %}" + step * 50)


def test_loops_without_output_and_calls_are_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.05)
    loops = "{% for a in x %}" * 6 + "{% endfor %}" * 6
    with pytest.raises(ModelLoadError, match="takes too long"):
        ChatTemplate(CONTENTS + "{% set x = [1] * 1000 %}" + loops)


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}], "tool_calls": [{"function": CALL}]}]
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    before = copy.deepcopy((messages, tools))
    ChatTemplate(CONTENTS + "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}").render(messages, tools=tools)
    assert (messages, tools) == before
    for change in ("messages.append(1)", "messages[0].update(role='x')", "messages[0].pop('role')", "messages.clear()"):
        with pytest.raises(ModelLoadError, match="can't render"):
            ChatTemplate(CONTENTS + "{{ " + change + " }}")


def test_threads_render_side_by_side():
    template = ChatTemplate(CHATML)
    rendered = dict[int, str]()

    def work(number: int) -> None:
        for _ in range(20):
            rendered[number] = template.render([{"role": "user", "content": str(number)}], add_generation_prompt=False)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == {number: f"<|im_start|>user\n{number}<|im_end|>\n" for number in range(8)}


@pytest.mark.model
def test_the_demo_models_template(demo_gguf):
    tokenizer = Tokenizer.load(demo_gguf)
    assert ChatTemplate(tokenizer.templates.default, escape=tokenizer.escape).render(HI) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
