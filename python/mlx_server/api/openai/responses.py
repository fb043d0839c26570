"""POST /v1/responses, GET and DELETE /v1/responses/{id}: OpenAI's types from and to the neutral request and events."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import falcon
import msgspec

from mlx_server.api.body import decode_body, decode_query, name_ignored
from mlx_server.api.deps import Deps
from mlx_server.api.errors import ErrorReply, HttpError
from mlx_server.api.openai import responses_types as wire
from mlx_server.api.openai.chat import to_logprobs
from mlx_server.api.openai.responses_request import ignored_tools, to_chat_request, to_items
from mlx_server.api.openai.responses_store import StoredResponse
from mlx_server.api.openai.types import TokenLogprob
from mlx_server.api.openapi import Operation
from mlx_server.api.respond import respond
from mlx_server.chat.types import (
    ChatRequest,
    Done,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStart,
    Usage,
)
from mlx_server.errors import InvalidRequestError

_encode = msgspec.json.encode


class Responses:
    """The resource."""

    operations: ClassVar = {
        "POST": Operation(
            summary="The next turn of a conversation, as items",
            request=wire.ResponsesRequest,
            answer=wire.Response,
            events=dict[str, Any],
        )
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(wire.ResponsesRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        deps = self._deps
        body = decode_body(req, resp, self._decoder, strict=deps.strict)
        name_ignored(resp, ignored_tools(body), strict=deps.strict)
        deps.check_model(body.model)
        items = to_items(body, deps.responses)
        request = to_chat_request(body, items, deps.model, deps.engine.info(), deps.max_tokens)
        writer = ResponseWriter(new_response(body, request), lambda response: self._keep(response, items))
        try:
            respond(req, resp, deps, request, writer if body.stream else None, writer.fold)
        except InvalidRequestError as error:
            if error.param == "messages":  # what makes the prompt knows one name for the conversation
                error.param = "input"
            raise

    def _keep(self, response: wire.Response, items: Sequence[wire.InputItem]) -> None:
        if self._deps.responses is None or not response.store:
            return
        output = msgspec.json.decode(_encode(response.output), type=list[wire.InputItem])
        self._deps.responses.put(response.id, StoredResponse(msgspec.Raw(_encode(response)), [*items, *output]))


class ResponseById:
    """A response that is kept."""

    operations: ClassVar = {
        "GET": Operation(summary="A response that is kept", query=wire.ResponseQuery, answer=wire.Response),
        "DELETE": Operation(summary="Forget a response", answer=wire.DeletedResponse),
    }

    def __init__(self, deps: Deps) -> None:
        self._store = deps.responses

    def on_get(self, req: falcon.Request, resp: falcon.Response, response_id: str) -> None:
        if decode_query(req, wire.ResponseQuery).stream:
            raise InvalidRequestError("`stream`: kept responses are not streamed.", param="stream", code="unsupported")
        stored = self._store.get(response_id) if self._store is not None else None
        if stored is None:
            raise _not_found(response_id)
        resp.content_type = "application/json"
        resp.data = bytes(stored.response)

    on_head = on_get

    def on_delete(self, req: falcon.Request, resp: falcon.Response, response_id: str) -> None:
        if self._store is None or not self._store.delete(response_id):
            raise _not_found(response_id)
        resp.content_type = "application/json"
        resp.data = _encode(wire.DeletedResponse(id=response_id))


def _not_found(response_id: str) -> HttpError:
    return HttpError(404, "response_not_found", f"There is no response {response_id[:64]!r}.")


def new_response(body: wire.ResponsesRequest, request: ChatRequest) -> wire.Response:
    """The answer before its first token: with what the request's fields became."""
    form = body.text.format if body.text is not None else None
    sampling = request.sampling
    return wire.Response(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=body.model,
        parallel_tool_calls=request.parallel_tool_calls,
        previous_response_id=body.previous_response_id,
        reasoning=wire.EffectiveReasoning(request.reasoning.effort),
        store=body.store is not False,
        temperature=sampling.temperature,
        text=wire.TextConfig(form or wire.TextFormat("text")),
        tool_choice=body.tool_choice or "auto",
        tools=[
            wire.FunctionTool(
                name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
            )
            for tool in request.tools
        ],
        top_logprobs=sampling.logprobs or 0,
        top_p=sampling.top_p if body.top_p is None else body.top_p,
        metadata=body.metadata or {},
    )


