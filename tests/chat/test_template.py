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
