"""What a chat and a raw completion have in common: the request's fields of generation, and how usage is told."""

import functools
import secrets
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import msgspec
from msgspec import Meta, Struct

from mlx_server.api.checks import refuse_nul
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.types import Choice, Done, Gbnf, Grammar, JsonSchema, Lark, PromptProgress, Regex, Usage
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import EngineInfo

_INT64_MAX = 2**63 - 1
_MAX_STOP_LENGTH = 4096
# llama.cpp's: what a repetition does not span
_DRY_BREAKERS = ["\n", ":", '"', "*"]
# Of fields that are those of SamplingParams
_SAME_NAMES = (
    *("temperature", "min_p", "min_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length"),
)
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

Natural = Annotated[int, Meta(ge=0, le=_INT64_MAX)]
Positive = Annotated[int, Meta(ge=1, le=_INT64_MAX)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Verbosity = Literal["low", "medium", "high"]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Window = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # accepted: padding that hides sizes, which this server does not send


class JsonSchemaFormat(Struct):
    schema: dict[str, Any] | bool | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None  # accepted: every schema is enforced


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | None = None  # of a json_object: llama.cpp's


class StructuredOutputs(Struct):
    """vLLM's; one of them."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None


class GenerationFields(Struct, kw_only=True):
    """Null means absent everywhere. After OpenAI's own come those that local servers have added.

    Accepted without effect, but of their types: user, metadata, store, service_tier, prompt_cache_*, safety_identifier,
    prediction, verbosity.
    """

    model: str
    max_tokens: Natural | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64_MAX - 1, le=_INT64_MAX)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0 keep all
    min_p: Probability | None = None
    typical_p: Probability | None = None
    top_n_sigma: Annotated[float, Meta(ge=-1, le=1e6)] | None = None  # -1 and 0 keep all
    xtc_probability: Probability | None = None
    xtc_threshold: Probability | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    repetition_context_size: _Window | None = None  # mlx-lm's: tokens that penalties look back; -1 and 0: all
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Meta(ge=1, le=100)] | None = None
    dry_allowed_length: _Count | None = None
    dry_penalty_last_n: _Window | None = None  # -1 and 0: all
    dry_sequence_breakers: Annotated[list[str], Meta(max_length=64)] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None  # llama.cpp's: GBNF
    json_schema: dict[str, Any] | None = None  # llama.cpp's
    post_sampling_probs: bool | None = None  # llama.cpp's: log-probabilities of what is drawn from
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None  # lower is served first
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    return_progress: bool | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    prediction: dict[str, Any] | None = None
    verbosity: Verbosity | None = None


# --- Usage ---


class PromptTokensDetails(Struct):
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(Struct):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class CompletionUsage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class AnswerTimings(Struct):
    """Where the time of an answer's first choice went; llama.cpp's names."""

    cache_n: int
    prompt_n: int  # prompt tokens that were computed
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class Progress(Struct):
    """llama.cpp's: how much of the prompt is computed."""

    total: int
    cache: int
    processed: int
    time_ms: float


def to_usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_output_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.num_cached_tokens),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=usage.num_reasoning_tokens),
    )


def to_timings(done: Done) -> AnswerTimings | msgspec.UnsetType:
    """UNSET if the engine told none."""
    usage, timings = done.usage, done.timings
    if timings is None:
        return msgspec.UNSET
    num_computed = usage.num_prompt_tokens - usage.num_cached_tokens
    num_predicted = usage.num_output_tokens
    return AnswerTimings(
        cache_n=usage.num_cached_tokens,
        prompt_n=num_computed,
        prompt_ms=1e3 * timings.prefill_s,
        prompt_per_second=_rate(num_computed, timings.prefill_s),
        predicted_n=num_predicted,
        predicted_ms=1e3 * timings.decode_s,
        predicted_per_second=_rate(max(num_predicted - 1, 0), timings.decode_s),  # the first one came with the prompt
    )


def to_progress(event: PromptProgress) -> Progress:
    return Progress(event.num_prompt_tokens, event.num_cached_tokens, event.num_computed_tokens, 1e3 * event.elapsed_s)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 2) if seconds > 0 else 0.0


# --- To the neutral request ---


