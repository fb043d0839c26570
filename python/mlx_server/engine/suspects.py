"""Requests that may have let a step fail. Pure bookkeeping, like the scheduler."""

from mlx_server.engine.batch import Batch
from mlx_server.engine.queue import age
from mlx_server.engine.request import Request

MAX_FAILED_STEPS = 3  # in company; alone, one is enough to blame the request


class Suspects:
    """Each computes alone, the oldest first, until it is where it was in the step that failed: then it is innocent.

    Attributes:
        is_in_flight: the step in flight is the one of a suspect.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.is_in_flight = False

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def next(self) -> Request | None:
        return min(self._requests, key=age, default=None)

    def accuse(self, request: Request, until_pos: int) -> bool:
        """A step with it, which would have brought it to `until_pos`, has failed. False: it has had its chances."""
        request.num_failed_steps += 1
        if request in self._requests or request.num_failed_steps > MAX_FAILED_STEPS:
            return False
        request.retry_until_pos = until_pos
        self._requests.append(request)
        return True

    def remove(self, request: Request) -> None:
        """If it is one."""
        if request in self._requests:
            self._requests.remove(request)

    def clear(self, computed: Batch) -> None:
        """A step has been computed."""
        self.is_in_flight = False
        for row in computed.rows if self._requests else ():
            if row.request in self._requests and row.end_pos >= row.request.retry_until_pos:
                self._requests.remove(row.request)
