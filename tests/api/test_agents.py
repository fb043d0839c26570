"""What coding agents send is served, on the fake engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import falcon.testing
import pytest

from agent_requests import (
    CLAUDE_CODE_CALL,
    CLAUDE_CODE_HEADERS,
    CODEX_CALL,
    OPENCODE_CALL,
    OUTPUT,
    QWEN_CODE_CALL,
    claude_code,
    claude_code_title,
    codex,
    opencode,
)
from fake_engine import Backend, answer


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    backend = Backend(tmp_path, context_length=20_000)
    yield backend
    backend.close()


@pytest.mark.parametrize(
    ("path", "body", "headers", "end"),
    [
        ("/v1/messages?beta=true", claude_code(), CLAUDE_CODE_HEADERS, 'data: {"type":"message_stop"}'),
        ("/v1/chat/completions", opencode(), {"authorization": "Bearer none"}, "data: [DONE]"),
        ("/v1/responses", codex(), {"originator": "codex_exec"}, '"type":"response.completed"'),
    ],
)
def test_a_request_is_served(
    backend: Backend,
    client: falcon.testing.TestClient,
    path: str,
    body: dict[str, Any],
    headers: dict[str, str],
    end: str,
) -> None:
    backend.engine.script = answer("!")
    result = client.simulate_post(path, json=body, headers=headers)
    assert result.status_code == 200, result.text
    assert ':"!"' in result.text
    assert end in result.text.strip().split("\n\n")[-1]
    [submit] = backend.engine.submits
    assert b"reads the settings" in bytes(submit.prompt_token_ids)
    assert 0 < submit.max_tokens <= 20_000 - len(submit.prompt_token_ids)


@pytest.mark.parametrize(
    ("path", "body", "items", "call"),
    [
        ("/v1/messages?beta=true", claude_code(), "messages", CLAUDE_CODE_CALL),
        ("/v1/chat/completions", opencode(), "messages", OPENCODE_CALL),
        ("/v1/chat/completions", opencode(), "messages", QWEN_CODE_CALL),
        ("/v1/responses", codex(), "input", CODEX_CALL),
    ],
)
def test_a_tool_result_goes_on_from_the_prompt_before(
    backend: Backend,
    client: falcon.testing.TestClient,
    path: str,
    body: dict[str, Any],
    items: str,
    call: list[dict[str, Any]],
) -> None:
    for fields in (body, body | {items: body[items] + call}):
        result = client.simulate_post(path, json=fields)
        assert result.status_code == 200, result.text
    first, second = (bytes(submit.prompt_token_ids) for submit in backend.engine.submits)
    assert second.startswith(first)
    assert second[len(first) :] == f"assistant: I look.\ntool: {OUTPUT}\n".encode()


def test_claude_codes_title_must_be_json(backend: Backend, client: falcon.testing.TestClient) -> None:
    client.simulate_post("/v1/messages?beta=true", json=claude_code_title(), headers=CLAUDE_CODE_HEADERS)
    [submit] = backend.engine.submits
    assert submit.grammar is not None and '"title"' in str(submit.grammar)


def test_the_billing_header_is_no_part_of_the_prompt(backend: Backend, client: falcon.testing.TestClient) -> None:
    for request in (1, 2):
        client.simulate_post("/v1/messages", json=claude_code(request), headers=CLAUDE_CODE_HEADERS)
    first, second = (bytes(submit.prompt_token_ids) for submit in backend.engine.submits)
    assert first == second
    assert b"billing" not in first and b"You are a command line agent." in first


def test_the_first_call_of_claude_code_is_answered(client: falcon.testing.TestClient) -> None:
    assert client.simulate_head("/").status_code in (200, 404)