class ResponseWriter:
    """One answer, from events: whole (`fold`), or as frames of server-sent events, one item open at a time."""

    def __init__(self, response: wire.Response, keep: Callable[[wire.Response], None]) -> None:
        """`keep` gets the answer when it is whole, before the client does."""
        self._response = response
        self._keep = keep
        self._item: wire.OutputItem | None = None  # the last one of the output, while it is open
        self._pieces: list[str] = []  # of the open item's text
        self._logprobs: list[TokenLogprob] = []
        self._num_events = 0

    def fold(self, events: Iterable[Event]) -> bytes:
        """The answer that is not streamed. The last event is `Done`."""
        for event in events:
            for _ in self._advance(event):
                pass
        return _encode(self._response)

    # --- Frames ---

    def start(self) -> bytes:
        return self._frame(self._whole("response.created")) + self._frame(self._whole("response.in_progress"))

    def events(self, events: Sequence[Event]) -> bytes:
        return b"".join([self._frame(told) for event in events for told in self._advance(event)])

    def end(self) -> bytes:
        return b""

    def keep_alive(self) -> bytes:
        return b": keep-alive\n\n"

    def error(self, reply: ErrorReply) -> bytes:
        """What clients look for differs: some for the event of the error, some for the failed response."""
        if self._item is not None:
            self._response.output.pop()
        self._response.status = "failed"
        self._response.error = wire.ResponseError("server_error", reply.message)
        error = {"type": "error", "code": reply.code, "message": reply.message, "param": reply.param}
        return self._frame(error) + self._frame(self._whole("response.failed"))

    def _frame(self, told: dict[str, Any]) -> bytes:
        told["sequence_number"] = self._num_events
        self._num_events += 1
        kind: str = told["type"]
        return b"event: " + kind.encode() + b"\ndata: " + _encode(told) + b"\n\n"

    # --- Both: each event changes the response, and is told in events of the API ---

    def _advance(self, event: Event) -> Iterator[dict[str, Any]]:
        """The API's events; each is to be encoded before the next one is asked for."""
        match event:
            case TextDelta():
                if not isinstance(self._item, wire.OutputMessage):
                    yield from self._begin(wire.OutputMessage(id=self._new_id("msg")), wire.OutputText(""))
                self._pieces.append(event.text)
                logprobs = to_logprobs(event.logprobs or [])
                self._logprobs += logprobs
                yield self._of_part("response.output_text.delta", delta=event.text, logprobs=logprobs)
            case ReasoningDelta():
                if not isinstance(self._item, wire.ReasoningItem):
                    yield from self._begin(wire.ReasoningItem(id=self._new_id("rs")), wire.ReasoningText(""))
                self._pieces.append(event.text)
                yield self._of_part("response.reasoning_text.delta", delta=event.text)
            case ToolCallStart():
                call = wire.FunctionCall(id=self._new_id("fc"), call_id=event.id, name=event.name)
                yield from self._begin(call)
            case ToolCallDelta():
                self._pieces.append(event.arguments)
                yield self._of_item("response.function_call_arguments.delta", delta=event.arguments)
            case Done():
                yield from self._finish(event)

    def _new_id(self, prefix: str) -> str:
        """An item's id names its response: see `responses_request`."""
        return f"{prefix}_{self._response.id.removeprefix('resp_')}_{len(self._response.output)}"

    def _begin(
        self, item: wire.OutputItem, part: wire.OutputText | wire.ReasoningText | None = None
    ) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._item = item
        self._response.output.append(item)
        yield self._as_item("response.output_item.added")
        if part is not None:
            yield self._of_part("response.content_part.added", part=part)

    def _close(self, status: wire.Status) -> Iterator[dict[str, Any]]:
        """End the open item, if there is one."""
        text, self._pieces = "".join(self._pieces), []
        match self._item:
            case None:
                return
            case wire.OutputMessage():
                logprobs, self._logprobs = self._logprobs, []
                self._item.content = [wire.OutputText(text, logprobs=logprobs)]
                yield self._of_part("response.output_text.done", text=text, logprobs=logprobs)
                yield self._of_part("response.content_part.done", part=self._item.content[0])
            case wire.ReasoningItem():
                self._item.content = [wire.ReasoningText(text)]
                yield self._of_part("response.reasoning_text.done", text=text)
                yield self._of_part("response.content_part.done", part=self._item.content[0])
            case wire.FunctionCall():
                self._item.arguments = text
                yield self._of_item("response.function_call_arguments.done", name=self._item.name, arguments=text)
        self._item.status = status
        yield self._as_item("response.output_item.done")
        self._item = None

    def _finish(self, done: Done) -> Iterator[dict[str, Any]]:
        response = self._response
        is_cut = done.finish_reason == "length"
        if not is_cut and (not response.output or isinstance(self._item, wire.ReasoningItem)):
            # Agents take a response without a message or a call for an unfinished one, and ask again.
            yield from self._begin(wire.OutputMessage(id=self._new_id("msg")), wire.OutputText(""))
        yield from self._close("incomplete" if is_cut else "completed")
        response.usage = _to_usage(done.usage)
        response.completed_at = None if is_cut else int(time.time())
        response.incomplete_details = wire.IncompleteDetails("max_output_tokens") if is_cut else None
        response.status = "incomplete" if is_cut else "completed"
        self._keep(response)
        yield self._whole(f"response.{response.status}")

    def _whole(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "response": self._response}

    def _as_item(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "output_index": len(self._response.output) - 1, "item": self._item}

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        assert self._item is not None
        return {"type": kind, "item_id": self._item.id, "output_index": len(self._response.output) - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._of_item(kind, content_index=0, **fields)


def _to_usage(usage: Usage) -> wire.ResponseUsage:
    return wire.ResponseUsage(
        usage.num_prompt_tokens,
        wire.InputTokensDetails(usage.num_cached_tokens),
        usage.num_output_tokens,
        wire.OutputTokensDetails(usage.num_reasoning_tokens),
        usage.num_prompt_tokens + usage.num_output_tokens,
    )
