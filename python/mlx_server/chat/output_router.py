"""Splits what a model writes into reasoning, text and tool calls, as neutral events."""

import uuid
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from typing import Any

from mlx_server.chat.incremental import Arguments, CallStart, Part, Text, Thought
from mlx_server.chat.logprobs import LogprobTape
from mlx_server.chat.reasoning import ReasoningParser
from mlx_server.chat.stop import StopFilter
from mlx_server.chat.tool_parsers.base import ToolParser
from mlx_server.chat.types import Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStart


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class OutputRouter:
    """One choice's text, in any pieces, to events.

    Stop strings are looked for in the text that the client sees: neither in thoughts nor in calls.

    Attributes:
        stop_sequence: the stop string that was found; nothing comes after it.
        is_full: the one call that is allowed is over, and another one begins; nothing comes after it.
        num_calls: calls that have begun.

    Args:
        index: of the choice.
        reasoning: None if the model has no tags for thoughts.
        tools: None if there are no calls, whatever the text looks like.
        max_calls: None if there may be any number.
        tape: if log-probabilities ride on the text.
    """

    def __init__(
        self,
        index: int,
        *,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        stop: Sequence[str] = (),
        max_calls: int | None = None,
        tape: LogprobTape | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.index = index
        self._reasoning = reasoning
        self._tools = tools
        self._stop = StopFilter(stop)
        self._max_calls = max_calls
        self._tape = tape
        self._new_id = new_id
        self._num_chars = 0  # fed so far
        self._tools_pos: int | None = None  # where the text begins that `tools` gets
        self.num_calls = 0
        self.is_full = False

    @property
    def stop_sequence(self) -> str | None:
        return self._stop.found

    @property
    def ended(self) -> bool:
        """Nothing comes any more."""
        return self.is_full or self._stop.stopped

    @property
    def in_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_open

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of text; returns what is certain now."""
        start_pos, self._num_chars = self._num_chars, self._num_chars + len(text)
        if self._reasoning is None:
            return self._route_text(text, start_pos)
        return self._route_reasoning(self._reasoning.feed(text))

    def finish(self) -> list[Event]:
        """What was held back when the text ends here."""
        if self.ended:
            return []
        events = self._route_reasoning(self._reasoning.finish()) if self._reasoning else []
        if self._tools:
            events += self._route_calls(self._tools.finish())
        return events + ([] if self.ended else self._flush())

    def _route_reasoning(self, parts: Iterable[Part]) -> list[Event]:
        events: list[Event] = []
        for part in parts:
            match part:
                case Thought(text):
                    events.append(ReasoningDelta(text, self.index))
                case Text(text, pos):
                    events += self._route_text(text, pos)
        return events

    def _route_text(self, text: str, pos: int) -> list[Event]:
        if self._tools is None:
            return self._show(text, pos)
        if self._tools_pos is None:
            self._tools_pos = pos
        return self._route_calls(self._tools.feed(text))

    def _route_calls(self, parts: Iterable[Part]) -> list[Event]:
        events: list[Event] = []
        for part in parts:
            if self.ended:
                break
            match part:
                case Text(text, pos):
                    events += self._show(text, pos + (self._tools_pos or 0))
                case CallStart(name):
                    events += self._flush()
                    self.is_full = self.num_calls == self._max_calls
                    if not self.is_full:
                        events.append(ToolCallStart(self.num_calls, self._new_id(), name, self.index))
                        self.num_calls += 1
                case Arguments(text):
                    events.append(ToolCallDelta(self.num_calls - 1, text, self.index))
        return events

    def _show(self, text: str, pos: int) -> list[Event]:
        if self._tape:
            self._tape.show(pos, pos + len(text))
        return self._visible(self._stop.feed(text), final=self._stop.stopped)

    def _flush(self) -> list[Event]:
        return self._visible(self._stop.flush(), final=True)

    def _visible(self, text: str, *, final: bool) -> list[Event]:
        logprobs = None
        if self._tape:
            text, logprobs = self._tape.take(len(text), final=final)
        return [TextDelta(text, logprobs, self.index)] if text else []


def join(events: Iterable[Event]) -> list[Event]:
    """The same events, with deltas that follow one another as one. Linear in their text, however many have piled up."""
    joined: list[Event] = []
    for channel, group in groupby(events, _channel):
        deltas = list(group)
        joined += deltas if channel is None or len(deltas) == 1 else [_join_deltas(deltas)]
    return joined


def _channel(event: Event) -> tuple[object, ...] | None:
    """What deltas that can be one have in common; None: no delta."""
    match event:
        case TextDelta() | ReasoningDelta():
            return type(event), event.index
        case ToolCallDelta():
            return ToolCallDelta, event.index, event.call_index
    return None


def _join_deltas(deltas: Sequence[Any]) -> Event:
    """Deltas of one channel."""
    match deltas[0]:
        case TextDelta(index=index):
            parts = [delta.logprobs for delta in deltas if delta.logprobs is not None]
            return TextDelta("".join(delta.text for delta in deltas), [*chain(*parts)] if parts else None, index)
        case ReasoningDelta(index=index):
            return ReasoningDelta("".join(delta.text for delta in deltas), index)
        case first:
            return ToolCallDelta(first.call_index, "".join(delta.arguments for delta in deltas), first.index)
