"""What the demo model writes under a JSON Schema matches it, whatever the schema: cases in the manner of the official
test suite, each answered greedily and at random."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.test_runner import make_core
from engine.test_scheduler import API, Collector
from mlx_server import wire
from mlx_server.chat.grammar import text_grammar
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.chat.types import JsonSchema
from mlx_server.engine.core import EngineCore
from mlx_server.engine.grammar import Grammars
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

pytestmark = pytest.mark.model

MAX_TOKENS = 160
WORD = {"type": "string", "maxLength": 12}


def an_object(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    } | more


CASES: dict[str, dict[str, Any]] = {
    "string": {"type": "string", "minLength": 2, "maxLength": 9},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]+$", "maxLength": 10},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "integer": {"type": "integer", "minimum": -5, "maximum": 1200},
    "exclusive bounds": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 9},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 95},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "several types": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    "const": {"const": {"a": [1, "two", None]}},
    "enum": {"enum": ["red", 7, None, ["x"], {"k": True}]},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
    "empty array": {"type": "array", "maxItems": 0},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, WORD], "items": False, "minItems": 2},
    "nested arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        "maxItems": 3,
    },
    "empty object": an_object({}),
    "object": an_object({"name": WORD, "age": {"type": "integer", "minimum": 0, "maximum": 150}}, "name", "age"),
    "optional properties": an_object({"a": {"type": "boolean"}, "b": {"type": "boolean"}}),
    "nested objects": an_object({"a": an_object({"b": an_object({"c": {"const": 1}}, "c")}, "b")}, "a"),
    "other properties": {
        "type": "object",
        "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["id"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "reference": {
        "$defs": {"point": an_object({"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "x")},
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "minItems": 1,
        "maxItems": 2,
    },
    "recursion": {
        "$defs": {
            "tree": an_object(
                {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "v", "next"
            )
        },
        "$ref": "#/$defs/tree",
    },
    "any of": {"anyOf": [{"type": "boolean"}, {"const": "neither"}, an_object({"n": {"type": "null"}}, "n")]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 6}]},
    "named variants": {
        "anyOf": [
            an_object({"kind": {"const": "circle"}, "r": {"type": "integer", "minimum": 1, "maximum": 9}}, "kind", "r"),
            an_object({"kind": {"const": "line"}, "to": {"enum": ["N", "S"]}}, "kind", "to"),
        ]
    },
    "unicode": {"enum": ["naïve", "日本", "😀", 'quo"te', "back\\slash", "line\nbreak"]},
    "odd names": an_object({"a b": {"const": 1}, 'q"': {"const": 2}, "é": {"const": 3}}, "a b", 'q"', "é"),
    "true": {},
}


@pytest.fixture(scope="module")
def tokenizer(demo_gguf: Path) -> Tokenizer:
    return Tokenizer.load(demo_gguf)


@pytest.fixture(scope="module")
def core(demo_gguf: Path) -> EngineCore:
    model = load_model(str(demo_gguf))
    return make_core(
        model,
        num_blocks=512,
        max_batch_tokens=256,
        max_running=48,
        grammars=Grammars.of_model(demo_gguf, model.vocab_size),
    )


def test_all_completed_outputs_match(core: EngineCore, tokenizer: Tokenizer) -> None:
    messages, schemas = [], {}
    for name, schema in CASES.items():
        prompt = tokenizer.encode(f"<|im_start|>user\nGive me {name} as JSON.<|im_end|>\n<|im_start|>assistant\n")
        grammar = text_grammar(JsonSchema(schema=schema, param="schema"))
        for seed, temperature in enumerate((0.0, 1.0, 1.5)):
            sampling = SamplingParams(temperature=temperature, seed=seed)
            message = wire.Submit(
                f"{name} {seed}",
                prompt,
                MAX_TOKENS,
                tokenizer.end_token_ids,
                sampling,
                grammar=grammar,
                client=f"{name} {seed}",
            )
            messages.append(message)
            schemas[message.request_id] = schema
    collector = Collector()
    for message in messages:
        assert core.submit(API, message) is None
    while core.has_work:
        collector.take(core.step())
    num_completed = 0
    for request_id, end in collector.ends.items():
        assert isinstance(end, wire.Finished), end
        if end.finish_reason == "stop":
            output = json.loads(tokenizer.decode(collector.tokens[request_id]))
            jsonschema.validate(output, schemas[request_id], format_checker=jsonschema.FormatChecker())
            num_completed += 1
    assert num_completed > 0.8 * len(messages)
