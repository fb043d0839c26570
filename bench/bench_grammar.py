"""What grammars cost: masks for all tokens of a JSON text, and decoding with and without a grammar."""

import json

import pytest

from mlx_server import wire
from mlx_server.chat.grammar import text_grammar
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.chat.types import JsonSchema, Regex
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.grammar import Grammars
from mlx_server.engine.memory import plan_memory
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams
from real_tokenizers import QWEN3, model_directory

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
        "tags": {"type": "array", "items": {"type": "string"}},
        "authors": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    },
    "required": ["title", "year", "tags", "authors"],
    "additionalProperties": False,
}
BOOK = {
    "title": "Notes on the lighthouses of the north, with a chapter on granite",
    "year": 1987,
    "tags": ["harbours", "history of engineering", "granite"],
    "authors": [{"name": "Adelaide Crane"}, {"name": "J. Marn"}],
}
NUM_TOKENS = 64


@pytest.fixture(scope="module", params=["demo", QWEN3])
def tokenizer_path(request, demo_gguf):
    return demo_gguf if request.param == "demo" else model_directory(request.param)


@pytest.mark.parametrize("num_rows", [1, 16])
def bench_masks(benchmark, tokenizer_path, num_rows):
    """For each token of the text: matchers take it in, then all masks are computed. Forced tokens have no mask."""
    tokenizer = Tokenizer.load(tokenizer_path)
    token_ids = tokenizer.encode(json.dumps(BOOK))
    vocab_size = 151936 if tokenizer_path.is_dir() else 49152
    benchmark.group = f"masks {num_rows} x {vocab_size}"
    grammars = Grammars.of_model(tokenizer_path, vocab_size)
    schema = text_grammar(JsonSchema(schema=SCHEMA, param="schema"))
    num_masks = 0

    def compute() -> None:
        nonlocal num_masks
        num_masks = 0
        outputs = [grammars.compile(schema, frozenset(tokenizer.end_token_ids)) for _ in range(num_rows)]
        for num_known in range(len(token_ids)):
            for output in outputs:
                output.advance(token_ids[:num_known])
            if not outputs[0].forced_after(num_known):
                grammars.masks(outputs)
                num_masks += 1

    benchmark.pedantic(compute, rounds=5, warmup_rounds=1)
    benchmark.extra_info["us_per_mask"] = round(benchmark.stats.stats.min * 1e6 / (num_rows * num_masks), 1)
    benchmark.extra_info["forced"] = f"{len(token_ids) - num_masks} of {len(token_ids)} tokens"


@pytest.fixture(scope="module")
def model(demo_gguf):
    return load_model(str(demo_gguf))


@pytest.mark.parametrize("grammar", ["none", "any text", "schema"])
@pytest.mark.parametrize("num_requests", [1, 8])
def bench_decode(benchmark, model, demo_gguf, num_requests, grammar):
    """`any text` shows what masks cost, as nothing is forced; `schema` what forced tokens save."""
    benchmark.group = f"decode, {num_requests} at once"
    tokenizer = Tokenizer.load(demo_gguf)
    core = make_engine_core(model, plan_memory(model), grammars=Grammars.of_model(demo_gguf, model.vocab_size))
    text = {
        "none": None,
        "any text": text_grammar(Regex(pattern="(?s:.)*", param="regex")),
        "schema": text_grammar(JsonSchema(schema=SCHEMA, param="schema")),
    }[grammar]
    prompt = tokenizer.encode("<|im_start|>user\nDescribe a book in JSON.<|im_end|>\n<|im_start|>assistant\n")
    num_tokens = 0

    def complete() -> None:
        nonlocal num_tokens
        num_tokens = 0
        for i in range(num_requests):
            sampling = SamplingParams(temperature=0.7, seed=i, min_tokens=NUM_TOKENS)
            message = wire.Submit(str(i), prompt, NUM_TOKENS, tokenizer.end_token_ids, sampling, grammar=text)
            assert core.submit(b"", message) is None
        while core.has_work:
            for _, output in core.step():
                assert isinstance(output, wire.Tokens | wire.Finished)
                num_tokens += len(output.token_ids)

    benchmark.pedantic(complete, rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = round(num_tokens / benchmark.stats.stats.min, 1)
