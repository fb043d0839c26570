"""One choice of an answer: the engine's tokens to events."""

import time
import uuid
from collections.abc import Sequence

import msgspec

from mlx_server import wire
from mlx_server.chat.logprobs import LogprobTape, token_logprobs
from mlx_server.chat.output_router import OutputRouter
from mlx_server.chat.served_model import TextStream, Tokenizer
from mlx_server.chat.types import (
    Done,
    Event,
    FinishReason,
    PromptLogprobs,
    PromptProgress,
    TextDelta,
    TokenLogprobs,
    Usage,
)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ThinkingBudget(msgspec.Struct, frozen=True):
    """When thoughts are cut short, and how."""

    num_tokens: int
    close: str  # the text that ends them
    close_token_ids: list[int]
    grammar: str | None  # of what comes after them


class ChoiceStream:
    """Follows one choice through the engine's outputs.

    Attributes:
        submit: what the engine gets, or got last.
        is_done: there are no further events.
        shows_progress: the client wants `PromptProgress`.

    Args:
        echo: the prompt's text, if the answer begins with it.
        tape: if the tokens are scored.
    """

    def __init__(
        self,
        router: OutputRouter,
        submit: wire.Submit,
        tokenizer: Tokenizer,
        text_stream: TextStream,
        *,
        tape: LogprobTape | None = None,
        budget: ThinkingBudget | None = None,
        echo: str = "",
    ) -> None:
        self.index = router.index
        self.submit = submit
        self.is_done = False
        self.shows_progress = False
        self._tokenizer = tokenizer
        self._text_stream = text_stream
        self._router = router
        self._tape = tape
        self._budget = budget
        self._echo = echo
        self._token_ids: list[int] = []  # that the engine drew for `submit`
        self._num_before = 0  # output tokens of earlier submits
        self._num_reasoning = 0
        self._num_prompt = len(submit.prompt_token_ids)
        self._num_cached: int | None = None
        self._submitted_s = time.monotonic()
        self._first_token_s: float | None = None

    def take(self, output: wire.Progress | wire.Tokens | wire.Finished) -> list[Event]:
        """The events of one output of `submit`. If `is_done`, or `submit` is another one then, this one is to end."""
        if isinstance(output, wire.Progress):
            return self._progress(output)
        events = self._begin(output)
        finished = output if isinstance(output, wire.Finished) else None
        for i, token_id in enumerate(output.token_ids):
            events += self._advance(token_id, output.logprobs[i] if output.logprobs else None)
            if self._router.ended:
                return [*events, self._done("stop")]
            if not finished and self._is_over_budget():
                return events + self._cut_thoughts()
        if finished:
            events += self._flush()
            events.append(self._done("stop" if self._router.ended else finished.finish_reason, finished))
        return events

    def _progress(self, progress: wire.Progress) -> list[Event]:
        if self._num_before:  # thoughts that were cut are part of this prompt
            return []
        self._num_cached = progress.num_cached_tokens
        if not self.shows_progress:
            return []
        elapsed_s = time.monotonic() - self._submitted_s
        counts = (progress.num_prompt_tokens, progress.num_cached_tokens, progress.num_computed_tokens)
        return [PromptProgress(*counts, elapsed_s, self.index)]

    def _begin(self, output: wire.Tokens | wire.Finished) -> list[Event]:
        """What comes before the first token's events."""
        if self._first_token_s is not None:
            return []
        self._first_token_s = time.monotonic()
        if output.prompt_logprobs is not None:
            return [self._prompt_logprobs(output.prompt_logprobs)]
        return [TextDelta(self._echo, None, self.index)] if self._echo else []

    def _prompt_logprobs(self, scores: Sequence[wire.TokenLogprobs]) -> PromptLogprobs:
        stream = self._tokenizer.stream()
        prompt = self.submit.prompt_token_ids
        texts = [stream.push(token_id) for token_id in prompt]
        token_bytes = self._tokenizer.token_bytes
        logprobs: list[TokenLogprobs | None] = [None]
        for token_id, text, score in zip(prompt[1:], texts[1:], scores, strict=True):
            logprobs.append(token_logprobs(text, token_bytes(token_id), score, token_bytes))
        return PromptLogprobs(logprobs, texts, self.index)

    def _advance(self, token_id: int, scores: wire.TokenLogprobs | None) -> list[Event]:
        self._token_ids.append(token_id)
        text = self._text_stream.push(token_id)
        if self._tape and scores:
            self._tape.add(token_id, text, scores)
        thought_before = self._router.in_reasoning
        events = self._router.feed(text) if text else []
        self._num_reasoning += thought_before or self._router.in_reasoning
        return events

    def _flush(self) -> list[Event]:
        """What was held back, but for bytes that never became a character."""
        return self._late_text(self._text_stream.finish().rstrip(_REPLACEMENT)) + self._router.finish()

    def _late_text(self, text: str) -> list[Event]:
        if self._tape:
            self._tape.add_text(text)
        return self._router.feed(text) if text else []

    def _is_over_budget(self) -> bool:
        return self._budget is not None and self._router.in_reasoning and self._num_reasoning >= self._budget.num_tokens

    def _cut_thoughts(self) -> list[Event]:
        """Close the thoughts, and let the engine go on after them: the prefix cache has what it computed."""
        assert self._budget is not None
        added = [*self._token_ids, *self._budget.close_token_ids]
        self._num_before += len(added)
        self._num_reasoning += len(self._budget.close_token_ids)
        self._token_ids = []
        events = self._late_text(self._text_stream.finish().rstrip(_REPLACEMENT) + self._budget.close)
        before = self.submit
        if before.max_tokens <= len(added):
            return [*events, self._done("length")]
        self.submit = msgspec.structs.replace(
            before,
            request_id=uuid.uuid4().hex,
            prompt_token_ids=before.prompt_token_ids + added,
            max_tokens=before.max_tokens - len(added),
            grammar=self._budget.grammar,
            sampling=msgspec.structs.replace(
                before.sampling, min_tokens=max(before.sampling.min_tokens - len(added), 0)
            ),
        )
        self._budget = None
        return events

    def _done(self, finish_reason: FinishReason, finished: wire.Finished | None = None) -> Done:
        self.is_done = True
        stop_sequence = self._router.stop_sequence
        if finish_reason == "stop" and stop_sequence is None and self._router.num_calls:
            finish_reason = "tool_calls"
        num_output = self._num_before + (finished.num_output_tokens if finished else len(self._token_ids))
        num_cached = finished.num_cached_tokens if finished and self._num_cached is None else self._num_cached or 0
        usage = Usage(self._num_prompt, num_output, num_cached, self._num_reasoning)
        timings = finished.timings if finished and not self._num_before else None
        return Done(finish_reason, usage, stop_sequence, timings or self._timings(), self.index)

    def _timings(self) -> wire.Timings:
        """As far as this side can tell: the time in the queue is a part of the prefill's."""
        now_s = time.monotonic()
        first_s = now_s if self._first_token_s is None else self._first_token_s
        return wire.Timings(0.0, first_s - self._submitted_s, now_s - first_s)
