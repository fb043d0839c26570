"""POST /v1/chat/completions: translates between OpenAI's types and the neutral request and events."""

import secrets
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import falcon
import msgspec

from mlx_server.api.body import decode_body
from mlx_server.api.deps import Deps
from mlx_server.api.errors import ErrorReply
from mlx_server.api.openai.types import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    CompletionTokensDetails,
    CompletionUsage,
    Message,
    PromptTokensDetails,
    unsupported_fields,
)
from mlx_server.api.openapi import Operation
from mlx_server.api.respond import respond
from mlx_server.api.sse import frame
from mlx_server.chat.types import ChatMessage, ChatRequest, Done, Event, Scalar, TextDelta, Usage
from mlx_server.errors import InvalidRequestError
from mlx_server.sampling_params import SamplingParams

_MAX_STOP_LENGTH = 4096
_encode = msgspec.json.encode


class ChatCompletions:
    """The resource."""

    operations: ClassVar = {
        "POST": Operation(
            summary="The next turn of a conversation",
            request=ChatCompletionRequest,
            answer=ChatCompletion,
            events=ChatCompletionChunk,
        )
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(ChatCompletionRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        deps = self._deps
        body = decode_body(req, resp, self._decoder, strict=deps.strict)
        deps.check_model(body.model)
        request = to_chat_request(body, deps.model.default_sampling, deps.max_tokens)
        encoder = None
        if body.stream:
            include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            encoder = ChunkEncoder(body.model, deps.fingerprint, include_usage)
        respond(req, resp, deps, request, encoder, lambda events: _encode(fold(events, body.model, deps.fingerprint)))


def to_chat_request(body: ChatCompletionRequest, defaults: SamplingParams, max_tokens: int) -> ChatRequest:
    """The neutral request. InvalidRequestError for what the types alone can't tell."""
    for field in unsupported_fields(body):
        raise InvalidRequestError(f"`{field}` with this value is not supported yet.", param=field, code="unsupported")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("`stream_options` needs `stream`: true.", param="stream_options")
    return ChatRequest(
        messages=[_to_chat_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)],
        sampling=_to_sampling(body, defaults),
        max_tokens=body.max_completion_tokens or body.max_tokens or max_tokens,
        template_kwargs=_to_template_kwargs(body.chat_template_kwargs or {}),
        stop=_to_stop(body.stop),
    )


def _to_chat_message(message: Message, path: str) -> ChatMessage:
    for field in unsupported_fields(message):
        field_path = f"{path}.{field}"
        raise InvalidRequestError(f"`{field_path}` is not supported yet.", param=field_path, code="unsupported")
    if message.role == "tool" or message.role == "function":  # noqa: PLR1714 - mypy narrows only this form
        fault = f"`{path}.role`: messages of role {message.role} are not supported yet."
        raise InvalidRequestError(fault, param=f"{path}.role", code="unsupported")
    if message.content is None:
        raise InvalidRequestError(f"`{path}.content` is missing.", param=f"{path}.content")
    content = message.content if isinstance(message.content, str) else _to_text(message, f"{path}.content")
    _refuse_nul(content, f"{path}.content")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role, content=content, name=message.name
    )


def _to_text(message: Message, path: str) -> str:
    """Parts of a message as one text, a line each, as other servers join them."""
    assert isinstance(message.content, list)
    texts = []
    for i, part in enumerate(message.content):
        text = part.text if part.type == "text" else None
        if part.type == "refusal" and message.role == "assistant":
            text = part.refusal
        elif part.type != "text":
            fault = f"`{path}[{i}].type`: parts of type {part.type[:64]!r} are not supported; this model reads text."
            raise InvalidRequestError(fault, param=f"{path}[{i}].type", code="unsupported")
        if text is None:
            raise InvalidRequestError(f"`{path}[{i}].{part.type}` is missing.", param=f"{path}[{i}].{part.type}")
        texts.append(text)
    return "\n".join(texts)


