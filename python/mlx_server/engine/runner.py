"""Batches on the device: the model, the KV pools and the sampler."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_server.engine.batch import Batch, BatchArrays, StepResult
from mlx_server.models.base import KVSpec, Model
from mlx_server.ops.attention import new_kv_pool, paged_attention, write_kv
from mlx_server.ops.sampling import sample


class KVPools:
    """Keys and values of every layer: [N, block_size, Hk, D] each."""

    def __init__(self, spec: KVSpec, num_blocks: int, block_size: int) -> None:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.keys = [new_kv_pool(shape, spec.dtype) for _ in range(spec.num_layers)]
        self.values = [new_kv_pool(shape, spec.dtype) for _ in range(spec.num_layers)]
        mx.eval(self.keys, self.values)


class PagedAttentionContext:
    """`StepContext` of one step: writes the new KV into the pools and attends through the block tables."""

    def __init__(self, pools: KVPools, arrays: BatchArrays) -> None:
        self.positions = mx.array(arrays.positions)  # [T]
        self._pools = pools
        self._slot_mapping = mx.array(arrays.slot_mapping)  # [T]
        self._block_tables = mx.array(arrays.block_tables)  # [B, M]
        self._query_lens = arrays.query_lens
        self._context_lens = arrays.context_lens

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, *, scale: float, window: int | None = None
    ) -> mx.array:
        pools = self._pools
        pools.keys[layer], pools.values[layer] = write_kv(
            pools.keys[layer], pools.values[layer], k, v, self._slot_mapping
        )
        return paged_attention(
            q,
            pools.keys[layer],
            pools.values[layer],
            block_tables=self._block_tables,
            query_lens=self._query_lens,
            context_lens=self._context_lens,
            scale=scale,
            window=window,
        )

    def gated_delta(
        self,
        layer: int,
        qkv: mx.array,
        conv_weight: mx.array,
        a: mx.array,
        b: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        *,
        num_key_heads: int,
        key_head_dim: int,
    ) -> mx.array:
        raise NotImplementedError("the engine has no slots for recurrent states")


@dataclass(frozen=True, slots=True)
class _Step:
    batch: Batch
    token_ids: mx.array  # [R] uint32; R may be 0


class ModelRunner:
    """Runs one batch after the other; the newest may be in flight."""

    def __init__(self, model: Model, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._in_flight: _Step | None = None
        self._pools = self._new_pools()

    @property
    def in_flight(self) -> Batch | None:
        return self._in_flight.batch if self._in_flight else None

    def run(self, batch: Batch) -> StepResult | None:
        previous = self._in_flight
        self._in_flight = self._launch(batch, previous) if batch.rows else None
        if previous is None:
            return None
        return StepResult(previous.batch, previous.token_ids.tolist())  # type: ignore[arg-type]

    def reset(self) -> None:
        self._in_flight = None
        self._pools = self._new_pools()

    def _new_pools(self) -> KVPools:
        return KVPools(self._model.kv_spec, self._num_blocks, self._block_size)

    def _launch(self, batch: Batch, previous: _Step | None) -> _Step:
        arrays = BatchArrays.build(batch, previous.batch if previous else None, self._block_size)
        token_ids = mx.array(arrays.token_ids)  # [T]
        if previous is not None and arrays.awaits_previous:
            # An invalid token (its request fails when it is read back) must still be a row of the embedding.
            drawn = mx.minimum(previous.token_ids, self._model.vocab_size - 1).astype(mx.int32)
            token_ids = mx.concatenate([token_ids, drawn])[mx.array(arrays.token_sources)]
        hidden = self._model(token_ids, PagedAttentionContext(self._pools, arrays))  # [T, hidden]
        if arrays.sampled.size:
            drawn = self._sample(hidden, arrays)
        else:
            drawn = mx.zeros(0, mx.uint32)
        mx.async_eval(drawn, self._pools.keys, self._pools.values)
        return _Step(batch, drawn)

    def _sample(self, hidden: mx.array, arrays: BatchArrays) -> mx.array:
        logits = self._model.logits(hidden[mx.array(arrays.sampled)])  # [R, V]
        return sample(
            logits,
            temperature=mx.array(arrays.temperature),
            top_k=mx.array(arrays.top_k),
            top_p=mx.array(arrays.top_p),
            min_p=mx.array(arrays.min_p),
            seed=mx.array(arrays.seed),
            position=mx.array(arrays.sample_positions),
        )  # [R]
