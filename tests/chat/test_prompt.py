"""Conversations with tools, reasoning and unfinished answers, as templates read them."""

import dataclasses
import json
import os
import shutil
from typing import Any

import pytest

from fake_engine import ByteTokenizer, fake_model
from mlx_server.chat.prompt import completion_tokens, render_chat
from mlx_server.chat.served_model import load_served_model
from mlx_server.chat.template import ChatTemplate
from mlx_server.chat.types import ChatMessage, ChatRequest, CompletionRequest, Reasoning, Tool, ToolCall
from mlx_server.config import ResolvedModel
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import EngineInfo
from real_tokenizers import GEMMA3, LLAMA3_1, QWEN3, model_directory

USER = ChatMessage(role="user", content="hi")
TOOL = Tool(name="f", description="Does.", parameters={"type": "object", "properties": {"x": {"type": "string"}}})
CALLED = ChatMessage(role="assistant", tool_calls=[ToolCall("call_123", "f", '{"x": "é"}')])
RESULT = ChatMessage(role="tool", content="done", tool_call_id="call_123")
# What a template is given, as JSON.
SHOW = "{{ [messages, tools or []] | tojson }}"
PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
INFO = EngineInfo(context_length=100, vocab_size=257, max_requests=9, limited_by_memory=False)


def render(source: str, *messages: ChatMessage, **fields: Any) -> str:
    model = fake_model(template=ChatTemplate(source))
    fields = {"sampling": SamplingParams(), "max_tokens": 9} | fields
    return render_chat(model, ChatRequest(messages=[*messages], **fields)).text


def test_calls_and_results_reach_the_template() -> None:
    shown, tools = json.loads(render(SHOW, USER, CALLED, RESULT, tools=[TOOL]))
    function = {"name": "f", "arguments": {"x": "é"}}
    assert shown[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_123", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "done", "tool_call_id": "call_123"},
    ]
    assert tools == [
        {"type": "function", "function": {"name": "f", "description": "Does.", "parameters": TOOL.parameters}}
    ]


def test_a_tool_without_parameters_has_a_schema() -> None:
    _, tools = json.loads(render(SHOW, USER, tools=[Tool(name="f")]))
    assert tools[0]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_names_and_reasoning_reach_the_template() -> None:
    message = ChatMessage(role="assistant", content="a", reasoning_content="b", name="c")
    (shown,), _ = json.loads(render(SHOW, message))
    assert shown == {"role": "assistant", "content": "a", "reasoning_content": "b", "name": "c"}


def test_developers_are_the_system_unless_the_template_knows_them() -> None:
    developer = ChatMessage(role="developer", content="x")
    assert render(PLAIN, developer) == "system: x\n"
    assert render(PLAIN + "{# developer #}", developer) == "developer: x\n"


def test_mistrals_ids_are_nine_characters() -> None:
    source = SHOW + "{% if messages[0].id | length != 9 %}{% endif %}"
    shown, _ = json.loads(render(source, CALLED, RESULT, ChatMessage(role="tool", tool_call_id="123456789")))
    made = shown[0]["tool_calls"][0]["id"]
    assert len(made) == 9
    assert [shown[1]["tool_call_id"], shown[2]["tool_call_id"]] == [made, "123456789"]


STRICT = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message must be first') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}"
)


def test_later_system_messages_where_the_template_refuses_them() -> None:
    system, assistant = ChatMessage(role="system", content="s"), ChatMessage(role="assistant", content="a")
    messages = [system, USER, system, assistant, system, USER]
    assert render(STRICT, *messages) == "<system>s<user>hi\n\ns<assistant>a<user>s\n\nhi"
    assert render(STRICT.replace("not loop.first", "false"), *messages).count("<system>") == 3
    with pytest.raises(InvalidRequestError, match="chosen"):
        render(
            "{{ messages[0].content }}{% if messages[1] %}{{ raise_exception('chosen') }}{% endif %}", USER, assistant
        )


ALTERNATING = (
    "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}{% for message in turns %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{% endfor %}"
) + STRICT


def test_messages_of_one_role_where_the_template_wants_turns_that_alternate() -> None:
    """As Codex sends them: instructions, a developer's message, and two of the user."""
    system, developer = ChatMessage(role="system", content="s"), ChatMessage(role="developer", content="d")
    assert render(ALTERNATING, system, developer, USER, USER) == "<system>s\n\nd<user>hi\n\nhi"
    assert render(PLAIN, system, developer, USER, USER) == "system: s\nsystem: d\nuser: hi\nuser: hi\n"


# --- templates without tools ---


