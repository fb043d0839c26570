"""How large the KV pool and a step may be on this machine."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_server.config import memory_bytes
from mlx_server.engine.step_context import KVPools, RecurrentStates
from mlx_server.errors import ModelLoadError
from mlx_server.models.base import Model

log = logging.getLogger(__name__)

BLOCK_SIZE = 16  # tokens
MAX_RUNNING = 32  # requests in a step
MAX_SNAPSHOTS = 2 * MAX_RUNNING  # recurrent states of the past: one of each request's prompt, one of its answer
SNAPSHOT_SHARE = 0.25  # of the memory that they share with the KV pool
USEFUL_TOKENS = 64 * 1024  # a larger pool than this, or one whole context, helps nobody
LEAST_TOKENS = 1024  # a smaller pool serves nobody
CPU_SHARE = 0.7  # of the machine's memory
GPU_SHARE = 0.9  # of what the device recommends or has free
LOGITS_COPIES = 4  # of [MAX_RUNNING, V] float32, while tokens are drawn
LEAST_CACHE_BYTES = 256 << 20  # of freed buffers that MLX may keep
# A step's tokens: enough to keep the device busy, few enough that decodes beside a long prompt don't wait long.
MAX_BATCH_TOKENS = {mx.cpu: 256, mx.gpu: 2048}


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Where the memory goes, in bytes."""

    weights: int
    kv_cache: int
    states: int  # of recurrent layers, those of the past included
    scratch: int  # of one step, at most
    limit: int
    num_tokens: int  # in the KV cache

    def __str__(self) -> str:
        parts = {"weights": self.weights, "KV": self.kv_cache, "states": self.states, "scratch": self.scratch}
        total = sum(parts.values())
        unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
        shown = {part: f"{part} {size / unit:.1f}" for part, size in parts.items() if size}
        shown["KV"] += f" ({self.num_tokens:,} tokens)"
        return f"{' + '.join(shown.values())} = {total / unit:.1f} of {self.limit / unit:.1f} {name}"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    num_blocks: int
    block_size: int = BLOCK_SIZE
    max_batch_tokens: int = MAX_BATCH_TOKENS[mx.cpu]
    max_running: int = MAX_RUNNING
    num_snapshots: int = 0  # recurrent states of the past, each as large as that of a running request
    kv_bits: int | None = None  # of a key's or value's element; None: of the model's dtype

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size


def plan_memory(
    model: Model,
    *,
    limit: str | None = None,
    share: float = 1.0,
    step_bytes_per_token: int = 0,
    kv_bits: int | None = None,
) -> MemoryPlan:
    """Size the pool for `model`, whose weights are loaded, on the default device.

    Args:
        limit: what weights, caches and scratch may take together, such as 8GB or 80%; None: most of what is there.
        share: of what there would be beside the weights; less than 1 after memory ran out.
        step_bytes_per_token: of activations, see `warm_up.measure_step`.
        kv_bits: of the KV cache's elements; None: those of the model's dtype.
    Raises:
        ModelLoadError: `limit` leaves no room for the KV cache.
    """
    max_batch_tokens = int(share * MAX_BATCH_TOKENS[mx.default_device().type])
    scratch_bytes = _scratch_bytes(model, max_batch_tokens, step_bytes_per_token)
    limit_bytes, weight_bytes = _limit_bytes(limit, share), mx.get_active_memory()
    slot_bytes = RecurrentStates.bytes_per_slot(model.state_spec)
    block_bytes = BLOCK_SIZE * KVPools.bytes_per_token(model.kv_spec, kv_bits)
    budget_bytes = limit_bytes - weight_bytes - scratch_bytes - MAX_RUNNING * slot_bytes
    num_snapshots = 0
    if slot_bytes:
        num_snapshots = max(min(int(share * MAX_SNAPSHOTS), int(SNAPSHOT_SHARE * budget_bytes) // slot_bytes), 0)
    budget_bytes -= num_snapshots * slot_bytes
    useful_blocks = int(share * max(model.context_length, USEFUL_TOKENS)) // BLOCK_SIZE
    least_blocks = max(min(model.context_length, LEAST_TOKENS) // BLOCK_SIZE, 1)
    num_blocks = min(useful_blocks, budget_bytes // block_bytes)
    if num_blocks < least_blocks and share == 1.0:
        needed_bytes = limit_bytes - budget_bytes + least_blocks * block_bytes
        fault = (
            f"The model needs {needed_bytes / 1e9:.1f} GB with the smallest KV cache, and {limit_bytes / 1e9:.1f} GB"
        )
        if limit is not None:
            raise ModelLoadError(f"{fault} is the --memory-limit: raise it, or take a smaller or more quantized model.")
        log.warning("%s should be used on this machine: it may become slow, or run out of memory", fault)
    return MemoryPlan(max(num_blocks, least_blocks), BLOCK_SIZE, max_batch_tokens, MAX_RUNNING, num_snapshots, kv_bits)


def memory_use(
    model: Model, plan: MemoryPlan, *, limit: str | None = None, share: float = 1.0, step_bytes_per_token: int = 0
) -> MemoryUse:
    """What `plan` takes. Call it before the pools are made, with what `plan_memory` was given."""
    num_slots = plan.max_running + plan.num_snapshots
    return MemoryUse(
        weights=mx.get_active_memory(),
        kv_cache=plan.num_tokens * KVPools.bytes_per_token(model.kv_spec, plan.kv_bits),
        states=num_slots * RecurrentStates.bytes_per_slot(model.state_spec),
        scratch=_scratch_bytes(model, plan.max_batch_tokens, step_bytes_per_token),
        limit=_limit_bytes(limit, share),
        num_tokens=plan.num_tokens,
    )


def apply_limit(use: MemoryUse) -> None:
    """Tell MLX, which otherwise keeps any amount of freed buffers on a GPU."""
    if mx.default_device().type == mx.gpu:
        mx.set_memory_limit(use.limit)
        mx.set_cache_limit(max(2 * use.scratch, LEAST_CACHE_BYTES))


def _scratch_bytes(model: Model, max_batch_tokens: int, step_bytes_per_token: int) -> int:
    return max_batch_tokens * step_bytes_per_token + LOGITS_COPIES * MAX_RUNNING * model.vocab_size * mx.float32.size


def is_out_of_memory(error: Exception) -> bool:
    """The C++ standard's error, or MLX's, which is a RuntimeError that says so."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "malloc" in text or "out of memory" in text


def _limit_bytes(limit: str | None, share: float) -> int:
    """`limit`, or the default, of the default device, less what `share` takes from all but the weights."""
    if mx.default_device().type == mx.cpu:
        total = _machine_bytes()
        default = int(CPU_SHARE * total)
    else:
        info = mx.device_info()
        total = int(info.get("max_recommended_working_set_size") or info["total_memory"])  # Metal, else CUDA
        free = int(info.get("free_memory", total))  # CUDA: other programs may use the device too
        default = int(GPU_SHARE * min(total, free + mx.get_active_memory()))
    whole = default if limit is None else memory_bytes(limit, total)
    weights = min(mx.get_active_memory(), whole)
    return weights + int(share * (whole - weights))


def _machine_bytes() -> int:
    """The memory that this process may use: the machine's, or its container's."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    container = Path("/sys/fs/cgroup/memory.max")  # cgroup v2
    text = container.read_text().strip() if container.exists() else ""
    return min(total, int(text)) if text.isdigit() else total
