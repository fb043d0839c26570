"""The engine's parts, put together around a model."""

from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.engine.grammar import Grammars
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.memory import MemoryPlan
from mlx_server.engine.pacing import PrefillPacer
from mlx_server.engine.queue import QueueLimits
from mlx_server.engine.runner import ModelRunner
from mlx_server.engine.scheduler import Scheduler
from mlx_server.engine.speculation import Speculator
from mlx_server.engine.stats import EngineStats
from mlx_server.models.base import Model

QUEUED_BATCHES = 4  # so many times the requests, and the tokens, that can run at once may wait


def make_engine_core(
    model: Model,
    plan: MemoryPlan,
    *,
    grammars: Grammars | None = None,
    model_name: str = "",
    max_queue: int | None = None,
    speculator: Speculator | None = None,
) -> EngineCore:
    """An engine that runs `model` in the memory that `plan` gives it.

    Args:
        grammars: compiles those of requests; None: no request may have one.
        model_name: the label of its metrics.
        max_queue: how many requests may wait; None: QUEUED_BATCHES for each that may run.
        speculator: without one there are no drafts.
    """
    kv_cache = KVCacheManager(
        plan.num_blocks,
        plan.block_size,
        plan.max_running,
        window=model.kv_spec.window,
        num_snapshots=None if model.state_spec is None else plan.num_snapshots,
    )
    longest = kv_cache.max_request_tokens(plan.max_batch_tokens)
    max_queue = QUEUED_BATCHES * plan.max_running if max_queue is None else max_queue
    limits = QueueLimits(max_queue, plan.num_tokens * max(max_queue // plan.max_running, 1))
    pacer = PrefillPacer()
    stats = EngineStats(model_name)
    scheduler = Scheduler(
        kv_cache,
        max_batch_tokens=plan.max_batch_tokens,
        limits=limits,
        pacer=pacer,
        speculator=speculator,
        stats=stats,
    )
    return EngineCore(
        scheduler,
        ModelRunner(model, plan, grammars),
        info=wire.EngineInfo(
            context_length=min(model.context_length, longest or model.context_length),
            vocab_size=model.vocab_size,
            max_requests=plan.max_running + max_queue,
            limited_by_memory=longest is not None and longest < model.context_length,
        ),
        grammars=grammars,
        pacer=pacer,
        speculator=speculator,
        stats=stats,
    )
