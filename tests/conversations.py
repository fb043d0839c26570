"""Conversations for chat templates: every kind of turn that they know."""

from dataclasses import dataclass, field
from typing import Any

WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a <city>, "now" & here: é',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}, "n": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": "  Wie ist das Wetter in Zürich? 👩‍👩‍👧‍👦 <b>&amp;</b>\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSunny."}
CALLS: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}},
        {
            "id": "call_2",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "東京", "n": 2}},
        },
    ],
}
RESULTS: list[dict[str, Any]] = [
    {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": '{"degrees": 20}'},
    {"role": "tool", "tool_call_id": "call_2", "name": "get_weather", "content": "rain"},
]


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)


CONVERSATIONS = {
    "user": Conversation([USER]),
    "system": Conversation([SYSTEM, USER]),
    "empty system": Conversation([{"role": "system", "content": ""}, USER]),
    "turns": Conversation([SYSTEM, USER, {"role": "assistant", "content": "Sunny. "}, USER]),
    "no prompt": Conversation([USER, THOUGHT], add_generation_prompt=False),
    "thought": Conversation([USER, THOUGHT, USER]),
    "reasoning": Conversation([USER, {"role": "assistant", "reasoning_content": "Hm.", "content": "Sunny."}]),
    "thinking": Conversation([USER], template_kwargs={"enable_thinking": True}),
    "no thinking": Conversation([SYSTEM, USER], template_kwargs={"enable_thinking": False}),
    "tools": Conversation([USER], [WEATHER_TOOL, WEATHER_TOOL]),
    "tools and system": Conversation([SYSTEM, USER], [WEATHER_TOOL], template_kwargs={"enable_thinking": False}),
    "results": Conversation([SYSTEM, USER, CALLS, *RESULTS], [WEATHER_TOOL]),
    "after results": Conversation([USER, CALLS, *RESULTS, THOUGHT, USER], [WEATHER_TOOL]),
    "roles that do not alternate": Conversation([USER, USER]),
    "no user": Conversation([SYSTEM]),
}