def test_tools_are_told_in_the_system_message() -> None:
    system = ChatMessage(role="system", content="Be brief.")
    for rendered, head in (
        (render(PLAIN, USER, tools=[TOOL]), ""),
        (render(PLAIN, system, USER, tools=[TOOL]), "Be brief.\n\n"),
    ):
        assert rendered.startswith(f"system: {head}You may call these functions:\n")
        assert '{"name": "f", "description": "Does.", "parameters": {"type": "object"' in rendered
        assert rendered.endswith("</tool_call>\nuser: hi\n")
        assert rendered.count("system: ") == 1


def test_calls_and_results_are_told_in_texts() -> None:
    asked = ChatMessage(role="assistant", content="Hm.", tool_calls=CALLED.tool_calls * 2)
    assert render(PLAIN, USER, asked, RESULT, RESULT, USER, ChatMessage(role="assistant", content="ok")) == (
        "user: hi\nassistant: Hm.\n"
        + '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n' * 2
        + "user: "
        + "<tool_response>\ndone\n</tool_response>\n" * 2
        + "hi\nassistant: ok\n"
    )


# --- unfinished answers ---

TURNS = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_last_message_goes_on() -> None:
    prefill = ChatMessage(role="assistant", content="So ")
    assert render(TURNS, USER, prefill, continue_final_message=True) == "<user>hi<end>\n<assistant>So "
    assert render(TURNS, USER, prefill) == "<user>hi<end>\n<assistant>So<end>\n<assistant>"
    assert render(TURNS, USER, add_generation_prompt=False) == "<user>hi<end>\n"


@pytest.mark.parametrize("last", [USER, CALLED])
def test_what_can_not_go_on(last: ChatMessage) -> None:
    with pytest.raises(InvalidRequestError, match="can be continued"):
        render(TURNS, last, continue_final_message=True)


def test_a_template_that_leaves_out_the_last_message() -> None:
    source = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="leaves out"):
        render(source, USER, ChatMessage(role="assistant", content="So"), continue_final_message=True)


# --- reasoning ---


@pytest.mark.parametrize(
    "source, reasoning, kwargs, shown",
    [
        ("{{ enable_thinking }}", Reasoning(enabled=False), {}, "False"),
        ("{{ enable_thinking }}", Reasoning(effort="none"), {}, "False"),
        ("{{ enable_thinking }}", Reasoning(effort="low"), {}, ""),
        ("{{ enable_thinking }}", Reasoning(enabled=False), {"enable_thinking": True}, "True"),
        ("{{ thinking }}", Reasoning(enabled=True), {}, "True"),
        ("{{ reasoning_effort }}", Reasoning(effort="high"), {}, "high"),
        ("", Reasoning(enabled=True, effort="max"), {}, ""),
    ],
)
def test_reasoning_is_the_templates_variables(
    source: str, reasoning: Reasoning, kwargs: dict[str, bool], shown: str
) -> None:
    assert (
        render("{{ messages[0].content }}" + source, USER, reasoning=reasoning, template_kwargs=kwargs) == "hi" + shown
    )


# --- filling in the middle ---


class FimTokenizer(ByteTokenizer):
    def token_id(self, text: str) -> int | None:
        return {"<fim_prefix>": 1, "<fim_suffix>": 2, "<fim_middle>": 3}.get(text)


def test_filling_in_the_middle() -> None:
    model = dataclasses.replace(fake_model(), tokenizer=FimTokenizer())
    request = CompletionRequest(prompts=["a"], suffix="b", sampling=SamplingParams(), max_tokens=1)
    assert completion_tokens(model, request, INFO) == [[1, ord("a"), 2, ord("b"), 3]]


# --- real models ---


@pytest.mark.model
@pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="npm is missing")
@pytest.mark.parametrize(
    "name, parser, ending",
    [
        (QWEN3, "Hermes", "<|im_start|>assistant\n<think>\n\n</think>\n\nSo"),
        (LLAMA3_1, "Hermes", "<|start_header_id|>assistant<|end_header_id|>\n\nSo"),
        (GEMMA3, "Hermes", "<start_of_turn>model\nSo"),
    ],
)
def test_real_models(name: str, parser: str, ending: str) -> None:
    model = load_served_model(ResolvedModel(name, str(model_directory(name))))
    assert model.tool_parser.__name__ == parser
    assert (model.reasoning_tags is not None) == (name == QWEN3)
    fields: dict[str, Any] = {"sampling": SamplingParams(), "max_tokens": 9, "tools": [TOOL]}
    prefill = ChatMessage(role="assistant", content="So")
    history = [ChatMessage(role="developer", content="Be brief."), USER, CALLED, RESULT, USER]
    prompt = render_chat(model, ChatRequest(messages=[*history, prefill], continue_final_message=True, **fields))
    assert prompt.text.endswith(ending)
    for part in ("Be brief.", "Does.", '"x": "é"', "done"):
        assert part in prompt.text
