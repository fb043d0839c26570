"""The one neutral request and the one neutral stream of events that every API protocol translates to and from.

A protocol is two pure functions: its body to a `ChatRequest` or `CompletionRequest`, and events to its chunks. An
answer that is not streamed is a fold over the same events.
"""

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import Timings

Scalar = bool | int | float | str


# --- Requests ---


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the assistant made in an earlier turn."""

    id: str
    name: str
    arguments: str  # JSON text, as the model wrote it


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a conversation. What a template does not know of (developer, tools) is rendered as it knows it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    reasoning_content: str | None = None  # of the assistant; most templates leave that of earlier turns out
    tool_calls: list[ToolCall] = []  # of the assistant
    tool_call_id: str | None = None  # of a tool's result: the call that it answers
    name: str | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = {}  # JSON Schema of the arguments, an object; empty: any object
    strict: bool = False  # the arguments of its calls match `parameters`, by grammar


class ToolChoice(msgspec.Struct, frozen=True):
    """Which tools may be called. A named tool is `ToolChoice("required", ["its_name"])`."""

    mode: Literal["auto", "none", "required"] = "auto"  # required: at least one call, by grammar
    allowed: list[str] = []  # names of the tools that may be called; empty: all


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    """JSON that matches a schema; `{"type": "object"}` for any object."""

    schema: dict[str, Any] | bool
    param: str  # the request's field that it comes from, for errors


class Regex(msgspec.Struct, frozen=True, kw_only=True):
    """The whole text matches it. Rust's syntax, without look-around or references."""

    pattern: str
    param: str


class Lark(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar in llguidance's dialect of Lark."""

    source: str
    param: str


class Gbnf(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar in llama.cpp's notation."""

    source: str
    param: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of these texts."""

    choices: list[str]  # not empty
    param: str


Grammar = JsonSchema | Regex | Lark | Gbnf | Choice

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """How much a reasoning model thinks before it answers; other models have nothing to turn on or off."""

    enabled: bool | None = None  # None: as the model's template does by itself
    effort: Effort | None = None  # for templates that read it, else a share of max_tokens; "none" turns reasoning off
    budget_tokens: int | None = None  # >= 0; the block of thoughts is closed after so many tokens


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate, whatever the prompt: checked, with every default filled in."""

    sampling: SamplingParams  # with n > 1, choice k has the seed `seed + k`
    max_tokens: int  # more than the context leaves room for is clipped
    n: int = 1  # choices for each prompt
    stop: list[str] = []  # generation ends before the first of these; none is empty
    stop_token_ids: list[int] = []  # generation ends at these too
    ignore_eos: bool = False  # the model's own end tokens don't end the answer
    grammar: Grammar | None = None  # what the answer's text must match
    priority: int = 0  # lower is served first
    client: str = ""  # whose fair share of the engine it takes
    cache_salt: str = ""  # only requests with the same one share cached prompts
    progress: bool = False  # `PromptProgress` events while the prompt is computed


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """The next turn of a conversation. max_tokens >= 1."""

    messages: list[ChatMessage]
    tools: list[Tool] = []
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True  # False: at most one call
    reasoning: Reasoning = Reasoning()
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the last message, of the assistant, is unfinished: the answer goes on there
    template_kwargs: dict[str, Scalar] = {}  # further variables of the chat template


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """What follows raw prompts. Choice k of prompt p has the index `p * n + k`.

    max_tokens may be 0 if prompts are scored.
    """

    prompts: list[str | list[int]]  # not empty; a text gets the model's BOS, token ids are used as they are
    suffix: str | None = None  # what comes after the answer, for models that can fill in the middle
    echo: bool = False  # each choice begins with its prompt's text
    prompt_logprobs: int | None = None  # score the prompt: of its tokens (0) and that many alternatives


# --- Events ---


class ScoredToken(msgspec.Struct, frozen=True):
    """A token, its part of the text and its log-probability."""

    text: str  # where a character has several tokens, the last has all of it and the others have none
    utf8: bytes  # those of the token itself
    logprob: float  # finite, natural logarithm


class TokenLogprobs(msgspec.Struct, frozen=True):
    """The token that was chosen, and the likeliest ones at its place, best first."""

    token: ScoredToken
    top: list[ScoredToken]


class TextDelta(msgspec.Struct, frozen=True):
    """The next piece of the answer: whole characters, never part of a stop string, never empty."""

    text: str
    logprobs: list[TokenLogprobs] | None = None  # of the text's tokens, if asked for; their texts joined are the text
    index: int = 0  # of the choice, as in all events


class ReasoningDelta(msgspec.Struct, frozen=True):
    """The next piece of the model's thoughts, without their tags, never empty."""

    text: str
    index: int = 0


class ToolCallStart(msgspec.Struct, frozen=True):
    """A call begins; its arguments follow. Calls of a choice come one after the other."""

    call_index: int  # 0, 1, … in each choice
    id: str  # call_…, unique
    name: str
    index: int = 0


class ToolCallDelta(msgspec.Struct, frozen=True):
    """The next piece of a call's arguments. All pieces together are the JSON text of an object.

    They are only the beginning of one where max_tokens, or the model's own fault, cut it: see `whole_object`.
    """

    call_index: int
    arguments: str  # never empty
    index: int = 0


class PromptProgress(msgspec.Struct, frozen=True):
    """How much of the prompt is computed. Only if asked for, before the choice's first delta."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int  # with the cached ones
    elapsed_s: float  # since the request came
    index: int = 0


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Scores of the prompt's tokens, if asked for, before the choice's first delta."""

    logprobs: list[TokenLogprobs | None]  # None for the first token, which nothing predicts
    texts: list[str]  # of the prompt's tokens; joined they are its text
    index: int = 0


class Usage(msgspec.Struct, frozen=True):
    num_prompt_tokens: int
    num_output_tokens: int  # with the end token, which is not part of the text
    num_cached_tokens: int = 0  # prompt tokens that were not computed again
    num_reasoning_tokens: int = 0  # of the output: thoughts and their tags


FinishReason = Literal["stop", "length", "tool_calls"]


class Done(msgspec.Struct, frozen=True):
    """The last event of a choice."""

    finish_reason: FinishReason
    usage: Usage  # of this choice; see `total_usage`
    stop_sequence: str | None = None  # the stop string that ended it
    timings: Timings | None = None
    index: int = 0


Event = TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | PromptProgress | PromptLogprobs | Done


def total_usage(dones: Iterable[Done], n: int) -> Usage:
    """Usage of a whole request with n choices for each prompt: a prompt counts once."""
    choices = [(done.index, done.usage) for done in dones]
    first = [usage for index, usage in choices if index % n == 0]
    return Usage(
        num_prompt_tokens=sum(usage.num_prompt_tokens for usage in first),
        num_output_tokens=sum(usage.num_output_tokens for _, usage in choices),
        num_cached_tokens=sum(usage.num_cached_tokens for usage in first),
        num_reasoning_tokens=sum(usage.num_reasoning_tokens for _, usage in choices),
    )
