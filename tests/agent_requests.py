"""What coding agents send: the shapes of recorded requests, with less text."""

from typing import Any

_PROPERTIES = {"path": {"type": "string", "description": "An absolute path."}, "limit": {"type": "integer"}}
_SCHEMA = {"type": "object", "properties": _PROPERTIES, "required": ["path"], "additionalProperties": False}
_TASK = "Look for the function that reads the settings."
_RULES = "You help with a program's text. Read before you write. " * 8


def claude_code(request: int = 0) -> dict[str, Any]:
    """The body of Claude Code's POST /v1/messages?beta=true; the first block differs from request to request."""
    cached = {"cache_control": {"type": "ephemeral"}}
    reminder = "<system-reminder>The date is 2026-11-20.</system-reminder>"
    return {
        "model": "default",
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.197.{request:03}; cch={request:05};"},
            {"type": "text", "text": "You are a command line agent.", **cached},
            {"type": "text", "text": _RULES, **cached},
        ],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": reminder}, {"type": "text", "text": _TASK, **cached}],
            },
            {"role": "system", "content": "Answer in English."},
        ],
        "tools": [
            {"name": f"Tool{i}", "description": f"Does {i}.", "input_schema": {"$schema": "x", **_SCHEMA}}
            for i in range(24)
        ],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "user_0_account__session_0"},
    }


def claude_code_title() -> dict[str, Any]:
    """Its request for a name of the session."""
    title = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
    return {
        "model": "default",
        "max_tokens": 32000,
        "stream": True,
        "system": [{"type": "text", "text": "Write a title of 3 to 7 words."}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": f"<session>{_TASK}</session>"}]}],
        "tools": [],
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": title}},
    }


# What each agent appends to its first request once the model has called a tool.
OUTPUT = "settings.py:5:def read_settings():"
CLAUDE_CODE_CALL = [
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_0", "name": "Tool0", "input": {"path": "/"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {
                "tool_use_id": "toolu_0",
                "type": "tool_result",
                "content": OUTPUT,
                "is_error": False,
                "cache_control": {"type": "ephemeral"},
            }
        ],
    },
]
OPENCODE_CALL = [
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "call_0", "type": "function", "function": {"name": "tool0", "arguments": '{"path":"/"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_0", "content": OUTPUT},
]
QWEN_CODE_CALL = [
    OPENCODE_CALL[0],
    {"role": "tool", "tool_call_id": "call_0", "content": [{"type": "text", "text": OUTPUT}]},
]
CODEX_CALL = [
    {
        "type": "message",
        "status": "completed",
        "id": "msg_0_0",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
    },
    {
        "type": "function_call",
        "status": "completed",
        "id": "fc_0_1",
        "name": "tool0",
        "arguments": '{"path": "/"}',
        "call_id": "call_0",
    },
    {"type": "function_call_output", "id": "fco_0", "call_id": "call_0", "output": OUTPUT},
]

CLAUDE_CODE_HEADERS = {
    "x-api-key": "none",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
    "x-stainless-retry-count": "0",
}


def opencode() -> dict[str, Any]:
    """The body of POST /v1/chat/completions."""
    function = {"description": "Does it.", "parameters": _SCHEMA}
    return {
        "model": "default",
        "max_tokens": 32000,
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": _RULES}, {"role": "user", "content": _TASK}],
        "tools": [{"type": "function", "function": function | {"name": f"tool{i}"}} for i in range(10)],
        "tool_choice": "auto",
    }


def codex() -> dict[str, Any]:
    """The body of POST /v1/responses."""

    def message(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "id": "msg_0", "content": [{"type": "input_text", "text": text}]}

    function = {"type": "function", "description": "Does it.", "strict": False, "parameters": _SCHEMA}
    return {
        "model": "default",
        "instructions": _RULES,
        "input": [
            message("developer", "Be careful."),
            message("user", "<environment_context/>"),
            message("user", _TASK),
        ],
        "tools": [
            *(function | {"name": f"tool{i}"} for i in range(7)),
            {"type": "namespace", "name": "mcp", "description": "More.", "tools": []},
            {"type": "web_search"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0",
    }
