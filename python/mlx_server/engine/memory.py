"""How large the KV pool and a step may be on this machine."""

import os
from dataclasses import dataclass

import mlx.core as mx

from mlx_server.models.base import KVSpec, Model

BLOCK_SIZE = 16  # tokens
MAX_RUNNING = 32  # requests in a step
USEFUL_TOKENS = 64 * 1024  # a larger pool than this, or one whole context, helps nobody
CPU_SHARE = 0.1  # of the machine's memory
GPU_SHARE = 0.9  # of what the device recommends, weights included
# A step's tokens: enough to keep the device busy, few enough that decodes beside a long prompt don't wait long.
MAX_BATCH_TOKENS = {mx.cpu: 256, mx.gpu: 2048}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    num_blocks: int
    block_size: int
    max_batch_tokens: int
    max_running: int
    kv_bytes: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def plan_memory(model: Model) -> MemoryPlan:
    """Size the pool for `model`, whose weights are loaded, on the default device."""
    device = mx.default_device().type
    block_bytes = BLOCK_SIZE * bytes_per_token(model.kv_spec)
    useful_tokens = max(model.context_length, USEFUL_TOKENS)
    num_blocks = max(min(useful_tokens // BLOCK_SIZE, kv_budget_bytes() // block_bytes), 1)
    return MemoryPlan(num_blocks, BLOCK_SIZE, MAX_BATCH_TOKENS[device], MAX_RUNNING, num_blocks * block_bytes)


def bytes_per_token(spec: KVSpec) -> int:
    """Keys and values of one token in all layers."""
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * spec.dtype.size


def kv_budget_bytes() -> int:
    """What the KV pool may take: a share of RAM on the CPU, of what the weights leave on a GPU."""
    if mx.default_device().type == mx.cpu:
        return int(CPU_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    info = mx.device_info()
    total = info.get("max_recommended_working_set_size") or info["total_memory"]  # Metal, else CUDA
    return int(GPU_SHARE * int(total)) - mx.get_active_memory()
