"""anthropic's client against a real server on the demo model."""

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic, BadRequestError

from e2e_server import PARIS, STORY
from server_process import ServerProcess

pytestmark = pytest.mark.model


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.url(), api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "default", "max_tokens": 24, "messages": PARIS, "extra_body": {"temperature": 0}} | fields


def test_an_answer_counts_its_prompt(claude: Anthropic) -> None:
    message = claude.messages.create(**ask())
    assert "Paris" in message.content[0].text  # type: ignore[union-attr]
    assert message.stop_reason == "end_turn"
    count = claude.messages.count_tokens(model="default", messages=PARIS)  # type: ignore[arg-type]
    usage = message.usage
    assert usage.cache_read_input_tokens is not None
    assert usage.input_tokens + usage.cache_read_input_tokens == count.input_tokens


def test_a_stream_is_the_answer_in_pieces(claude: Anthropic) -> None:
    long = ask(messages=STORY, max_tokens=100)  # pieces of what is ready before it is sent are joined
    whole = claude.messages.create(**long)
    with claude.messages.stream(**long) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3
    assert "".join(pieces) == final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_a_second_turn_reads_the_first_from_the_cache(claude: Anthropic) -> None:
    first = claude.messages.create(**ask(messages=STORY, max_tokens=40))
    turns = [*STORY, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Go on."}]
    second = claude.messages.create(**ask(messages=turns))
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= 48 > second.usage.input_tokens


def test_an_answer_goes_on_from_its_beginning(claude: Anthropic) -> None:
    turns = [*PARIS, {"role": "assistant", "content": "The capital of France is"}]
    message = claude.messages.create(**ask(messages=turns))
    assert message.content[0].text.startswith(" Paris")  # type: ignore[union-attr]


def test_a_refusal_is_the_sdks_error(claude: Anthropic) -> None:
    with pytest.raises(BadRequestError, match=r"messages\[0\]\.content"):
        claude.messages.create(**ask(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}]))