def _to_sampling(body: ChatCompletionRequest, defaults: SamplingParams) -> SamplingParams:
    top_k = defaults.top_k if body.top_k is None else max(body.top_k, 0)
    top_p = defaults.top_p if body.top_p is None else body.top_p
    if top_p == 0:  # the smallest set of tokens that reaches no probability at all: the likeliest one
        top_p, top_k = 1.0, 1
    return SamplingParams(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        seed=secrets.randbits(64) if body.seed is None else body.seed % 2**64,
    )


def _to_template_kwargs(kwargs: Mapping[str, Scalar | None]) -> dict[str, Scalar]:
    """The variables that are given; null is as if it were absent, as everywhere."""
    for name, value in kwargs.items():
        if isinstance(value, str):
            _refuse_nul(value, f"chat_template_kwargs.{name[:64]}")
    return {name: value for name, value in kwargs.items() if value is not None}


def _to_stop(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    for i, text in enumerate(stops):
        path = "stop" if isinstance(stop, str) else f"stop[{i}]"
        if not 1 <= len(text) <= _MAX_STOP_LENGTH:
            raise InvalidRequestError(f"`{path}` must have 1 to {_MAX_STOP_LENGTH} characters.", param=path)
        _refuse_nul(text, path)
    return stops


def _refuse_nul(text: str, path: str) -> None:
    if "\0" in text:
        raise InvalidRequestError(f"`{path}` holds a NUL character.", param=path)


def fold(events: Iterable[Event], model: str, fingerprint: str) -> ChatCompletion:
    """The answer that is not streamed. The last event is `Done`."""
    texts: list[str] = []
    done: Done | None = None
    for event in events:
        match event:
            case TextDelta():
                texts.append(event.text)
            case Done():
                done = event
    assert done is not None
    choice = Choice(message=AnswerMessage(content="".join(texts)), finish_reason=done.finish_reason)
    return ChatCompletion(
        id=_new_id(),
        created=int(time.time()),
        model=model,
        choices=[choice],
        usage=_to_usage(done.usage),
        system_fingerprint=fingerprint,
    )


class ChunkEncoder:
    """The streamed answer, as frames of server-sent events."""

    def __init__(self, model: str, fingerprint: str, include_usage: bool) -> None:
        self._usage: CompletionUsage | None = None
        self._include_usage = include_usage
        # With usage asked for, it is null on all chunks but the last.
        self._template = ChatCompletionChunk(
            id=_new_id(),
            created=int(time.time()),
            model=model,
            choices=[],
            system_fingerprint=fingerprint,
            usage=None if include_usage else msgspec.UNSET,
        )

    def start(self) -> bytes:
        return self._chunk(ChunkChoice(delta={"role": "assistant", "content": "", "refusal": None}))

    def events(self, events: Sequence[Event]) -> bytes:
        return b"".join(map(self._event, events))

    def end(self) -> bytes:
        usage = b""
        if self._include_usage:
            usage = frame(_encode(msgspec.structs.replace(self._template, usage=self._usage)))
        return usage + frame(b"[DONE]")

    def keep_alive(self) -> bytes:
        return b": keep-alive\n\n"

    def error(self, reply: ErrorReply) -> bytes:
        return frame(reply.body())

    def _event(self, event: Event) -> bytes:
        match event:
            case TextDelta():
                return self._chunk(ChunkChoice(delta={"content": event.text}))
            case Done():
                self._usage = _to_usage(event.usage)
                return self._chunk(ChunkChoice(delta={}, finish_reason=event.finish_reason))
        raise NotImplementedError(event)

    def _chunk(self, choice: ChunkChoice) -> bytes:
        return frame(_encode(msgspec.structs.replace(self._template, choices=[choice])))


def _to_usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_output_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.num_cached_tokens),
        completion_tokens_details=CompletionTokensDetails(),
    )


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"
