"""The C++ core of mlx-server."""

from collections.abc import Sequence
import enum

import mlx.core


def array_size(array: mlx.core.array) -> int:
    """
    Number of elements. The import's self-check calls it: it fails if mx.array is a foreign type here.
    """

def copy_rows(pool: mlx.core.array, from_rows: Sequence[int], to_rows: Sequence[int]) -> mlx.core.array:
    """ops.copy_rows documents it."""

def disable_kernel(name: str) -> None: ...

def set_batch_invariant(wanted: bool) -> None: ...

def is_batch_invariant() -> bool: ...

def take_launched_kernels() -> list[str]: ...

def simulate_gpu(function: object | None) -> None:
    """
    Lets ops on the CPU take the way of an NVIDIA GPU's, and a function compute the outputs of kernels: `function(name, text, inputs, output_shapes, output_dtypes, constants, groups, threads)`. None ends that. For tests.
    """

class BlockPool:
    """
    Which of the KV cache's fixed-size blocks are free, and how many owners the others have.

    Blocks 0 ... num_blocks - 1. An owner is whoever called `allocate` or `retain`. When its last owner releases a block it
    is free again; or, if it is in a `PrefixTree`, idle: kept until it is evicted there. Calls that raise change nothing.
    Not thread safe.
    """

    def __init__(self, num_blocks: int) -> None: ...

    def allocate(self, n: int) -> list[int] | None:
        """
        n blocks with one owner each, or None if fewer than n are free. ValueError if n is negative.
        """

    def retain(self, ids: Sequence[int]) -> None:
        """
        One more owner for each id. IndexError for an id outside the pool, ValueError for a free block.
        """

    def release(self, ids: Sequence[int], client: str = '') -> None:
        """
        One owner less for each id; of those that become idle, the last is the client's last to be evicted. IndexError for an id outside the pool, ValueError for a block without owner left.
        """

    def ref_count(self, id: int) -> int:
        """Owners of a block, 0 if it is free or idle. IndexError."""

    def is_cached(self, id: int) -> bool:
        """Whether a block is in a tree. IndexError."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_free(self) -> int: ...

    @property
    def num_idle(self) -> int:
        """Blocks without owner that a tree keeps."""

    def check_integrity(self) -> None:
        """
        RuntimeError unless each block is either owned, or exactly once in the list of its state.
        """

class PrefixTree:
    """
    Finds the blocks that already hold the KV of a request's first tokens.

    A radix tree over token ids whose every edge is one block, full but at the ends of requests. Paths of different salts
    have nothing in common. Tokens are compared, not only their hashes. The tree owns no block: whoever uses one retains it.
    Not thread safe.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None: ...

    def match(self, salt: str, after: int | None, tokens: Sequence[int]) -> list[int]:
        """
        The blocks that hold `tokens`, as many in a row as there are, full ones only; `after` is the block of the tokens before, None where a request begins. IndexError if `after` is outside the pool.
        """

    def match_part(self, salt: str, after: int | None, tokens: Sequence[int]) -> tuple[int, int, bool] | None:
        """
        Of the blocks that follow on `after`, of which the newest 32 are looked at, the one that begins with most of `tokens`; how many these are; whether they are all that it holds. None: there is none. IndexError.
        """

    def insert(self, salt: str, after: int | None, tokens: Sequence[int], block: int) -> int | None:
        """
        Lets others find an owned block, which holds the `tokens` that follow on `after`: block_size, or fewer if it is the unfinished end of a request, which may be inserted again with more. The tree's block for these tokens: `block` or one that was there before; None if `after` has left the tree. ValueError for another number of tokens, a block that nobody owns or that holds other tokens in the tree.
        """

    def evict(self, n: int) -> list[int]:
        """
        Takes idle blocks out, and what follows on them, until n more are free or none is idle: first the one that was released longest ago of the client with the most. The blocks that left the tree.
        """

    def remove(self, block: int) -> list[int]:
        """
        Takes a block out, and what follows on it; the blocks that left the tree. IndexError.
        """

    def clear(self) -> None:
        """Takes all blocks out."""

    @property
    def num_blocks(self) -> int: ...

    def check_integrity(self) -> None:
        """
        RuntimeError unless each block of the tree can be found by its tokens, and no other block is cached.
        """

