"""What a KV cache of 8 bits costs in accuracy, on the demo model."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.engine.step_context import KVPools
from mlx_server.models.base import KVSpec
from mlx_server.models.loader import load_model
from mlx_server.ops.attention import AttentionBatch, paged_attention, write_kv


def test_eight_bits_take_a_quarter_of_float32():
    spec = KVSpec(num_layers=30, num_kv_heads=3, head_dim=64, dtype=mx.float32)
    assert KVPools.bytes_per_token(spec) == 2 * 30 * 3 * 64 * 4
    pools = KVPools(spec, num_blocks=2, block_size=16, bits=8)
    assert KVPools.bytes_per_token(spec, 8) * 32 == sum(array.nbytes for array in pools.arrays)
    assert KVPools.bytes_per_token(spec, 8) < 0.27 * KVPools.bytes_per_token(spec)


@pytest.mark.model
def test_perplexity_and_logits_stay_near(demo_gguf):
    model = load_model(str(demo_gguf))
    token_ids = Tokenizer.load(demo_gguf).encode((Path(__file__).parents[1] / "data" / "prose.txt").read_text())
    exact, rounded = (prompt_logits(model, token_ids, bits) for bits in (None, 8))
    assert np.abs(exact - rounded).max() < 1.5
    assert np.sqrt(((exact - rounded) ** 2).mean()) < 0.15
    assert perplexity(rounded, token_ids) == pytest.approx(perplexity(exact, token_ids), rel=3e-3)


class OnePrompt:
    """`StepContext` of one prompt in one piece, over a pool of so many bits."""

    def __init__(self, spec: KVSpec, num_tokens: int, bits: int | None) -> None:
        self.positions = mx.arange(num_tokens)
        self._pools = KVPools(spec, num_blocks=1, block_size=num_tokens, bits=bits).layers
        self._batch = AttentionBatch(mx.zeros((1, 1), mx.int32), [num_tokens], [num_tokens])

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, **options) -> mx.array:
        pool = write_kv(self._pools[layer], k, v, self.positions)
        return paged_attention(q, pool, self._batch, **options)


def prompt_logits(model, token_ids: list[int], bits: int | None) -> np.ndarray:
    """[T, V]"""
    ctx = OnePrompt(model.kv_spec, len(token_ids), bits)
    return np.array(model.logits(model(mx.array(token_ids), ctx)).astype(mx.float32), np.float64)


def perplexity(logits: np.ndarray, token_ids: list[int]) -> float:
    logprobs = logits[:-1] - np.logaddexp.reduce(logits[:-1], axis=-1, keepdims=True)
    return float(np.exp(-logprobs[np.arange(len(token_ids) - 1), token_ids[1:]].mean()))
