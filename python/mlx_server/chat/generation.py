"""One request's way from messages to events: render, tokenize, submit, detokenize, stop."""

import time
import uuid
from collections.abc import Iterator, Sequence

import msgspec

from mlx_server.chat.served_model import ServedModel, Tokenizer
from mlx_server.chat.stop import StopFilter
from mlx_server.chat.types import ChatRequest, Done, Event, TextDelta, Usage
from mlx_server.engine_client import EngineClient
from mlx_server.errors import (
    ClientLimitError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
)
from mlx_server.wire import EngineInfo, Failed, Finished, FinishReason, Submit, Tokens

# More bytes a token of context than any real prompt has; longer ones are refused without the work of tokenizing them.
_MAX_BYTES_PER_TOKEN = 8
# Failed.code -> when to send it again
_RETRY_AFTER_S = {"engine_died": 5, "server_stopping": 5, "queue_full": 2, "client_queue_full": 2}
_TIMEOUT = "The request took longer than the server's --timeout allows; it was cancelled."
_ITERATION_WAIT_S = 60.0
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Generation:
    """A running request. Ask for its events with `poll`, or iterate over them; `close` it in any case.

    Raises InvalidRequestError if the prompt can't be served and OverloadedError if the engine can't take it now.
    """

    def __init__(self, model: ServedModel, engine: EngineClient, request: ChatRequest, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        info = engine.info()
        prompt = model.template.render(msgspec.to_builtins(request.messages), template_kwargs=request.template_kwargs)
        prompt_token_ids = _tokenize(prompt, model.tokenizer, info)
        self._num_prompt_tokens = len(prompt_token_ids)
        self._num_output_tokens = 0
        self._text_stream = model.tokenizer.stream()
        self._stop_filter = StopFilter(request.stop)
        self.finished = False
        max_tokens = min(request.max_tokens, info.context_length - len(prompt_token_ids))
        self._stream = engine.open_stream()
        self._stream.submit(
            Submit(
                uuid.uuid4().hex,
                prompt_token_ids,
                max_tokens,
                model.end_token_ids,
                request.sampling,
                priority=request.priority,
                client=request.client,
                deadline_s=timeout_s,
            )
        )

    def poll(self, timeout_s: float) -> list[Event]:
        """The next events: at most one `TextDelta`, and `Done` at the end. Empty: there was no text in `timeout_s`.

        Raises RequestTimeoutError when the request's time is over, OverloadedError or GenerationError if the engine
        failed; there are no further events then.
        """
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            self.close()
            raise RequestTimeoutError(_TIMEOUT)
        pieces: list[str] = []
        done: Done | None = None
        for output in self._stream.get(min(timeout_s, remaining_s)) or ():
            match output:
                case Failed():
                    self.finished = True
                    raise _failure(output)
                case Tokens():
                    pieces += self._advance(output.token_ids)
                case Finished():
                    pieces += self._advance(output.token_ids)
                    pieces += self._finish()
                    if not self._stop_filter.stopped:
                        done = self._done(output.finish_reason, output.num_output_tokens, output.num_cached_tokens)
            if self._stop_filter.stopped:
                done = self._done("stop", self._num_output_tokens)
                break
        text = "".join(pieces)
        events: list[Event] = [TextDelta(text)] if text else []
        return [*events, done] if done else events

    def __iter__(self) -> Iterator[Event]:
        while not self.finished:
            yield from self.poll(_ITERATION_WAIT_S)

    def close(self) -> None:
        """End the request; the engine drops what is left of its work. May be called more than once."""
        self.finished = True
        self._stream.close()

    def _advance(self, token_ids: Sequence[int]) -> Iterator[str]:
        for token_id in token_ids:
            self._num_output_tokens += 1
            yield self._stop_filter.feed(self._text_stream.push(token_id))
            if self._stop_filter.stopped:
                return

    def _finish(self) -> Iterator[str]:
        """What was held back, but for bytes that never became a character."""
        if not self._stop_filter.stopped:
            yield self._stop_filter.feed(self._text_stream.finish().rstrip(_REPLACEMENT))
            yield self._stop_filter.flush()

    def _done(self, finish_reason: FinishReason, num_output_tokens: int, num_cached_tokens: int = 0) -> Done:
        self.close()
        return Done(finish_reason, Usage(self._num_prompt_tokens, num_output_tokens, num_cached_tokens))


def _tokenize(prompt: str, tokenizer: Tokenizer, info: EngineInfo) -> list[int]:
    size_bytes = len(prompt.encode())
    if size_bytes > _MAX_BYTES_PER_TOKEN * info.context_length:
        raise _too_long(info, f"{size_bytes} bytes, more than {_MAX_BYTES_PER_TOKEN} for each of them")
    token_ids = tokenizer.encode_chat(prompt)
    if len(token_ids) >= info.context_length:
        raise _too_long(info, f"{len(token_ids)} tokens, which leaves no room for an answer")
    if not token_ids:
        raise InvalidRequestError("The prompt is empty.", param="messages")
    return token_ids


def _too_long(info: EngineInfo, length: str) -> InvalidRequestError:
    why = " here, as the KV cache holds no more (see --memory-limit)" if info.limited_by_memory else ""
    return InvalidRequestError(
        f"This model's maximum context length is {info.context_length} tokens{why}, but the messages are {length}.",
        param="messages",
        code="context_length_exceeded",
    )


def _failure(failed: Failed) -> OverloadedError | RequestTimeoutError | GenerationError:
    if failed.code == "deadline_exceeded":
        return RequestTimeoutError(_TIMEOUT)
    retry_after_s = _RETRY_AFTER_S.get(failed.code)
    if retry_after_s is None:
        return GenerationError(failed.message, code=failed.code)
    kind = ClientLimitError if failed.code == "client_queue_full" else OverloadedError
    return kind(failed.message, code=failed.code, retry_after_s=retry_after_s)
