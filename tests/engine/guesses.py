"""Drafts at random, for tests of what must hold whatever they are."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from mlx_server.engine.request import Request
from mlx_server.engine.speculation import Speculator


class Guesses(Speculator):
    """Drafts that are right up to a random place; it waits for the step in flight at random."""

    def __init__(self, rng: random.Random, next_token: Callable[[Request, list[int]], int], vocab_size: int) -> None:
        """`next_token` of a request, after the tokens given."""
        super().__init__()
        self._rng = rng
        self._next_token = next_token
        self._vocab_size = vocab_size
        self.num_drafts: Counter[str] = Counter()  # that each request was given

    def plan(self, requests: Sequence[Request], limits: Sequence[int]) -> list[tuple[int, ...]] | None:
        if any(request.num_in_flight_tokens for request in requests):
            return None if self._rng.random() < 0.5 else [()] * len(requests)
        return [self._drafts(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _drafts(self, request: Request, limit: int) -> tuple[int, ...]:
        tokens = request.known_tokens(0, request.num_known_tokens)
        end = len(tokens)
        for _ in range(self._rng.randint(0, limit)):
            is_right = self._rng.random() < 0.8
            tokens.append(self._next_token(request, tokens) if is_right else self._rng.randrange(self._vocab_size))
        self.num_drafts[request.request_id] += len(tokens) - end
        return tuple(tokens[end:])


def known_answers(answers: dict[str, list[int]], vocab_size: int, seed: int = 0) -> Guesses:
    """Guesses for requests that get these answers."""

    def next_token(request: Request, token_ids: list[int]) -> int:
        rest = answers[request.request_id][len(token_ids) - len(request.prompt_token_ids) :]
        return rest[0] if rest else 0

    return Guesses(random.Random(seed), next_token, vocab_size)
