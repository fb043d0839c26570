"""The engine's parts, put together around a model."""

from mlx_server.engine.core import EngineCore
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.memory import MemoryPlan
from mlx_server.engine.runner import ModelRunner
from mlx_server.engine.scheduler import Scheduler
from mlx_server.models.base import Model


def make_engine_core(model: Model, plan: MemoryPlan) -> EngineCore:
    """An engine that runs `model` in the memory that `plan` gives it."""
    kv_cache = KVCacheManager(plan.num_blocks, plan.block_size, plan.max_running, window=model.kv_spec.window)
    longest = kv_cache.max_request_tokens(plan.max_batch_tokens)
    return EngineCore(
        Scheduler(kv_cache, max_batch_tokens=plan.max_batch_tokens),
        ModelRunner(model, plan),
        context_length=model.context_length if longest is None else min(model.context_length, longest),
        vocab_size=model.vocab_size,
    )