def to_generation(body: GenerationFields, model: ServedModel, info: EngineInfo) -> dict[str, Any]:
    """The fields of `GenerationRequest` that mean the same in all requests, but for max_tokens."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("`stream_options` needs `stream`: true.", param="stream_options")
    return {
        "sampling": _to_sampling(body, model, info),
        "n": body.n or 1,
        "stop": _to_stop(body.stop),
        "stop_token_ids": body.stop_token_ids or [],
        "ignore_eos": body.ignore_eos is True,
        "grammar": _to_grammar(body),
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt or "",
        "progress": body.return_progress is True,
    }


def _to_sampling(body: GenerationFields, model: ServedModel, info: EngineInfo) -> SamplingParams:
    """The model's defaults with what the request says."""
    given: dict[str, Any] = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    renamed = {
        "top_k": body.top_k,
        "top_n_sigma": body.top_n_sigma,
        "penalty_window": body.repetition_context_size,
        "dry_window": body.dry_penalty_last_n,
    }
    given |= {name: max(value, 0) for name, value in renamed.items() if value is not None}
    for name in ("top_p", "typical_p"):
        if (share := getattr(body, name)) is not None:
            given[name] = share
            if share == 0:  # the smallest set of tokens that reaches no probability at all: the likeliest one
                given |= {name: 1.0, "top_k": 1}
    if body.logit_bias:
        given["logit_bias"] = _to_logit_bias(body.logit_bias, info.vocab_size)
    if body.dry_multiplier:
        breakers = _DRY_BREAKERS if body.dry_sequence_breakers is None else body.dry_sequence_breakers
        given["dry_sequence_breakers"] = _breaker_ids(
            cast("Hashable", model.tokenizer), info.vocab_size, tuple(breakers)
        )
    given["seed"] = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    given["processed_logprobs"] = body.post_sampling_probs is True
    return msgspec.structs.replace(model.default_sampling, **given)


def _to_logit_bias(bias: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    result = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            fault = f"`logit_bias`: {key[:20]!r} is not a token id of this model, which has 0 to {vocab_size - 1}."
            raise InvalidRequestError(fault, param="logit_bias")
        result[int(key)] = value
    return result


@functools.lru_cache(maxsize=16)
def _breaker_ids(tokenizer: Any, vocab_size: int, breakers: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens in whose text one of `breakers` is."""
    needles = [text.encode() for text in breakers if text]
    texts = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
    return tuple(i for i, text in enumerate(texts) if any(needle in text for needle in needles))


def _to_stop(stop: str | Sequence[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    for i, text in enumerate(stops):
        path = "stop" if isinstance(stop, str) else f"stop[{i}]"
        if not 1 <= len(text) <= _MAX_STOP_LENGTH:
            raise InvalidRequestError(f"`{path}` must have 1 to {_MAX_STOP_LENGTH} characters.", param=path)
        refuse_nul(text, path)
    return list(stops)


# --- Structured output ---


def _to_grammar(body: GenerationFields) -> Grammar | None:
    """The one grammar that the request asks for, under whatever name."""
    found = [*_from_response_format(body.response_format), *_from_vllm(body), *_from_llama_cpp(body)]
    if len(found) > 1:
        names = " and ".join(f"`{grammar.param}`" for grammar in found[:2])
        raise InvalidRequestError(f"{names} can't be combined: an answer has one grammar.", param=found[1].param)
    return found[0] if found else None


def _from_response_format(form: ResponseFormat | None) -> list[Grammar]:
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [JsonSchema(schema=form.schema or _ANY_OBJECT, param="response_format")]
    if form.json_schema is None or form.json_schema.schema is None:
        path = "response_format.json_schema.schema"
        raise InvalidRequestError(f"`{path}` is missing.", param=path)
    return [JsonSchema(schema=form.json_schema.schema, param="response_format.json_schema.schema")]


def _from_vllm(body: GenerationFields) -> list[Grammar]:
    found: list[Grammar] = []
    outputs = body.structured_outputs or StructuredOutputs()
    for path, schema in (("structured_outputs.json", outputs.json), ("guided_json", body.guided_json)):
        if schema is not None:
            found.append(JsonSchema(schema=_parsed(schema, path), param=path))
    if outputs.json_object:
        found.append(JsonSchema(schema=_ANY_OBJECT, param="structured_outputs.json_object"))
    for path, pattern in (("structured_outputs.regex", outputs.regex), ("guided_regex", body.guided_regex)):
        if pattern is not None:
            found.append(Regex(pattern=pattern, param=path))
    for path, source in (("structured_outputs.grammar", outputs.grammar), ("guided_grammar", body.guided_grammar)):
        if source is not None:
            is_gbnf = "::=" in source
            found.append(Gbnf(source=source, param=path) if is_gbnf else Lark(source=source, param=path))
    for path, choices in (("structured_outputs.choice", outputs.choice), ("guided_choice", body.guided_choice)):
        if choices is not None:
            found.append(Choice(choices=choices, param=path))
    return found


def _from_llama_cpp(body: GenerationFields) -> list[Grammar]:
    found: list[Grammar] = []
    if body.grammar:
        found.append(Gbnf(source=body.grammar, param="grammar"))
    if body.json_schema is not None:
        found.append(JsonSchema(schema=body.json_schema, param="json_schema"))
    return found


def _parsed(schema: dict[str, Any] | str, path: str) -> dict[str, Any]:
    """A schema that may come as text."""
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequestError(f"`{path}` is not a JSON object.", param=path) from None