def rms_norm(x: mlx.core.array, weight: mlx.core.array, eps: float) -> mlx.core.array: ...

def silu_mul(x: mlx.core.array, up: mlx.core.array | None = None) -> mlx.core.array: ...

def gelu_mul(x: mlx.core.array, up: mlx.core.array | None = None) -> mlx.core.array: ...

def silu_mul_fallback(x: mlx.core.array, up: mlx.core.array | None = None) -> mlx.core.array: ...

def gelu_mul_fallback(x: mlx.core.array, up: mlx.core.array | None = None) -> mlx.core.array: ...

def qkv_rope(qkv: mlx.core.array, positions: mlx.core.array, freqs: mlx.core.array, norms: mlx.core.array | None = None, *, num_heads: int, num_kv_heads: int, eps: float, length_factor: float, gated: bool) -> tuple[mlx.core.array, mlx.core.array, mlx.core.array]: ...

def qkv_rope_fallback(qkv: mlx.core.array, positions: mlx.core.array, freqs: mlx.core.array, norms: mlx.core.array | None = None, *, num_heads: int, num_kv_heads: int, eps: float, length_factor: float, gated: bool) -> tuple[mlx.core.array, mlx.core.array, mlx.core.array]: ...

def gated_delta(qkv: mlx.core.array, conv_weight: mlx.core.array, a: mlx.core.array, b: mlx.core.array, a_log: mlx.core.array, dt_bias: mlx.core.array, conv_state: mlx.core.array, state: mlx.core.array, *, slots: mlx.core.array, query_lens: Sequence[int], fresh: Sequence[bool], num_key_heads: int, key_head_dim: int) -> tuple[mlx.core.array, mlx.core.array, mlx.core.array]:
    """ops.gated_delta documents it."""

def gated_delta_fallback(qkv: mlx.core.array, conv_weight: mlx.core.array, a: mlx.core.array, b: mlx.core.array, a_log: mlx.core.array, dt_bias: mlx.core.array, conv_state: mlx.core.array, state: mlx.core.array, *, slots: mlx.core.array, query_lens: Sequence[int], fresh: Sequence[bool], num_key_heads: int, key_head_dim: int) -> tuple[mlx.core.array, mlx.core.array, mlx.core.array]:
    """The specification of `gated_delta` in MLX's own ops, for tests."""

def linear(x: mlx.core.array, weight: mlx.core.array) -> mlx.core.array: ...

def quantized_linear(x: mlx.core.array, weight: mlx.core.array, scales: mlx.core.array, biases: mlx.core.array | None, *, group_size: int, bits: int, mode: str) -> mlx.core.array: ...

class ExpertMatrix:
    """
    One projection [N, K] of all E experts, stacked.

    weight [E, N, K] is plain, floating point, if scales is None. Else it is uint32 [E, N, K * bits / 32] with scales
    [E, N, K / group_size] as `mx.quantize` stores them in `mode`; in the mode affine there are biases like scales.
    """

    def __init__(self, weight: mlx.core.array, scales: mlx.core.array | None = None, biases: mlx.core.array | None = None, *, group_size: int = 0, bits: int = 0, mode: str = 'affine') -> None: ...

    @property
    def weight(self) -> mlx.core.array: ...

    @property
    def scales(self) -> mlx.core.array | None: ...

    @property
    def biases(self) -> mlx.core.array | None: ...

    @property
    def group_size(self) -> int: ...

    @property
    def bits(self) -> int: ...

    @property
    def mode(self) -> str: ...

class Scoring(enum.Enum):
    SOFTMAX = 0

    SIGMOID = 1

def route(logits: mlx.core.array, *, top_k: int, scoring: Scoring, normalize: bool) -> tuple[mlx.core.array, mlx.core.array]: ...

