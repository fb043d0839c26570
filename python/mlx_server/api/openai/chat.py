"""POST /v1/chat/completions: OpenAI's types from and to the neutral request and events."""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import falcon
import msgspec

from mlx_server.api.body import decode_body
from mlx_server.api.deps import Deps
from mlx_server.api.errors import ErrorReply
from mlx_server.api.openai.chat_request import to_chat_request
from mlx_server.api.openai.fields import to_progress, to_timings, to_usage
from mlx_server.api.openai.types import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    Choice,
    ChunkChoice,
    Function,
    Logprobs,
    ScoredToken,
    TokenLogprob,
    ToolCall,
)
from mlx_server.api.openapi import Operation
from mlx_server.api.respond import respond
from mlx_server.api.sse import frame
from mlx_server.chat import types as chat
from mlx_server.chat.types import (
    Done,
    Event,
    PromptProgress,
    ReasoningDelta,
    TextDelta,
    TokenLogprobs,
    ToolCallDelta,
    ToolCallStart,
    total_usage,
)

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
        request = to_chat_request(body, deps.model, deps.engine.info(), deps.max_tokens)
        writer = ChatWriter(body, deps.fingerprint)
        respond(req, resp, deps, request, writer if body.stream else None, writer.fold)


class ChatWriter:
    """One answer, from events: whole (`fold`), or as frames of server-sent events."""

    def __init__(self, body: ChatCompletionRequest, fingerprint: str) -> None:
        self._n = body.n or 1
        self._has_logprobs = body.logprobs is True
        self._include_usage = body.stream_options is not None and body.stream_options.include_usage is True
        self._dones: list[Done] = []
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._fingerprint = body.model, fingerprint
        # With usage asked for, it is null on all chunks but the last.
        self._template = ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[],
            system_fingerprint=fingerprint,
            usage=None if self._include_usage else msgspec.UNSET,
        )

    def fold(self, events: Iterable[Event]) -> bytes:
        """The answer that is not streamed. Each choice's last event is `Done`."""
        by_choice: list[list[Event]] = [[] for _ in range(self._n)]
        for event in events:
            by_choice[event.index].append(event)
        choices = [self._choice(i, its_events) for i, its_events in enumerate(by_choice)]
        first = self._dones[0]
        return _encode(
            ChatCompletion(
                id=self._id,
                created=self._created,
                model=self._model,
                choices=choices,
                usage=to_usage(total_usage(self._dones, self._n)),
                system_fingerprint=self._fingerprint,
                timings=to_timings(first),
            )
        )

    def _choice(self, index: int, events: Iterable[Event]) -> Choice:
        text, thoughts = "", ""
        calls: list[ToolCall] = []
        logprobs: list[TokenLogprob] = []
        finish_reason: chat.FinishReason = "stop"
        for event in events:
            match event:
                case TextDelta():
                    text += event.text
                    logprobs += to_logprobs(event.logprobs or [])
                case ReasoningDelta():
                    thoughts += event.text
                case ToolCallStart():
                    calls.append(ToolCall(id=event.id, function=Function(event.name, "")))
                case ToolCallDelta():
                    calls[-1].function.arguments += event.arguments
                case Done():
                    finish_reason = event.finish_reason
                    self._dones.append(event)
        message = AnswerMessage(
            content=text if text or not calls else None,
            reasoning_content=thoughts or msgspec.UNSET,
            tool_calls=calls or msgspec.UNSET,
        )
        return Choice(
            index=index,
            message=message,
            logprobs=Logprobs(logprobs) if self._has_logprobs else None,
            finish_reason=finish_reason,
        )

    # --- Frames ---

    def start(self) -> bytes:
        roles = {"role": "assistant", "content": "", "refusal": None}
        return b"".join([self._chunk(ChunkChoice(index=i, delta=roles)) for i in range(self._n)])

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
        delta: dict[str, Any] = {}
        match event:
            case TextDelta():
                logprobs = Logprobs(to_logprobs(event.logprobs or [])) if self._has_logprobs else None
                choice = ChunkChoice(index=event.index, delta={"content": event.text}, logprobs=logprobs)
                return self._chunk(choice)
            case ReasoningDelta():
                delta = {"reasoning_content": event.text}
            case ToolCallStart():
                function = {"name": event.name, "arguments": ""}
                head = {"index": event.call_index, "id": event.id, "type": "function", "function": function}
                delta = {"tool_calls": [head]}
            case ToolCallDelta():
                delta = {"tool_calls": [{"index": event.call_index, "function": {"arguments": event.arguments}}]}
            case PromptProgress():
                return self._progress(event)
            case Done():
                return self._finish(event)
        return self._chunk(ChunkChoice(index=event.index, delta=delta))

    def _progress(self, event: PromptProgress) -> bytes:
        progress = to_progress(event)
        choices = [ChunkChoice(index=event.index, delta={})]
        return frame(_encode(msgspec.structs.replace(self._template, choices=choices, prompt_progress=progress)))

    def _finish(self, done: Done) -> bytes:
        self._dones.append(done)
        choices = [ChunkChoice(index=done.index, delta={}, finish_reason=done.finish_reason)]
        timings = to_timings(done)
        return frame(_encode(msgspec.structs.replace(self._template, choices=choices, timings=timings)))

    def _chunk(self, choice: ChunkChoice) -> bytes:
        return frame(_encode(msgspec.structs.replace(self._template, choices=[choice])))


def to_logprobs(logprobs: Iterable[TokenLogprobs]) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            scored.token.text,
            scored.token.logprob,
            list(scored.token.utf8),
            [ScoredToken(top.text, top.logprob, list(top.utf8)) for top in scored.top],
        )
        for scored in logprobs
    ]
