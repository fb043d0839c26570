"""One generation's answer: streamed, or all of its events folded into one body."""

import time
from collections.abc import Callable

import falcon
import msgspec

from mlx_server.api.deps import Deps
from mlx_server.api.sse import FIRST_EVENT_S, KEEP_ALIVE_S, Client, Encoder, SseBody, stream, wait_for_events
from mlx_server.chat.generation import Generation
from mlx_server.chat.types import ChatRequest, CompletionRequest, Event, PromptProgress


def respond(
    req: falcon.Request,
    resp: falcon.Response,
    deps: Deps,
    request: ChatRequest | CompletionRequest,
    encoder: Encoder | None,
    fold: Callable[[list[Event]], bytes],
) -> None:
    """Answer with the stream that `encoder` writes; without one, with what `fold` makes of all events."""
    client = Client(req)
    request = msgspec.structs.replace(request, client=req.remote_addr)
    generation = Generation(deps.model, deps.engine, request, deps.timeout_s)
    try:
        events = _first_events(generation, client)
        if encoder is not None:
            stream(resp, SseBody(generation, encoder, client, events))
            return
        while not generation.finished:
            events += wait_for_events(generation, client, KEEP_ALIVE_S)
        resp.content_type = "application/json"
        resp.data = fold(events)
    except BaseException:
        generation.close()
        raise


def _first_events(generation: Generation, client: Client) -> list[Event]:
    """What comes until the answer begins, or for a while: until then a failure has an HTTP status of its own."""
    end_s = time.monotonic() + FIRST_EVENT_S
    events: list[Event] = []
    while not generation.finished and all(isinstance(event, PromptProgress) for event in events):
        remaining_s = end_s - time.monotonic()
        if remaining_s <= 0:
            break
        events += wait_for_events(generation, client, remaining_s)
    return events
