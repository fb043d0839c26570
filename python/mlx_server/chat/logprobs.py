"""Log-probabilities that ride on the text of their tokens."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_server import wire
from mlx_server.chat.types import ScoredToken, TokenLogprobs

MIN_LOGPROB = -9999.0  # JSON has no infinity

TokenBytes = Callable[[int], bytes]


@dataclass
class _Scored:
    token_id: int
    scores: wire.TokenLogprobs


@dataclass
class _Group:
    """A token with text, after those that hold the beginning of its first character."""

    tokens: list[_Scored]
    start: int  # of its text in all of the text
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass
class _Slice:
    """The visible part of a group's text."""

    group: _Group
    text: str = field(default="")


class LogprobTape:
    """Assigns visible text to tokens.

    First each token is `add`ed, then the ranges of the text that are no markup are `show`n, then what may be seen of
    them (no stop string) is `take`n. A token's scores come once, with all of its visible text: what is taken ends where
    a token ends.

    Args:
        token_bytes: gives the UTF-8 of a token, which may be part of a character.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._partial: list[_Scored] = []  # tokens whose character is not whole
        self._groups: deque[_Group] = deque()  # with text after what was shown
        self._end = 0  # of the text of all tokens
        self._slices: deque[_Slice] = deque()  # shown, not taken
        self._num_free = 0  # characters of _slices that may be taken
        self._shown_end = 0

    def add(self, token_id: int, text: str, scores: wire.TokenLogprobs) -> None:
        """The next token, and the text that it completes."""
        self._partial.append(_Scored(token_id, scores))
        self.add_text(text)

    def add_text(self, text: str) -> None:
        """Text that came late, of the tokens so far."""
        if text:
            self._groups.append(_Group(self._partial, self._end, text))
            self._end += len(text)
            self._partial = []

    def show(self, start: int, end: int) -> None:
        """The text from `start` to `end` is no markup."""
        while self._groups and (group := self._groups[0]).start < end:
            if visible := group.text[max(start - group.start, 0) : end - group.start]:
                if not self._slices or self._slices[-1].group is not group:
                    self._slices.append(_Slice(group))
                self._slices[-1].text += visible
            if group.end > end:
                break
            self._groups.popleft()
        self._shown_end = end

    def take(self, num_chars: int, *, final: bool) -> tuple[str, list[TokenLogprobs]]:
        """So many more characters may be seen; returns the text up to where a token ends, and its tokens.

        With `final` nothing more of what was shown is taken later: the last token may be cut.
        """
        self._num_free += num_chars
        texts: list[str] = []
        logprobs: list[TokenLogprobs] = []
        while self._slices and self._num_free:
            text = self._slices[0].text
            is_whole = len(self._slices) > 1 or self._slices[0].group.end <= self._shown_end
            if not final and (len(text) > self._num_free or not is_whole):
                break
            text = text[: self._num_free]
            texts.append(text)
            logprobs += self._scores(self._slices.popleft().group, text)
            self._num_free -= len(text)
        if final:
            self._slices.clear()
        return "".join(texts), logprobs

    def _scores(self, group: _Group, text: str) -> list[TokenLogprobs]:
        utf8 = text.encode()
        result = []
        for scored in group.tokens[:-1]:
            part = self._token_bytes(scored.token_id)
            if utf8.startswith(part):  # else it is a special token, which has no text
                result.append(token_logprobs("", part, scored.scores, self._token_bytes))
                utf8 = utf8.removeprefix(part)
        return [
            *result,
            *(token_logprobs(text, utf8, scored.scores, self._token_bytes) for scored in group.tokens[-1:]),
        ]


def token_logprobs(text: str, utf8: bytes, scores: wire.TokenLogprobs, token_bytes: TokenBytes) -> TokenLogprobs:
    """The engine's scores at one position, with texts."""
    top = [
        ScoredToken((part := token_bytes(token_id)).decode(errors="replace"), part, max(logprob, MIN_LOGPROB))
        for token_id, logprob in zip(scores.top_ids, scores.top_logprobs, strict=True)
    ]
    return TokenLogprobs(ScoredToken(text, utf8, max(scores.logprob, MIN_LOGPROB)), top)
