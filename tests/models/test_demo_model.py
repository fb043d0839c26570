"""The demo model against independent implementations; demo/README.md says where the numbers come from."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.models.loader import load_model
from models.dense_kv import greedy, prompt_logits

pytestmark = pytest.mark.model

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "demo" / "golden.json").read_text())
LLAMA_CPP_PERPLEXITY = 32.2025
NUM_TOKENS = 64
END_TOKEN_ID = 2  # <|im_end|>
NEAR_TIE = 0.005  # of two logits: either token is right, and the text goes on differently


@pytest.fixture(scope="module")
def model(demo_gguf):
    return load_model(str(demo_gguf))


@pytest.mark.parametrize("golden", GOLDEN["prompts"], ids=lambda golden: golden["name"])
def test_greedy_tokens_are_those_of_transformers(golden, model):
    tokens = greedy(model, golden["prompt"], NUM_TOKENS, (END_TOKEN_ID,))
    num_certain = next((i for i, margin in enumerate(golden["margins"]) if margin < NEAR_TIE), NUM_TOKENS)
    assert tokens[:num_certain] == golden["tokens"][:num_certain]


def test_knows_the_capital_of_france(model, demo_gguf):
    golden = next(golden for golden in GOLDEN["prompts"] if golden["name"] == "capital")
    tokens = greedy(model, golden["prompt"], NUM_TOKENS, (END_TOKEN_ID,))
    assert Tokenizer.load(demo_gguf).decode(tokens) == "The capital of France is Paris."


def test_perplexity_is_that_of_llama_cpp(model, demo_gguf):
    token_ids = Tokenizer.load(demo_gguf).encode((HERE.parent / "data" / "prose.txt").read_text())
    assert token_ids == GOLDEN["prose"]["tokens"]
    logits = prompt_logits(model, token_ids)[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    perplexity = np.exp(-logprobs[np.arange(len(token_ids) - 1), token_ids[1:]].mean())
    assert perplexity == pytest.approx(GOLDEN["prose"]["perplexity"], rel=1e-4)
    assert perplexity == pytest.approx(LLAMA_CPP_PERPLEXITY, rel=0.01)
