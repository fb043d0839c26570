"""How large the KV pool and a step may be on this machine."""

import os
from dataclasses import dataclass

import mlx.core as mx

from mlx_server.engine.step_context import KVPools, RecurrentStates
from mlx_server.models.base import Model

BLOCK_SIZE = 16  # tokens
MAX_RUNNING = 32  # requests in a step
MAX_SNAPSHOTS = 2 * MAX_RUNNING  # recurrent states of the past: one of each request's prompt, one of its answer
SNAPSHOT_SHARE = 0.25  # of the memory that they share with the KV pool
USEFUL_TOKENS = 64 * 1024  # a larger pool than this, or one whole context, helps nobody
CPU_SHARE = 0.1  # of the machine's memory
GPU_SHARE = 0.9  # of what the device recommends, weights included
# A step's tokens: enough to keep the device busy, few enough that decodes beside a long prompt don't wait long.
MAX_BATCH_TOKENS = {mx.cpu: 256, mx.gpu: 2048}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    num_blocks: int
    block_size: int = BLOCK_SIZE
    max_batch_tokens: int = MAX_BATCH_TOKENS[mx.cpu]
    max_running: int = MAX_RUNNING
    num_snapshots: int = 0  # recurrent states of the past, each as large as that of a running request

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def plan_memory(model: Model) -> MemoryPlan:
    """Size the pool for `model`, whose weights are loaded, on the default device."""
    slot_bytes = RecurrentStates.bytes_per_slot(model.state_spec)
    budget_bytes = cache_budget_bytes() - MAX_RUNNING * slot_bytes
    num_snapshots = max(min(MAX_SNAPSHOTS, int(SNAPSHOT_SHARE * budget_bytes) // slot_bytes), 0) if slot_bytes else 0
    budget_bytes -= num_snapshots * slot_bytes
    block_bytes = BLOCK_SIZE * KVPools.bytes_per_token(model.kv_spec)
    useful_blocks = max(model.context_length, USEFUL_TOKENS) // BLOCK_SIZE
    return MemoryPlan(
        num_blocks=max(min(useful_blocks, budget_bytes // block_bytes), 1),
        max_batch_tokens=MAX_BATCH_TOKENS[mx.default_device().type],
        num_snapshots=num_snapshots,
    )


def cache_budget_bytes() -> int:
    """What KV pool and recurrent states may take: a share of RAM on the CPU, of what the weights leave on a GPU."""
    if mx.default_device().type == mx.cpu:
        return int(CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    info = mx.device_info()
    total = info.get("max_recommended_working_set_size") or info["total_memory"]  # Metal, else CUDA
    return int(GPU_SHARE * int(total)) - mx.get_active_memory()
