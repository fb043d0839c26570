"""`chat_template_kwargs` of POST /v1/chat/completions, on a template in Qwen3's manner."""

from typing import Any

import falcon.testing
import pytest

from fake_engine import END, Backend, ByteTokenizer, Post
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.template import ChatTemplate
from mlx_server.sampling_params import SamplingParams

SOURCE = """
{%- for message in messages %}{{ message.content }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %} <no think>{% endif %}
{%- if date_string is defined %} {{ date_string }}{% endif %}
{%- if add_generation_prompt %} {{ strftime_now("") }}>{% endif %}"""


@pytest.fixture
def post(backend: Backend) -> Post:
    model = ServedModel("tiny", ByteTokenizer(), ChatTemplate(SOURCE), [END], SamplingParams())
    client = falcon.testing.TestClient(backend.app(model=model), headers={"host": "localhost:8000"})

    def post(**fields: Any) -> falcon.testing.Result:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
        return client.simulate_post("/v1/chat/completions", json=body)

    return post


@pytest.mark.parametrize(
    ("kwargs", "prompt"),
    [
        (None, "hi >"),
        ({}, "hi >"),
        ({"enable_thinking": True}, "hi >"),
        ({"enable_thinking": False}, "hi <no think> >"),
        ({"enable_thinking": None}, "hi >"),
        ({"date_string": "today", "enable_thinking": False}, "hi <no think> today >"),
        ({"date_string": 1.5}, "hi 1.5 >"),
        ({"date_string": 26}, "hi 26 >"),
    ],
)
def test_the_template_gets_the_variables(backend: Backend, post: Post, kwargs: Any, prompt: str) -> None:
    assert post(chat_template_kwargs=kwargs).status_code == 200
    assert bytes(backend.engine.submits[0].prompt_token_ids).decode() == prompt


@pytest.mark.parametrize(
    ("kwargs", "param"),
    [
        ({"enable_thinkin": False}, "chat_template_kwargs.enable_thinkin"),  # nothing is accepted and then ignored
        ({"messages": "x"}, "chat_template_kwargs.messages"),
        ({"add_generation_prompt": False}, "chat_template_kwargs.add_generation_prompt"),
        ({"tokenize": False}, "chat_template_kwargs.tokenize"),
        ({"chat_template": "{{ 1 }}"}, "chat_template_kwargs.chat_template"),
        ({"strftime_now": "x"}, "chat_template_kwargs.strftime_now"),
        ({"raise_exception": "x"}, "chat_template_kwargs.raise_exception"),
        ({"range": 1}, "chat_template_kwargs.range"),
        ({"self": 1}, "chat_template_kwargs.self"),
        ({"": 1}, "chat_template_kwargs."),
        ({"x" * 1000: 1}, "chat_template_kwargs." + "x" * 64),
        ({"date_string": [1]}, "chat_template_kwargs[...]"),
        ({"date_string": {}}, "chat_template_kwargs[...]"),
        ({"date_string": "\0"}, "chat_template_kwargs.date_string"),
        ({str(i): None for i in range(65)}, "chat_template_kwargs"),
        ([], "chat_template_kwargs"),
        ("enable_thinking", "chat_template_kwargs"),
    ],
)
def test_what_the_template_can_not_use_is_refused(backend: Backend, post: Post, kwargs: Any, param: str) -> None:
    result = post(chat_template_kwargs=kwargs)
    assert result.status_code == 400
    assert result.json["error"]["param"] == param
    assert len(result.json["error"]["message"]) < 300
    assert not backend.engine.submits


def test_an_unknown_name_is_answered_with_the_known_ones(post: Post) -> None:
    message = post(chat_template_kwargs={"thinking": False}).json["error"]["message"]
    assert message == (
        "`chat_template_kwargs.thinking`: the model's chat template reads only: date_string, enable_thinking."
    )