def route_fallback(logits: mlx.core.array, *, top_k: int, scoring: Scoring, normalize: bool) -> tuple[mlx.core.array, mlx.core.array]:
    """The specification of `route` in MLX's own ops, for tests."""

def moe_mlp(x: mlx.core.array, experts: mlx.core.array, weights: mlx.core.array, *, gate: ExpertMatrix, up: ExpertMatrix, down: ExpertMatrix, shared: mlx.core.array | None = None) -> mlx.core.array: ...

def moe_mlp_fallback(x: mlx.core.array, experts: mlx.core.array, weights: mlx.core.array, *, gate: ExpertMatrix, up: ExpertMatrix, down: ExpertMatrix, shared: mlx.core.array | None = None) -> mlx.core.array:
    """The specification of `moe_mlp` in MLX's own ops, for tests."""

class KVPool:
    """
    One layer's keys and values [N, block_size, Hk, D].

    With scales, float32 [N, block_size, Hk] each, they are int8, to be multiplied by the scale of their token and head.
    """

    def __init__(self, keys: mlx.core.array, values: mlx.core.array, key_scales: mlx.core.array | None = None, value_scales: mlx.core.array | None = None) -> None: ...

    @property
    def keys(self) -> mlx.core.array: ...

    @property
    def values(self) -> mlx.core.array: ...

    @property
    def key_scales(self) -> mlx.core.array | None: ...

    @property
    def value_scales(self) -> mlx.core.array | None: ...

def new_kv_pool(shape: tuple[int, int, int, int], dtype: mlx.core.Dtype, *, bits: int | None = None) -> KVPool: ...

def write_kv(pool: KVPool, k: mlx.core.array, v: mlx.core.array, slot_mapping: mlx.core.array) -> KVPool: ...

def write_kv_fallback(pool: KVPool, k: mlx.core.array, v: mlx.core.array, slot_mapping: mlx.core.array) -> KVPool:
    """The specification of `write_kv`, rounded by MLX's own ops, for tests."""

def copy_kv(pool: KVPool, from_slots: Sequence[int], to_slots: Sequence[int]) -> KVPool: ...

class AttentionBatch:
    """
    Where the rows of a ragged batch lie: what a step's layers share.

    Row b's queries are the last `query_lens[b]` of its `context_lens[b]` tokens. block_tables: [B, M] int32, the blocks of
    each row in order; entries behind the context are not read, the values of the others are not checked. query_lens,
    context_lens: B integers, 1 <= query_len <= context_len. ValueError if shapes, dtypes or lengths don't fit.
    """

    def __init__(self, block_tables: mlx.core.array, query_lens: Sequence[int], context_lens: Sequence[int]) -> None: ...

def paged_attention(q: mlx.core.array, pool: KVPool, batch: AttentionBatch, *, scale: float, window: int | None = None, softcap: float | None = None, sinks: mlx.core.array | None = None) -> mlx.core.array: ...

def paged_attention_fallback(q: mlx.core.array, pool: KVPool, batch: AttentionBatch, *, scale: float, window: int | None = None, softcap: float | None = None, sinks: mlx.core.array | None = None) -> mlx.core.array:
    """The specification of `paged_attention` in MLX's own ops, for tests."""

def sample(logits: mlx.core.array, rows: mlx.core.array, *, masks: mlx.core.array, bias_ids: mlx.core.array, bias_values: mlx.core.array, history: mlx.core.array, breakers: mlx.core.array) -> tuple[mlx.core.array, mlx.core.array, mlx.core.array, mlx.core.array]:
    """ops.sampling documents it."""

def sample_fallback(logits: mlx.core.array, rows: mlx.core.array, *, masks: mlx.core.array, bias_ids: mlx.core.array, bias_values: mlx.core.array, history: mlx.core.array, breakers: mlx.core.array) -> tuple[mlx.core.array, mlx.core.array, mlx.core.array, mlx.core.array]:
    """The specification of `sample` in MLX's own ops, for tests."""
