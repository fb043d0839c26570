"""Messages between the API processes and the engine: token ids and small structs, never text, never arrays.

An API process connects a DEALER socket to the engine's ROUTER. Each frame is one msgpack-encoded message. Every
submitted request id ends in exactly one `Finished` or `Failed`; if the engine dies, the client side makes the `Failed`
itself.
"""

from typing import Literal

import msgspec

from mlx_server.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]

MAX_FRAME_BYTES = 64 << 20


# --- API -> engine ---


class Hello(msgspec.Struct, tag=True, frozen=True):
    """First message of a connection; answered by `EngineInfo`."""


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Generate from a prompt. The API has checked it against `EngineInfo`."""

    request_id: str  # unique in the connection
    prompt_token_ids: list[int]  # not empty
    max_tokens: int  # >= 1; prompt + max_tokens <= context_length
    end_token_ids: list[int]  # generation stops at any of these; it is counted but not sent
    sampling: SamplingParams


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """Stop a request, if it still runs. It ends without a further message."""

    request_id: str


ClientMessage = Hello | Submit | Cancel


# --- engine -> API ---


class EngineInfo(msgspec.Struct, tag=True, frozen=True):
    """What the API must know of the loaded model."""

    context_length: int  # tokens, prompt and answer together
    vocab_size: int


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """New tokens of a request that goes on."""

    request_id: str
    token_ids: list[int]


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The last tokens of a request. `num_output_tokens` counts all that were generated, the end token too."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_cached_tokens: int  # prompt tokens that were not computed because their KV was already there
    num_output_tokens: int


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The request ended without an answer. `code` is stable, `message` is for people."""

    request_id: str
    code: str
    message: str


RequestOutput = Tokens | Finished | Failed


class StepOutput(msgspec.Struct, tag=True, frozen=True):
    """All that one engine step gave to the requests of one connection."""

    outputs: list[RequestOutput]


EngineMessage = EngineInfo | StepOutput
