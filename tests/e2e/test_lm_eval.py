"""lm-eval's requests: a task of multiple choice is scored as transformers scores it, without a tokenizer of its own.

`bench/bench_lm_eval.py` runs lm-eval itself, which is half a gigabyte with what it needs.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

pytestmark = pytest.mark.model

# [question][continuation]; `models/demo/make_golden.py` made it, with transformers on the dequantized weights.
CHOICES = json.loads((Path(__file__).parent.parent / "models/demo/choices.json").read_text())


def test_a_task_is_scored_as_by_transformers(client: OpenAI) -> None:
    asked = [choice for choices in CHOICES for choice in choices]
    answer = client.completions.create(
        model="default",
        prompt=[choice["prompt"] for choice in asked],
        max_tokens=1,
        logprobs=1,
        echo=True,
        temperature=0,
        seed=1234,
    )
    scores = []
    for choice, answered in zip(asked, sorted(answer.choices, key=lambda it: it.index), strict=True):
        scored: Any = answered.logprobs
        logprobs = scored.token_logprobs[choice["num_context"] : -1]
        assert len(logprobs) == len(choice["prompt"]) - choice["num_context"]
        tops = scored.top_logprobs[choice["num_context"] : -1]
        assert all(max(top.values()) >= logprob for top, logprob in zip(tops, logprobs, strict=True))
        scores.append(sum(logprobs))
    assert scores == pytest.approx([choice["logprob"] for choice in asked], abs=0.01)
    for i in range(0, len(scores), 3):
        assert scores[i] == max(scores[i : i + 3])  # the first continuation is right


def test_the_server_tells_what_lm_eval_needs_of_a_tokenizer(client: OpenAI) -> None:
    """Its tokenizer "remote", which it chooses by itself where these paths answer."""
    root = client.with_options(base_url=client.base_url.join("/"))

    def tokens(text: str) -> list[int]:
        reply: Any = root.post("/tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=dict)
        return list(reply["tokens"])

    info: Any = root.get("/tokenizer_info", cast_to=dict)
    assert (tokens(info["bos_token"]), tokens(info["eos_token"])) == ([1], [2])
    assert "<|im_start|>" in info["chat_template"]
    for prompt in [choice["prompt"] for choices in CHOICES for choice in choices]:
        text: Any = root.post("/detokenize", body={"tokens": prompt}, cast_to=dict)
        assert tokens(text["prompt"]) == prompt
