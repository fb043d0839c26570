"""Messages between the API processes and the engine: token ids and small structs, never text, never arrays.

An API process connects a DEALER socket to the engine's ROUTER. Each frame is one msgpack-encoded message. Every
submitted request id ends in exactly one `Finished`, `Embedded` or `Failed`; if the engine dies, the client side makes
the `Failed` itself.
"""

from typing import Literal

import msgspec

from mlx_server.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]
Pooling = Literal["mean", "last", "cls"]  # the mean of all tokens' hidden states, the last token's, the first token's

MAX_FRAME_BYTES = 64 << 20


# --- API -> engine ---


class Hello(msgspec.Struct, tag=True, frozen=True):
    """First message of a connection; answered by `EngineInfo`."""


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Generate from a prompt. The API has checked it against `EngineInfo`."""

    request_id: str  # unique in the connection
    prompt_token_ids: list[int]  # not empty
    max_tokens: int  # >= 1, or 0 with prompt_logprobs; prompt + max_tokens <= context_length
    end_token_ids: list[int]  # generation stops at any of these; it is counted but not sent
    sampling: SamplingParams
    priority: int = 0  # lower is served first
    client: str = ""  # whose fair share it is
    cache_salt: str = ""  # namespace of the prefix cache
    deadline_s: float | None = None  # from its arrival in the engine
    prompt_logprobs: int | None = None  # scores the prompt; such a request does not read the prefix cache
    progress: bool = False  # send `Progress` after each prefill step
    grammar: str | None = None  # what the output must match, as JSON that llguidance reads


class Embed(msgspec.Struct, tag=True, frozen=True):
    """Compute a text's embedding: no token is generated, and no cached prompt is read."""

    request_id: str  # unique in the connection
    token_ids: list[int]  # not empty, at most context_length
    pooling: Pooling
    client: str = ""  # as in `Submit`
    deadline_s: float | None = None


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Stop a request, if it still runs. It ends without a further message."""

    request_id: str


class GetMetrics(msgspec.Struct, tag=True, frozen=True):
    """Answered by `Metrics`."""


ClientMessage = Hello | Submit | Embed | Cancel | GetMetrics


# --- engine -> API ---


class EngineInfo(msgspec.Struct, tag=True, frozen=True):
    """What the API must know of the loaded model."""

    context_length: int  # tokens, prompt and answer together
    vocab_size: int
    max_requests: int  # that can run and wait together
    limited_by_memory: bool  # the model could have more context than the KV cache holds


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural logarithms of probabilities at one position."""

    logprob: float  # of the token that is there
    top_ids: list[int]  # the likeliest tokens, best first
    top_logprobs: list[float]  # of top_ids


class Timings(msgspec.Struct, frozen=True):
    """Where a request's time in the engine went."""

    queue_s: float  # until its first tokens were scheduled
    prefill_s: float  # from there to its first output token
    decode_s: float  # from there to its last


class Progress(msgspec.Struct, tag=True, frozen=True):
    """How much of the prompt is computed."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int  # with the cached ones


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """New tokens of a request that goes on."""

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # on the first message, if asked for: of all but the first token


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The last tokens of a request. `num_output_tokens` counts all that were generated, the end token too."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_cached_tokens: int  # prompt tokens that were not computed because their KV was already there
    num_output_tokens: int
    stop_token_id: int | None = None  # the end token that was drawn
    logprobs: list[TokenLogprobs] | None = None  # as in `Tokens`
    prompt_logprobs: list[TokenLogprobs] | None = None
    timings: Timings | None = None


class Embedded(msgspec.Struct, tag=True, frozen=True):
    """The result of an `Embed`."""

    request_id: str
    vector: bytes  # float32 in the machine's byte order, of the model's hidden size, of length 1


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request ended without an answer. `code` is stable, `message` is for people."""

    request_id: str
    code: str
    message: str


RequestOutput = Tokens | Progress | Finished | Embedded | Failed


class StepOutput(msgspec.Struct, tag=True, frozen=True):
    """All that one engine step gave to the requests of one connection."""

    outputs: list[RequestOutput]


class Metrics(msgspec.Struct, tag=True, frozen=True):
    """The engine's counters."""

    text: str  # in Prometheus's format


EngineMessage = EngineInfo | StepOutput | Metrics
