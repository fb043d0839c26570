"""Who waits, and who is served next. Pure bookkeeping, like the scheduler."""

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from mlx_server.engine.request import Request

OUTPUT_WEIGHT = 2  # an output token costs about as much as two prompt tokens, which are computed many at a time

Refusal = Literal["queue_full", "client_queue_full"]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much may wait. A queue that is empty takes any request."""

    max_requests: int
    max_tokens: int  # of all waiting prompts together


def age(request: Request) -> tuple[int, int]:
    """First come, first served, within a priority: the order in which running requests get blocks."""
    return request.priority, request.arrival


class FairShares:
    """Tokens served to each client, as a virtual time: whoever has had least is next.

    A client that comes back starts where the least served of those present stands, so that nobody saves up a claim by
    being idle, and nobody sheds a debt either. This is the virtual token counter of https://arxiv.org/abs/2401.00588.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._num_requests: dict[str, int] = {}  # of the clients that have some in the engine

    def join(self, request: Request) -> None:
        """A request has arrived."""
        client = request.client
        if client not in self._num_requests:
            floor = min((self._served[other] for other in self._num_requests), default=math.inf)
            # Clients that are away count while they have had more than the floor; with nobody here all start anew.
            self._served = {c: n for c, n in self._served.items() if c in self._num_requests or n > floor}
            floor = floor if self._num_requests else 0.0
            self._served[client] = max(self._served.get(client, floor), floor)
        self._num_requests[client] = self._num_requests.get(client, 0) + 1

    def leave(self, request: Request) -> None:
        """A request has ended."""
        self._num_requests[request.client] -= 1
        if not self._num_requests[request.client]:
            del self._num_requests[request.client]

    def charge(self, request: Request, start_pos: int, end_pos: int) -> None:
        """The request computes [start_pos, end_pos). What it had before, or found in the cache, is free."""
        start_pos = max(start_pos, request.num_served_tokens)
        if start_pos < end_pos:
            num_outputs = end_pos - max(start_pos, min(end_pos, len(request.prompt_token_ids)))
            self._served[request.client] += end_pos - start_pos + (OUTPUT_WEIGHT - 1) * num_outputs
            request.num_served_tokens = end_pos

    def turn(self, request: Request) -> tuple[int, float, int]:
        """The order in which prompts are computed: priority, then what the client has had, then arrival."""
        return request.priority, self._served[request.client], request.arrival


class WaitingQueue:
    """Requests that own nothing yet, or nothing any more."""

    def __init__(self, limits: QueueLimits, shares: FairShares) -> None:
        self._limits = limits
        self._shares = shares
        self._by_client: dict[str, list[Request]] = {}  # by age; no empty lists
        self._num_requests = 0
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_requests

    def refusal(self, request: Request, num_free_slots: int) -> Refusal | None:
        """Why a new request may not wait here; None: it may. Those that can run in the next step don't count.

        A client may take as many places, and as many tokens, as are free beside it, so one alone never fills the
        queue: the next client finds room.
        """
        if not self._num_requests:
            return None
        free_places = self._limits.max_requests + num_free_slots - self._num_requests
        free_tokens = self._limits.max_tokens - self._num_tokens
        num_tokens = len(request.prompt_token_ids)
        if free_places <= 0 or free_tokens < num_tokens:
            return "queue_full"
        own = self._by_client.get(request.client, [])
        if own and (len(own) >= free_places or sum(len(r.prompt_token_ids) for r in own) + num_tokens > free_tokens):
            return "client_queue_full"
        return None

    def push(self, request: Request) -> None:
        bisect.insort(self._by_client.setdefault(request.client, []), request, key=age)
        self._num_requests += 1
        self._num_tokens += len(request.prompt_token_ids)

    def remove(self, request: Request) -> None:
        own = self._by_client[request.client]
        own.remove(request)
        if not own:
            del self._by_client[request.client]
        self._num_requests -= 1
        self._num_tokens -= len(request.prompt_token_ids)

    def peek(self) -> Request | None:
        """Whose turn it is; None: nobody is ready."""
        first = (next((request for request in own if request.is_ready), None) for own in self._by_client.values())
        return min((request for request in first if request), key=self._shares.turn, default=None)
