"""How the KV pool is sized, and what the start screen says of it."""

from dataclasses import dataclass

import mlx.core as mx
import pytest

from mlx_server.config import memory_bytes
from mlx_server.engine import memory
from mlx_server.engine.memory import MemoryUse, memory_use, plan_memory
from mlx_server.errors import ModelLoadError
from mlx_server.models.base import KVSpec, StateSpec

MB = 1_000_000
KV_SPEC = KVSpec(num_layers=10, num_kv_heads=4, head_dim=64, dtype=mx.float32)
KV_TOKEN_BYTES = 2 * 10 * 4 * 64 * 4


@dataclass
class Sized:
    """A model's sizes, without the model."""

    kv_spec: KVSpec = KV_SPEC
    state_spec: StateSpec | None = None
    context_length: int = 8192
    vocab_size: int = 1000


def test_the_pool_takes_what_weights_and_scratch_leave() -> None:
    model = Sized()
    plan = plan_memory(model, limit="400MB", step_bytes_per_token=1000)
    use = memory_use(model, plan, limit="400MB", step_bytes_per_token=1000)
    assert use.kv_cache == plan.num_tokens * KV_TOKEN_BYTES
    assert use.scratch >= plan.max_batch_tokens * 1000
    free = use.limit - use.weights - use.scratch - use.kv_cache
    assert 0 <= free < plan.block_size * KV_TOKEN_BYTES


def test_a_pool_is_not_larger_than_useful() -> None:
    assert plan_memory(Sized(), limit="1TB").num_tokens == memory.USEFUL_TOKENS
    long = Sized(context_length=2 * memory.USEFUL_TOKENS)
    assert plan_memory(long, limit="1TB").num_tokens == long.context_length


def test_states_and_snapshots_are_part_of_it() -> None:
    model = Sized(state_spec=StateSpec(10, 4, 512, 8, 64, 64, mx.float32))
    plan = plan_memory(model, limit="600MB")
    use = memory_use(model, plan, limit="600MB")
    assert plan.num_snapshots > 0 and use.states > 0
    assert use.weights + use.scratch + use.kv_cache + use.states <= use.limit


def test_a_limit_without_room_for_the_cache_is_refused_and_a_default_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelLoadError, match=r"needs 0\.\d GB .* 0\.0 GB is the --memory-limit"):
        plan_memory(Sized(), limit="2MB")
    monkeypatch.setattr(memory, "CPU_SHARE", 0.0)
    monkeypatch.setattr(memory, "GPU_SHARE", 0.0)
    assert plan_memory(Sized()).num_tokens == memory.LEAST_TOKENS
    assert "may become slow" in caplog.text


def test_a_share_makes_all_but_the_weights_smaller() -> None:
    model = Sized(state_spec=StateSpec(10, 4, 64, 8, 16, 16, mx.float32))
    for limit in "600MB", "1TB":
        whole, half = (plan_memory(model, limit=limit, share=share, step_bytes_per_token=1000) for share in (1.0, 0.5))
        uses = [
            memory_use(model, plan, limit=limit, share=share, step_bytes_per_token=1000)
            for plan, share in ((whole, 1.0), (half, 0.5))
        ]
        assert half.max_batch_tokens == whole.max_batch_tokens // 2
        assert 0.4 < half.num_blocks / whole.num_blocks <= 0.5 and half.num_snapshots <= whole.num_snapshots / 2
        assert uses[1].limit - uses[1].weights == pytest.approx((uses[0].limit - uses[0].weights) / 2, abs=1)
        assert uses[1].weights + uses[1].scratch + uses[1].kv_cache + uses[1].states <= uses[1].limit


def test_a_share_leaves_the_least() -> None:
    limit = "60MB"
    assert plan_memory(Sized(), limit=limit).num_tokens > memory.LEAST_TOKENS
    assert plan_memory(Sized(), limit=limit, share=1 / 8).num_tokens == memory.LEAST_TOKENS


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), True),
        (RuntimeError("cudaMallocAsync: out of memory"), True),
        (RuntimeError("the device is on fire"), False),
    ],
)
def test_errors_that_mean_too_little_memory(error: Exception, is_it: bool) -> None:
    assert memory.is_out_of_memory(error) is is_it


def test_what_the_start_screen_says() -> None:
    use = MemoryUse(4_600 * MB, 1_200 * MB, 0, 600 * MB, 21_300 * MB, 32_768)
    assert str(use) == "weights 4.6 + KV 1.2 (32,768 tokens) + scratch 0.6 = 6.4 of 21.3 GB"
    use = MemoryUse(1 * MB, 2 * MB, 3 * MB, 4 * MB, 100 * MB, 10)
    assert str(use) == "weights 1.0 + KV 2.0 (10 tokens) + states 3.0 + scratch 4.0 = 10.0 of 100.0 MB"


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("1.5 gb", 1.5e9), ("512MiB", 2**29), ("80%", 800 * MB), ("0.5TB", 5e11), ("100%", 1000 * MB)],
)
def test_amounts(text: str, size: float) -> None:
    assert memory_bytes(text, 1000 * MB) == size


@pytest.mark.parametrize("text", ["", "8", "-8GB", "101%", "0%", "0.1MB", "8GBs", "9999999PB", "٣GB"])
def test_wrong_amounts(text: str) -> None:
    with pytest.raises(ValueError, match="an amount such as 8GB"):
        memory_bytes(text, 1000 * MB)
