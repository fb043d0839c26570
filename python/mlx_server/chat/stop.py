"""Stop strings: text passes through, up to the first of them."""

from collections.abc import Sequence


class StopFilter:
    """Cuts a stream of text before the first stop string, whichever pieces the text arrives in.

    What may turn out to be the beginning of a stop string is held back until the next characters decide. The first stop
    string is the one that is complete first; of two that are complete at the same character, the longer one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.found: str | None = None  # the stop string

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def feed(self, text: str) -> str:
        """Take the next piece of text; returns what may be shown now. Sets `found` at a stop string."""
        if not self._matchers:
            return text
        pending = self._held + text
        for index, character in enumerate(text, len(self._held) + 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                return pending[: index - len(self.found)]
        num_held = max(matcher.matched for matcher in self._matchers)
        shown = len(pending) - num_held
        self._held = pending[shown:]
        return pending[:shown]

    def flush(self) -> str:
        """What was held back when the text ends, or is interrupted, without a stop string."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held


class _Matcher:
    """Knuth, Morris and Pratt's matcher: how much of the beginning of one stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._borders = [0]  # of each prefix: the length of its longest proper suffix that is a prefix too
        for character in stop[1:]:
            self._borders.append(self._extend(self._borders[-1], character))

    def advance(self, character: str) -> bool:
        """Whether the stop string is complete with this character."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.stop)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + 1 if self.stop[matched] == character else 0
