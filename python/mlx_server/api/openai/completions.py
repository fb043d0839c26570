"""POST /v1/completions: what follows raw prompts. OpenAI's types from and to the neutral request and events."""

import time
import uuid
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

import falcon
import msgspec
from msgspec import Meta, Struct

from mlx_server.api.body import decode_body
from mlx_server.api.checks import refuse_nul
from mlx_server.api.deps import Deps
from mlx_server.api.errors import ErrorReply
from mlx_server.api.openai.fields import (
    AnswerTimings,
    CompletionUsage,
    GenerationFields,
    Progress,
    TokenId,
    to_generation,
    to_progress,
    to_timings,
    to_usage,
)
from mlx_server.api.openapi import Operation
from mlx_server.api.respond import respond
from mlx_server.api.sse import frame
from mlx_server.chat import types as chat
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.types import Done, Event, PromptLogprobs, PromptProgress, TextDelta, TokenLogprobs, total_usage
from mlx_server.errors import InvalidRequestError
from mlx_server.wire import EngineInfo

_MAX_PROMPTS = 64
_MAX_CHOICES = 1024  # of all prompts together
_encode = msgspec.json.encode

_TokenIds = Annotated[list[TokenId], Meta(min_length=1)]


class CompletionBody(GenerationFields, kw_only=True):
    """The request body. `max_tokens` of 0 only echoes and scores the prompt."""

    # msgspec can't tell the types of lists apart: `_to_prompts` does.
    prompt: str | list[Any] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None


class CompletionLogprobs(Struct):
    """Lists of one length: an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None = None


class Completion(Struct, kw_only=True):
    """The whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: CompletionUsage | msgspec.UnsetType | None = msgspec.UNSET
    timings: AnswerTimings | msgspec.UnsetType = msgspec.UNSET
    prompt_progress: Progress | msgspec.UnsetType = msgspec.UNSET


