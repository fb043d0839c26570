"""lm-eval's requests for log-likelihoods: a task of multiple choice is scored as transformers scores it."""

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
