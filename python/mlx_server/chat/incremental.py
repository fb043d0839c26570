"""Parsers of text that arrives in pieces, cut anywhere.

A parser is a generator that reads as if all of its text were there, and yields where it must wait for more. So it keeps
no states by hand, and how the text is cut can't change what it finds.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import NamedTuple, TypeVar

_SCALAR = re.compile(r"[^\s,}\]]")
_OUTSIDE_STRINGS = re.compile(r"[\s\w.,:+\-\"]", re.ASCII)
_T = TypeVar("_T")
Wait = Generator[None, None, _T]  # yields to wait for more text, returns what it read


class Text(NamedTuple):
    """A piece of the parser's text that is no markup, unchanged."""

    text: str
    pos: int  # in all of the parser's text


class Thought(NamedTuple):
    """A piece of the model's reasoning."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins."""

    name: str


class Arguments(NamedTuple):
    """The next piece of the call's arguments, as JSON text."""

    text: str


Part = Text | Thought | CallStart | Arguments


class Malformed(Exception):  # noqa: N818 - no error: the text just is not what was looked for
    """What was read is not in the expected form."""


class IncrementalParser(ABC):
    """Feed it text, get parts. Subclasses write `parse`."""

    def __init__(self) -> None:
        self._text = ""  # not given away yet
        self._at = 0  # how much of _text is read
        self._marker_end = 0  # in _text, of the marker that `text_until` has read
        self._start_pos = 0  # of _text in all of the text
        self._ended = False
        self._parts: list[Part] = []
        self._run = self.parse()

    @abstractmethod
    def parse(self) -> Wait[None]:
        """Read all text and `give` its parts. What is left when it returns is text."""

    def feed(self, text: str) -> list[Part]:
        """Take the next piece of text; returns what is certain now."""
        self._text += text
        return self._resume()

    def finish(self) -> list[Part]:
        """What was held back when the text ends here."""
        self._ended = True
        return self._resume()

    def _resume(self) -> list[Part]:
        try:
            next(self._run)
        except StopIteration:
            self.give_text(len(self._text))
        parts, self._parts = self._parts, []
        return parts

    def give(self, part: Part) -> None:
        self._parts.append(part)

    def give_text(self, end: int) -> None:
        """What is held back of `_text` before `end` is text."""
        if end > 0:
            self.give(Text(self._text[:end], self._start_pos))
            self._drop(end)

    def drop_read(self) -> None:
        """Forget what is read; `give_back` can't reach it any more."""
        self._drop(self._at)

    def give_back(self) -> None:
        """What was read since the last drop is no markup: the marker is text, and what follows it is read again."""
        self.give_text(self._marker_end)
        self._at = 0

    def _drop(self, end: int) -> None:
        self._text = self._text[end:]
        self._start_pos += end
        self._at = max(self._at - end, 0)
        self._marker_end = max(self._marker_end - end, 0)

    # --- reading ---

    def more(self) -> Wait[bool]:
        """Wait for more text; False if there is none."""
        if self._ended:
            return False
        yield
        return True

    def peek(self) -> Wait[str]:
        """The next character, not read yet; empty at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def space(self) -> Wait[None]:
        """Read white space."""
        while (yield from self.peek()).isspace():
            self._at += 1

    def literal(self, text: str) -> Wait[bool]:
        """Read `text`, if it is next."""
        while text.startswith(self._text[self._at : self._at + len(text)]):
            if self._text.startswith(text, self._at):
                self._at += len(text)
                return True
            if not (yield from self.more()):
                return False
        return False

    def expect(self, text: str) -> Wait[None]:
        """Read `text`, after white space. Malformed if it is not next."""
        yield from self.space()
        if not (yield from self.literal(text)):
            raise Malformed

    def run(self, chars: re.Pattern[str]) -> Wait[str]:
        """Read the characters that match, as many as there are."""
        start = self._at
        while (char := (yield from self.peek())) and chars.fullmatch(char):
            self._at += 1
        return self._text[start : self._at]

    def text_until(self, markers: Sequence[str]) -> Wait[str | None]:
        """Give text up to the first of the markers, which is read and returned; None at the end.

        White space before a marker belongs to the markup.
        """
        self.drop_read()
        pattern = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
        while True:
            if match := pattern.search(self._text):
                text_end = len(self._text[: match.start()].rstrip())
                self.give_text(text_end)
                self._at = self._marker_end = match.end() - text_end
                return match[0]
            self.give_text(len(self._text[: len(self._text) - held_back(self._text, markers)].rstrip()))
            if not (yield from self.more()):
                self.give_text(len(self._text))
                return None

    def json_value(self) -> Wait[str]:
        """Read a JSON value of any kind. Malformed unless it is whole."""
        start = self._at
        if (yield from self.peek()) not in '{["':
            return (yield from self.run(_SCALAR))
        nesting = _Nesting()
        while char := (yield from self.peek()):
            nesting.feed(char)
            self._at += 1
            if nesting.is_whole:
                return self._text[start : self._at]
        raise Malformed

    def give_object(self) -> Wait[bool]:
        """Give a JSON object, whose first bracket is next, as arguments while it arrives. Whether it is whole."""
        self.drop_read()
        nesting = _Nesting()
        try:
            while not nesting.is_whole and (yield from self.peek()):
                while self._at < len(self._text) and not nesting.is_whole:
                    nesting.feed(self._text[self._at])
                    self._at += 1
                self._give_read()
        except Malformed:
            self._give_read()
        return nesting.is_whole

    def _give_read(self) -> None:
        if self._at:
            self.give(Arguments(self._text[: self._at]))
            self.drop_read()


def whole_object(arguments: str) -> str:
    """The JSON text of an object that may be cut: what is open is closed, and what can't be closed is left out."""
    nesting = _Nesting()
    cuts = [(0, "{}")]  # where the text may end, and what closes it there
    for i, char in enumerate(arguments):
        if char == ",":
            cuts.append((i, nesting.closing))
        try:
            nesting.feed(char)
        except Malformed:
            break
        if char in '}]"':
            cuts.append((i + 1, nesting.closing))
    else:
        cuts.append((len(arguments), nesting.closing))
    for end, closing in reversed(cuts):
        text = arguments[:end] + closing
        try:
            if isinstance(json.loads(text), dict):
                return text
        except (ValueError, RecursionError):
            continue
    return "{}"


class _Nesting:
    """Where a JSON value ends, by its brackets and quotes."""

    def __init__(self) -> None:
        self.is_whole = False
        self._closing: list[str] = []
        self._quoted = self._escaped = False

    @property
    def closing(self) -> str:
        """What would make the value whole."""
        return '"' * self._quoted + "".join(reversed(self._closing))

    def feed(self, char: str) -> None:
        """Take the next character. Malformed if JSON has none such there."""
        if self._quoted:
            self._quoted = self._escaped or char != '"'
            self._escaped = not self._escaped and char == "\\"
        elif char in "{[":
            self._closing.append("}" if char == "{" else "]")
        elif char in "}]":
            if not self._closing or self._closing.pop() != char:
                raise Malformed
        elif not _OUTSIDE_STRINGS.fullmatch(char):
            raise Malformed
        else:
            self._quoted = char == '"'
        self.is_whole = not self._quoted and not self._closing


def held_back(text: str, markers: Sequence[str]) -> int:
    """The length of the longest end of `text` with which one of the markers may begin."""
    longest = max(map(len, markers)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
