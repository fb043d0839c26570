"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's types from and to the neutral request and events."""

import uuid
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import falcon
import msgspec

from mlx_server.api.anthropic.request import to_chat_request, to_prompt
from mlx_server.api.anthropic.types import (
    CountTokensRequest,
    Message,
    MessagesRequest,
    OutputTokensDetails,
    TokenCount,
    Usage,
)
from mlx_server.api.body import decode_body
from mlx_server.api.deps import Deps
from mlx_server.api.errors import ErrorReply
from mlx_server.api.openapi import Operation
from mlx_server.api.respond import respond
from mlx_server.chat import types as chat
from mlx_server.chat.incremental import whole_object
from mlx_server.chat.plan import count_prompt_tokens
from mlx_server.chat.types import Done, Event, PromptProgress, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart

_encode = msgspec.json.encode
# Clients send thoughts back with it; nothing here has to be proved.
_SIGNATURE = "unsigned"


class Messages:
    """The resource."""

    operations: ClassVar = {
        "POST": Operation(
            summary="The next turn of a conversation, as Anthropic has it",
            request=MessagesRequest,
            answer=Message,
            events=dict[str, Any],
        )
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(MessagesRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        deps = self._deps
        body = decode_body(req, resp, self._decoder, strict=deps.strict)
        deps.check_model(body.model)
        request = to_chat_request(body, deps.model.default_sampling)
        writer = MessageWriter(body, resp.get_header("request-id") or "")
        respond(req, resp, deps, request, writer if body.stream else None, writer.fold)


class CountTokens:
    """How many tokens the prompt of a message has, with what the model's template adds.

    More than the context takes are counted too: clients ask in order to know how much they must leave out.
    """

    operations: ClassVar = {
        "POST": Operation(
            summary="The number of tokens of a message's prompt", request=CountTokensRequest, answer=TokenCount
        )
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(CountTokensRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = decode_body(req, resp, self._decoder, strict=self._deps.strict)
        self._deps.check_model(body.model)
        count = count_prompt_tokens(self._deps.model, to_prompt(body), self._deps.engine.info())
        resp.content_type = "application/json"
        resp.data = _encode(TokenCount(count))


class MessageWriter:
    """One answer, from events: whole (`fold`), or as frames of server-sent events, one content block open at a time."""

    def __init__(self, body: MessagesRequest, request_id: str) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = body.model
        self._max_tokens = body.max_tokens
        self._shows_thoughts = body.thinking is None or body.thinking.display != "omitted"
        self._request_id = request_id
        self._started = False
        self._num_blocks = 0
        self._open: str | None = None  # type of the content block that is open

    def fold(self, events: Iterable[Event]) -> bytes:
        """The answer that is not streamed. The last event is `Done`."""
        blocks: list[dict[str, Any]] = []
        done: Done | None = None
        for event in self._visible(events):
            if (start := self._new_block(event)) is not None:
                self._open = start["type"]
                blocks.append(start)
            match event:
                case TextDelta():
                    blocks[-1]["text"] += event.text
                case ReasoningDelta():
                    blocks[-1]["thinking"] += event.text
                    blocks[-1]["signature"] = _SIGNATURE
                case ToolCallStart():
                    blocks[-1]["input"] = ""
                case ToolCallDelta():
                    blocks[-1]["input"] += event.arguments
                case Done():
                    done = event
        assert done is not None
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = msgspec.Raw(whole_object(block["input"]).encode())
        stop_reason, stop_sequence = self._stop_reason(done)
        return _encode(
            Message(
                id=self._id,
                model=self._model,
                content=blocks,
                stop_reason=stop_reason,
                stop_sequence=stop_sequence,
                usage=self._usage(done.usage),
            )
        )

    # --- Frames ---

    def start(self) -> bytes:
        return b""  # the first event tells what of the prompt came from the cache

    def events(self, events: Sequence[Event]) -> bytes:
        return b"".join([self._frames(event) for event in self._visible(events)])

    def end(self) -> bytes:
        return _frame({"type": "message_stop"})

    def keep_alive(self) -> bytes:
        return _frame({"type": "ping"})

    def error(self, reply: ErrorReply) -> bytes:
        return b"event: error\ndata: " + reply.for_anthropic().body(self._request_id) + b"\n\n"

    def _frames(self, event: Event) -> bytes:
        frames = b""
        if not self._started:
            self._started = True
            frames += self._message_start(event)
        if (block := self._new_block(event)) is not None:
            frames += self._close_block()
            self._open = block["type"]
            frames += _frame({"type": "content_block_start", "index": self._num_blocks, "content_block": block})
            self._num_blocks += 1
        match event:
            case TextDelta():
                frames += self._delta({"type": "text_delta", "text": event.text})
            case ReasoningDelta() if event.text:
                frames += self._delta({"type": "thinking_delta", "thinking": event.text})
            case ToolCallDelta():
                frames += self._delta({"type": "input_json_delta", "partial_json": event.arguments})
            case Done():
                frames += self._close_block() + self._message_delta(event)
        return frames

    def _message_start(self, event: Event) -> bytes:
        usage = chat.Usage(0, 0)
        if isinstance(event, PromptProgress):
            usage = chat.Usage(event.num_prompt_tokens, 0, event.num_cached_tokens)
        elif isinstance(event, Done):
            usage = msgspec.structs.replace(event.usage, num_output_tokens=0, num_reasoning_tokens=0)
        message = Message(
            id=self._id, model=self._model, content=[], stop_reason=None, stop_sequence=None, usage=self._usage(usage)
        )
        return _frame({"type": "message_start", "message": message})

    def _message_delta(self, done: Done) -> bytes:
        stop_reason, stop_sequence = self._stop_reason(done)
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return _frame({"type": "message_delta", "delta": delta, "usage": self._usage(done.usage)})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _frame({"type": "content_block_delta", "index": self._num_blocks - 1, "delta": delta})

    def _close_block(self) -> bytes:
        frames = b""
        if self._open == "thinking":
            frames = self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        if self._open is not None:
            frames += _frame({"type": "content_block_stop", "index": self._num_blocks - 1})
        self._open = None
        return frames

    # --- Both ---

    def _visible(self, events: Iterable[Event]) -> Iterable[Event]:
        """What the client is to see: no answer if it only fills the cache, thoughts without text if it wants none."""
        for event in events:
            match event:
                case ReasoningDelta() if not self._shows_thoughts:
                    yield ReasoningDelta("")
                case TextDelta() | ReasoningDelta() | ToolCallStart() | ToolCallDelta() if self._max_tokens == 0:
                    pass
                case _:
                    yield event

    def _new_block(self, event: Event) -> dict[str, Any] | None:
        """The content block that begins with `event`, unless it belongs to the open one."""
        match event:
            case TextDelta() if self._open != "text":
                return {"type": "text", "text": ""}
            case ReasoningDelta() if self._open != "thinking":
                return {"type": "thinking", "thinking": "", "signature": ""}
            case ToolCallStart():
                tool_id = "toolu_" + event.id.removeprefix("call_")
                return {"type": "tool_use", "id": tool_id, "name": event.name, "input": {}}
        return None

    def _stop_reason(self, done: Done) -> tuple[str, str | None]:
        if done.stop_sequence is not None:
            return "stop_sequence", done.stop_sequence
        if done.finish_reason == "length" and 0 < done.usage.num_output_tokens < self._max_tokens:
            return "model_context_window_exceeded", None
        return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[done.finish_reason], None

    def _usage(self, usage: chat.Usage) -> Usage:
        return Usage(
            input_tokens=usage.num_prompt_tokens - usage.num_cached_tokens,
            cache_read_input_tokens=usage.num_cached_tokens,
            output_tokens=usage.num_output_tokens if self._max_tokens else 0,
            output_tokens_details=OutputTokensDetails(usage.num_reasoning_tokens),
        )


def _frame(event: dict[str, Any]) -> bytes:
    kind: str = event["type"]
    return b"event: " + kind.encode() + b"\ndata: " + _encode(event) + b"\n\n"
