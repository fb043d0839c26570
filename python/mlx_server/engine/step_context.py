"""What a model reads and writes beside its weights: KV pools and recurrent states, and one step's view of them."""

import mlx.core as mx

from mlx_server.engine.batch import BatchArrays, SlotCopies
from mlx_server.models.base import KVSpec, StateSpec
from mlx_server.ops.attention import AttentionBatch, copy_kv, new_kv_pool, paged_attention, pool_arrays, write_kv
from mlx_server.ops.copy_rows import copy_rows
from mlx_server.ops.gated_delta import gated_delta


class KVPools:
    """Keys and values [N, block_size, Hk, D] of every layer with attention, of `bits` bits or the spec's dtype."""

    def __init__(self, spec: KVSpec, num_blocks: int, block_size: int, bits: int | None = None) -> None:
        shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.layers = [new_kv_pool(shape, spec.dtype, bits=bits) for _ in range(spec.num_layers)]
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for pool in self.layers for array in pool_arrays(pool)]

    @staticmethod
    def bytes_per_token(spec: KVSpec, bits: int | None = None) -> int:
        head_bytes = spec.head_dim * spec.dtype.size if bits is None else spec.head_dim * bits // 8 + mx.float32.size
        return 2 * spec.num_layers * spec.num_kv_heads * head_bytes


class RecurrentStates:
    """What every recurrent layer holds in S slots, those of running requests and then those of saved states: the last
    inputs of its convolution [S, K - 1, C] and its state [S, Hv, Dv, Dk]."""

    def __init__(self, spec: StateSpec | None, num_slots: int) -> None:
        self.conv: list[mx.array] = []
        self.state: list[mx.array] = []
        if spec is None:
            return
        for _ in range(spec.num_layers):
            self.conv.append(mx.zeros((num_slots, spec.conv_kernel - 1, spec.conv_channels), spec.dtype))
            self.state.append(
                mx.zeros((num_slots, spec.num_value_heads, spec.value_head_dim, spec.key_head_dim), mx.float32)
            )
        mx.eval(self.conv, self.state)

    def copy(self, slots: SlotCopies) -> None:
        """Copy what some slots hold to others."""
        if slots.targets:
            self.conv = [copy_rows(conv, slots.sources, slots.targets) for conv in self.conv]
            self.state = [copy_rows(state, slots.sources, slots.targets) for state in self.state]

    @staticmethod
    def bytes_per_slot(spec: StateSpec | None) -> int:
        if spec is None:
            return 0
        conv_bytes = (spec.conv_kernel - 1) * spec.conv_channels * spec.dtype.size
        state_bytes = spec.num_value_heads * spec.value_head_dim * spec.key_head_dim * mx.float32.size
        return spec.num_layers * (conv_bytes + state_bytes)


class EngineStepContext:
    """`StepContext` of one step: attention through the block tables, recurrence through the slots."""

    def __init__(self, pools: KVPools, states: RecurrentStates, arrays: BatchArrays) -> None:
        self.positions = mx.array(arrays.positions)  # [T]
        self._pools = pools
        self._states = states
        self._slot_mapping = mx.array(arrays.slot_mapping)  # [T]
        self._batch = AttentionBatch(mx.array(arrays.block_tables), arrays.query_lens, arrays.context_lens)
        self._copied = arrays.copied
        self._slots = mx.array(arrays.slots)  # [B]
        self._query_lens = arrays.query_lens
        self._fresh = arrays.fresh

    def attend(
        self,
        layer: int,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        pools = self._pools.layers
        pools[layer] = write_kv(pools[layer], k, v, self._slot_mapping)
        if self._copied.targets:
            pools[layer] = copy_kv(pools[layer], self._copied.sources, self._copied.targets)
        return paged_attention(q, pools[layer], self._batch, scale=scale, window=window, softcap=softcap, sinks=sinks)

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
        states = self._states
        y, states.conv[layer], states.state[layer] = gated_delta(
            qkv,
            conv_weight,
            a,
            b,
            a_log,
            dt_bias,
            states.conv[layer],
            states.state[layer],
            slots=self._slots,
            query_lens=self._query_lens,
            fresh=self._fresh,
            num_key_heads=num_key_heads,
            key_head_dim=key_head_dim,
        )
        return y
