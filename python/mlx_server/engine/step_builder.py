"""A batch while the scheduler puts it together."""

from mlx_server.engine.batch import BatchRow
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.request import Request


class StepBuilder:
    """The rows so far, and the tokens that are left of the budget."""

    def __init__(self, kv_cache: KVCacheManager, budget: int) -> None:
        self._kv_cache = kv_cache
        self.budget = budget
        self.rows: list[BatchRow] = []
        self.members: set[Request] = set()

    def add(self, request: Request, num_tokens: int, drafts: tuple[int, ...] = ()) -> None:
        start_pos = request.num_computed_tokens
        end_pos = start_pos + num_tokens
        samples, is_decode = end_pos == request.num_tokens, request.is_decoding
        copies = self._kv_cache.launch(request, end_pos, len(drafts))
        request.num_in_flight_tokens += samples
        row = BatchRow(request, start_pos, end_pos + len(drafts), samples, *copies, drafts, is_decode)
        self.rows.append(row)
        self.members.add(request)
        self.budget -= row.num_tokens
