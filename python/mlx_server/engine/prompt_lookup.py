"""Guesses of what comes next, looked up in the request's own text: answers often repeat their prompt, or themselves.

Prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding, with an index instead of a search.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

TOKENS_AT_ONCE = 2048  # indexed in one step: a long prompt that is found in the cache must not hold up the others
WEIGHT = 0.1  # of the newest guess in a hit rate
# How often the next guess is right, by how many in a row were: before a request's own guesses have told better.
FIRST_HIT_RATES = (0.2, 0.4, 0.6, 0.75, 0.85)


class PromptLookup:
    """The tokens of one request, and where its newest ones stand in them before.

    A cursor follows the text that is being repeated: the one after the newest earlier occurrence of the last three
    tokens, or of the last two. Each token that is not the cursor's ends the repetition. All tokens judge the cursor,
    whether they were drafts or not, so that it is known what drafts would be worth while none are tried.
    """

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[int, int] = {}  # by two or three tokens: the position after their newest occurrence
        self._cursor: int | None = None
        self._num_hits = 0  # in a row
        self._hit_rates = list(FIRST_HIT_RATES)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int], *, drawn: bool) -> None:
        """The request's next tokens, of its prompt or `drawn`."""
        for token_id in token_ids:
            if drawn and self._cursor is not None:
                self._judge(self._tokens[self._cursor] == token_id)
            else:
                self._cursor = None
            self._tokens.append(token_id)
            found = self._index_newest()
            if self._cursor is None:
                self._cursor, self._num_hits = found, 0

    def chances(self, num_drafts: int, num_unknown: int = 0) -> list[float]:
        """For each draft, the probability that it and all before it are right. `num_unknown` tokens come before the
        first: it takes these to be what the lookup says, too."""
        if self._cursor is None:
            return []
        begin, end = self._num_hits, self._num_hits + num_unknown + num_drafts
        last = len(self._hit_rates) - 1
        return list(accumulate((self._hit_rates[min(i, last)] for i in range(begin, end)), mul))[num_unknown:]

    def drafts(self, num_drafts: int) -> tuple[int, ...]:
        """What comes next, if the text goes on as it did at the cursor; past its end, in a circle."""
        if self._cursor is None:
            return ()
        period = len(self._tokens) - self._cursor
        return tuple(self._tokens[self._cursor + i % period] for i in range(num_drafts))

    def _judge(self, hit: bool) -> None:
        i = min(self._num_hits, len(self._hit_rates) - 1)
        self._hit_rates[i] += WEIGHT * (hit - self._hit_rates[i])
        self._num_hits += 1
        self._cursor = self._cursor + 1 if hit and self._cursor is not None else None

    def _index_newest(self) -> int | None:
        """Where the last three tokens, or else the last two, went on before."""
        tokens, end = self._tokens, len(self._tokens)
        found = None
        key = 0
        for n in range(1, min(end, 3) + 1):
            key |= (tokens[-n] + 1) << 32 * (n - 1)
            if n > 1:
                found = self._after.get(key, found)
                self._after[key] = end
        return found