class Completions:
    """The resource."""

    operations: ClassVar = {
        "POST": Operation(
            summary="What follows a text, or several", request=CompletionBody, answer=Completion, events=Completion
        )
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(CompletionBody)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        deps = self._deps
        body = decode_body(req, resp, self._decoder, strict=deps.strict)
        deps.check_model(body.model)
        request = to_completion_request(body, deps.model, deps.engine.info(), deps.completion_tokens)
        writer = CompletionWriter(body, request, deps.fingerprint)
        respond(req, resp, deps, request, writer if body.stream else None, writer.fold)


def to_completion_request(
    body: CompletionBody, model: ServedModel, info: EngineInfo, max_tokens: int
) -> chat.CompletionRequest:
    """The neutral request. InvalidRequestError for what the types alone can't tell.

    Args:
        max_tokens: where the request names none.
    """
    generation = to_generation(body, model, info)
    generation["n"] = best_of = _to_best_of(body)
    max_tokens = max_tokens if body.max_tokens is None else body.max_tokens
    echo = body.echo is True
    prompts = _to_prompts(body.prompt)
    if len(prompts) * best_of > _MAX_CHOICES:
        fault = f"`n` or `best_of`: {len(prompts)} prompts would have more than {_MAX_CHOICES} choices together."
        raise InvalidRequestError(fault, param="n" if best_of == body.n else "best_of")
    if max_tokens == 0 and not echo:
        fault = "`max_tokens` may be 0 only with `echo`, to score the prompt."
        raise InvalidRequestError(fault, param="max_tokens")
    # Without an answer there is no work but to score the prompt, asked for or not.
    scores_prompt = echo and (body.logprobs is not None or max_tokens == 0)
    if body.logprobs is not None or best_of > (body.n or 1):
        generation["sampling"] = msgspec.structs.replace(generation["sampling"], logprobs=body.logprobs or 0)
    return chat.CompletionRequest(
        **generation,
        max_tokens=max_tokens,
        prompts=prompts,
        suffix=body.suffix or None,
        echo=echo,
        prompt_logprobs=body.logprobs or 0 if scores_prompt else None,
    )


def _to_best_of(body: CompletionBody) -> int:
    """How many answers to choose the n likeliest from."""
    n = body.n or 1
    best_of = n if body.best_of is None else body.best_of
    if best_of < n:
        raise InvalidRequestError(f"`best_of` must be at least `n`, which is {n}.", param="best_of")
    if best_of > n and body.stream:
        raise InvalidRequestError("`best_of` larger than `n` can't be streamed.", param="best_of")
    return best_of


def _to_prompts(prompt: str | list[Any] | None) -> list[str | list[int]]:
    """A text, texts, token ids or lists of them. None is the text that is empty."""
    if prompt is None or isinstance(prompt, str):
        prompts: list[Any] = [prompt or ""]
    elif prompt and all(type(item) is int for item in prompt):
        prompts = [prompt]
    else:
        prompts = prompt
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise InvalidRequestError(f"`prompt` must hold 1 to {_MAX_PROMPTS} prompts.", param="prompt")
    try:
        checked = msgspec.convert(prompts, list[str | _TokenIds])
    except msgspec.ValidationError:
        fault = "`prompt` must be a text, token ids, or a list of either; token ids are integers from 0 on."
        raise InvalidRequestError(fault, param="prompt") from None
    for one in checked:
        if isinstance(one, str):
            refuse_nul(one, "prompt")
    return checked


class CompletionWriter:
    """One answer, from events: whole (`fold`), or as frames of server-sent events."""

    def __init__(self, body: CompletionBody, request: chat.CompletionRequest, fingerprint: str) -> None:
        self._n, self._best_of = body.n or 1, request.n
        num_choices = len(request.prompts) * request.n
        self._has_logprobs = body.logprobs is not None
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage is True
        self._echo = request.echo
        self._lengths = [0] * num_choices  # characters of each choice's text so far
        self._dones: list[Done] = []
        self._template = Completion(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=body.model,
            choices=[],
            system_fingerprint=fingerprint,
            usage=None if self._include_usage and body.stream else msgspec.UNSET,
        )

    def fold(self, events: Iterable[Event]) -> bytes:
        """The answer that is not streamed. Each choice's last event is `Done`."""
        pieces: list[list[CompletionChoice]] = [[] for _ in self._lengths]
        scores: list[list[float]] = [[] for _ in self._lengths]  # log-probabilities of each choice's tokens
        for event in events:
            if (piece := self._piece(event)) is not None:
                pieces[event.index].append(piece)
            if isinstance(event, TextDelta):
                scores[event.index] += [scored.token.logprob for scored in event.logprobs or []]
        first = self._dones[0]
        chosen = [pieces[k] for k in self._likeliest(scores)]
        return _encode(
            msgspec.structs.replace(
                self._template,
                choices=[_join(i, its_pieces) for i, its_pieces in enumerate(chosen)],
                usage=to_usage(total_usage(self._dones, self._best_of)),
                timings=to_timings(first),
            )
        )

    def _likeliest(self, scores: Sequence[Sequence[float]]) -> Iterable[int]:
        """The n of each prompt's choices whose tokens are the likeliest on average, best first."""
        for begin in range(0, len(scores), self._best_of):
            of_prompt = range(begin, begin + self._best_of)
            if self._best_of == self._n:
                yield from of_prompt
            else:
                best = sorted(of_prompt, key=lambda k: -sum(scores[k]) / max(len(scores[k]), 1))
                yield from best[: self._n]

    def start(self) -> bytes:
        return b""

    def events(self, events: Sequence[Event]) -> bytes:
        return b"".join(map(self._frame, events))

    def end(self) -> bytes:
        usage = b""
        if self._include_usage:
            total = to_usage(total_usage(self._dones, self._n))
            usage = frame(_encode(msgspec.structs.replace(self._template, usage=total)))
        return usage + frame(b"[DONE]")

    def keep_alive(self) -> bytes:
        return b": keep-alive\n\n"

    def error(self, reply: ErrorReply) -> bytes:
        return frame(reply.body())

    def _frame(self, event: Event) -> bytes:
        if isinstance(event, PromptProgress):
            progress = to_progress(event)
            choices = [CompletionChoice(index=event.index, text="")]
            return frame(_encode(msgspec.structs.replace(self._template, choices=choices, prompt_progress=progress)))
        piece = self._piece(event)
        if piece is None:
            return b""
        timings = to_timings(event) if isinstance(event, Done) else msgspec.UNSET
        return frame(_encode(msgspec.structs.replace(self._template, choices=[piece], timings=timings)))

    def _piece(self, event: Event) -> CompletionChoice | None:
        """The part of a choice that an event adds."""
        match event:
            case TextDelta():
                return self._text_piece(event.index, event.text, event.logprobs)
            case PromptLogprobs():
                texts = event.texts
                return self._text_piece(event.index, "".join(texts), event.logprobs, texts)
            case Done():
                self._dones.append(event)
                finish_reason: Literal["stop", "length"] = "length" if event.finish_reason == "length" else "stop"
                return CompletionChoice(index=event.index, text="", finish_reason=finish_reason)
        return None

    def _text_piece(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprobs | None] | None,
        texts: Sequence[str] | None = None,
    ) -> CompletionChoice:
        """`texts` of the tokens, if not all of them have log-probabilities."""
        offset = self._lengths[index]
        self._lengths[index] += len(text)
        choice = CompletionChoice(index=index, text=text)
        if self._has_logprobs:
            choice.logprobs = _to_logprobs(logprobs or [], texts, offset)
        return choice


def _to_logprobs(
    logprobs: Sequence[TokenLogprobs | None], texts: Sequence[str] | None, offset: int
) -> CompletionLogprobs:
    if texts is None:
        texts = [scored.token.text for scored in logprobs if scored is not None]
    ends = list(accumulate(map(len, texts), initial=offset))
    return CompletionLogprobs(
        list(texts),
        [None if scored is None else scored.token.logprob for scored in logprobs],
        [None if scored is None else _top(scored) for scored in logprobs],
        ends[:-1],
    )


def _top(scored: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens, and the one that is there. Of tokens with the same text the likelier one counts."""
    top: dict[str, float] = {}
    for token in (*scored.top, scored.token):
        top.setdefault(token.text or repr(token.utf8)[1:], token.logprob)
    return top


def _join(index: int, pieces: Sequence[CompletionChoice]) -> CompletionChoice:
    """One choice of its pieces; the last one tells why it ended."""
    parts = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    joined = None
    if parts:
        joined = CompletionLogprobs([], [], [], [])
        for part in parts:
            joined.tokens += part.tokens
            joined.token_logprobs += part.token_logprobs
            joined.top_logprobs += part.top_logprobs
            joined.text_offset += part.text_offset
    text = "".join(piece.text for piece in pieces)
    return CompletionChoice(index=index, text=text, logprobs=joined, finish_reason=pieces[-1].finish_reason)
