"""Whether and how far to guess: drafts for a step, from each request's own text, where they pay."""

from collections.abc import Sequence

from mlx_server.engine.batch import Batch
from mlx_server.engine.memory import MAX_RUNNING
from mlx_server.engine.pacing import blend
from mlx_server.engine.prompt_lookup import TOKENS_AT_ONCE
from mlx_server.engine.request import Request

MAX_DRAFTS = 7  # of a request: with its newest token 8 rows, up to which kernels compute row by row
LEAST_GAIN = 1.2  # tokens a second, over those of a plain step: less is within what is known of either
LEAST_CHANCE = 0.3  # of a draft to be right, with those before it
LENGTHS = (1, 3, MAX_DRAFTS)  # with the newest token powers of two: where the cost of a row leaps, it leaps there
FIRST_COST = 0.125  # of a draft, as a share of a plain step's time, before one is measured
FORGET = 0.99  # a cost that forbids drafts is believed a little less each time, so that it is measured again


class Speculator:
    """Weighs the tokens that drafts are expected to give against the time that they take on this device.

    A step with drafts is read back before the next one begins, as it decides where its requests go on; so its time
    includes what pipelining hides of the others.
    """

    def __init__(self) -> None:
        self._step_s: dict[tuple[int, int], float] = {}  # by the bits in the numbers of decodes and of drafts

    def observe(self, previous: Batch, launched: Batch, duration_s: float) -> None:
        """As `PrefillPacer.observe`. A step with drafts is alone; of the others, pairs of decodes tell something."""
        num_decodes, num_drafts = previous.num_decodes, previous.num_drafts
        if any(batch.num_prefill_tokens for batch in (previous, launched)):
            return
        if num_drafts or (launched.num_decodes == num_decodes and not launched.num_drafts):
            key = num_decodes.bit_length(), num_drafts.bit_length()
            self._step_s[key] = blend(self._expected_s(num_decodes, num_drafts), duration_s)

    def plan(self, requests: Sequence[Request], limits: Sequence[int]) -> list[tuple[int, ...]] | None:
        """Drafts for each of the requests that decode next, at most `limits` of them. None: drafts would pay, but first
        the tokens in flight must be known."""
        for request in requests:
            follow(request)
        share = max(MAX_RUNNING // max(len(requests), 1) - 1, 0)  # the memory for logits is that of so many rows
        chances = [
            request.lookup.chances(min(limit, share), request.num_in_flight_tokens)
            if limit and len(request.lookup) == request.num_known_tokens
            else []
            for request, limit in zip(requests, limits, strict=True)
        ]
        plain_s = self._expected_s(len(requests), 0)
        nothing: list[tuple[int, ...]] = [()] * len(requests)
        if plain_s is None or not any(chances):
            return nothing
        gain, length = max((self._gain(plain_s, chances, length), length) for length in LENGTHS)
        if gain < LEAST_GAIN:
            self._forget(len(requests), chances)
            return nothing
        if any(request.num_in_flight_tokens for request in requests):
            return None
        counts = [_count(of_request, length) for of_request in chances]
        return [request.lookup.drafts(count) for request, count in zip(requests, counts, strict=True)]

    def _gain(self, plain_s: float, chances: list[list[float]], length: int) -> float:
        """Tokens a second with at most `length` drafts for each request, over those without."""
        counts = [_count(of_request, length) for of_request in chances]
        num_drafts, num_decodes = sum(counts), len(chances)
        if not num_drafts:
            return 0.0
        num_right = sum(sum(of_request[:count]) for of_request, count in zip(chances, counts, strict=True))
        step_s = self._expected_s(num_decodes, num_drafts)
        assert step_s is not None
        return (num_decodes + num_right) / num_decodes * plain_s / step_s

    def _expected_s(self, num_decodes: int, num_drafts: int) -> float | None:
        measured = self._step_s.get((num_decodes.bit_length(), num_drafts.bit_length()))
        plain_s = self._step_s.get((num_decodes.bit_length(), 0))
        if measured is not None or plain_s is None:
            return measured
        return plain_s * (1 + FIRST_COST * num_drafts)

    def _forget(self, num_decodes: int, chances: list[list[float]]) -> None:
        for length in LENGTHS:
            num_drafts = sum(_count(of_request, length) for of_request in chances)
            key = num_decodes.bit_length(), num_drafts.bit_length()
            if num_drafts and key in self._step_s:
                self._step_s[key] *= FORGET


def follow(request: Request) -> None:
    """Let the request's lookup know its newest tokens, or some more of a long prompt."""
    lookup, num_prompt = request.lookup, len(request.prompt_token_ids)
    if request.max_tokens < 2:
        return  # nothing follows its first token
    end_pos = min(len(lookup) + TOKENS_AT_ONCE, request.num_known_tokens)
    if len(lookup) < num_prompt:
        lookup.extend(request.prompt_token_ids[len(lookup) : end_pos], drawn=False)
    if num_prompt <= len(lookup) < end_pos:
        lookup.extend(request.output_token_ids[len(lookup) - num_prompt : end_pos - num_prompt], drawn=True)


def _count(chances: list[float], length: int) -> int:
    """How many of the first `length` drafts are worth a try; chances fall."""
    return sum(chance >= LEAST_CHANCE for chance in chances[:length])
