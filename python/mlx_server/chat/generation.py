"""One request's way from messages to events: render, tokenize, submit, follow the choices."""

import time
from collections import deque
from collections.abc import Iterator

from mlx_server.chat.choice import ChoiceStream
from mlx_server.chat.output_router import join
from mlx_server.chat.plan import plan
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.types import ChatRequest, CompletionRequest, Event
from mlx_server.engine_client import EngineClient
from mlx_server.errors import (
    ClientLimitError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    ServerError,
)
from mlx_server.wire import Embedded, Failed

# Failed.code -> when to send it again
_RETRY_AFTER_S = {"engine_died": 5, "server_stopping": 5, "queue_full": 2, "client_queue_full": 2}
_ITERATION_WAIT_S = 60.0
_QUEUE_SHARE = 4  # a request of many choices submits so large a part of what the engine takes at once


class Generation:
    """A running request. Ask for its events with `poll`, or iterate over them; `close` it in any case.

    Raises InvalidRequestError if the request can't be served and OverloadedError if the engine can't take it now.
    """

    def __init__(
        self, model: ServedModel, engine: EngineClient, request: ChatRequest | CompletionRequest, timeout_s: float
    ) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._stream = engine.open_stream()
        info = engine.info()
        self._max_submitted = max(info.max_requests // _QUEUE_SHARE, 1)
        self._waiting = deque(plan(model, request, info, timeout_s))  # choices that are not submitted yet
        self._choices: dict[str, ChoiceStream] = {}  # those that are and are not done, by their request
        self.finished = False
        self._start_waiting()

    def poll(self, timeout_s: float) -> list[Event]:
        """The next events, deltas of one choice joined, and a `Done` at the end of each. Empty: none in `timeout_s`.

        Raises RequestTimeoutError when the request's time is over, OverloadedError or GenerationError if the engine
        failed; there are no further events then.
        """
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            self.close()
            raise timeout()
        events: list[Event] = []
        for output in self._stream.get(min(timeout_s, remaining_s)) or ():
            choice = self._choices.get(output.request_id)
            if choice is None:  # it was done before this came
                continue
            if isinstance(output, Failed):
                self.close()
                raise failure(output)
            assert not isinstance(output, Embedded)  # generates nothing
            events += choice.take(output)
            if choice.is_done or choice.submit.request_id != output.request_id:
                del self._choices[output.request_id]
                self._stream.cancel(output.request_id)
                if not choice.is_done:
                    self._start(choice)
        self._start_waiting()
        if not self._choices:
            self.close()
        return join(events)

    def __iter__(self) -> Iterator[Event]:
        while not self.finished:
            yield from self.poll(_ITERATION_WAIT_S)

    def close(self) -> None:
        """End the request; the engine drops what is left of its work. May be called more than once."""
        self.finished = True
        self._waiting.clear()
        self._choices = {}
        self._stream.close()

    def _start_waiting(self) -> None:
        while self._waiting and len(self._choices) < self._max_submitted:
            self._start(self._waiting.popleft())

    def _start(self, choice: ChoiceStream) -> None:
        try:
            self._stream.submit(choice.submit)
        except BaseException:  # other choices may run already
            self.close()
            raise
        self._choices[choice.submit.request_id] = choice


def timeout() -> RequestTimeoutError:
    return RequestTimeoutError("The request took longer than the server's --timeout allows; it was cancelled.")


def failure(failed: Failed) -> ServerError:
    """The error that an engine's `Failed` is for the client."""
    if failed.code == "deadline_exceeded":
        return timeout()
    if failed.code == "invalid_grammar":
        return InvalidRequestError(failed.message, code=failed.code)
    retry_after_s = _RETRY_AFTER_S.get(failed.code)
    if retry_after_s is None:
        return GenerationError(failed.message, code=failed.code)
    kind = ClientLimitError if failed.code == "client_queue_full" else OverloadedError
    return kind(failed.message, code=failed.code, retry_after_s=retry_after_s)
