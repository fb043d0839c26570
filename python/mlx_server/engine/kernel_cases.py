"""What a model computes with portable kernels, on small random batches beside the references.

The model itself says what its layers ask for: it is called, lazily, with a context that only takes notes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_server.engine.kernel_check import Check
from mlx_server.models.base import KVSpec, Model, StateSpec
from mlx_server.models.layers import Matrix, QuantizedMatrix
from mlx_server.models.moe import SparseMoE
from mlx_server.ops import fallbacks
from mlx_server.ops.activation import gelu_mul, silu_mul
from mlx_server.ops.attention import AttentionBatch, KVPool, new_kv_pool, paged_attention, pool_arrays, write_kv
from mlx_server.ops.gated_delta import gated_delta
from mlx_server.ops.kernels import is_batch_invariant
from mlx_server.ops.moe import moe_mlp, route
from mlx_server.ops.rope import qkv_rope
from mlx_server.ops.sampling import SampleTables, make_rows, sample, sample_fallback

BLOCK_SIZE = 16
ATTENTION_ROWS = {"decode": [(1, 37), (1, 300)], "prefill": [(40, 40), (24, 290)]}  # queries and context of each row
STATE_ROWS = {"decode": [1, 1], "prefill": [70, 20]}  # tokens of each row
LINEAR_TOKENS = {f"decode of {tokens}": tokens for tokens in (1, 3, 8, 12, 40)}
INVARIANT_TOKENS = 20  # more than a tile's rows
SAMPLED_TOP = 20  # log-probabilities


@dataclass(frozen=True, slots=True)
class AttentionCall:
    num_heads: int
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class StateCall:
    """conv_weight [C, K], a_log [Hv] and dt_bias [Hv] are the layer's own."""

    conv_weight: mx.array
    a_log: mx.array
    dt_bias: mx.array
    num_key_heads: int
    key_head_dim: int


class Notes:
    """A `StepContext` of one token that computes nothing."""

    def __init__(self) -> None:
        self.positions = mx.zeros(1, mx.int32)
        self.attention: set[AttentionCall] = set()
        self.state: StateCall | None = None  # all recurrent layers are alike

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
        self.attention.add(AttentionCall(q.shape[1], scale, window, softcap, sinks is not None))
        return q

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
        self.state = StateCall(conv_weight, a_log, dt_bias, num_key_heads, key_head_dim)
        values = conv_weight.shape[0] - 2 * num_key_heads * key_head_dim
        return mx.zeros((qkv.shape[0], a.shape[1], values // a.shape[1]), qkv.dtype)


def kernel_cases(model: Model, kv_bits: int | None) -> Iterator[Check]:
    """Of every op that the model uses and that has kernels for GPUs."""
    notes = Notes()
    model(mx.zeros(1, mx.int32), notes)
    yield from elementwise_cases(model.kv_spec)
    if notes.attention and kv_bits is not None:
        yield quantize_case(model.kv_spec, kv_bits)
    for call in notes.attention:
        for name, lens in ATTENTION_ROWS.items():
            yield attention_case(f"attention ({name})", model.kv_spec, kv_bits, call, lens)
    if notes.state is not None and model.state_spec is not None:
        for name, query_lens in STATE_ROWS.items():
            yield state_case(f"gated delta ({name})", model.state_spec, notes.state, query_lens)
    for matrix in {_matrix_form(matrix): matrix for matrix in model.matrices}.values():
        yield from linear_cases(matrix)
    for block in {_form(block): block for block in model.sparse_blocks}.values():
        yield from block_cases(block, model.kv_spec.dtype)
    yield sampling_case("sampling", model.vocab_size, adjusted=False)
    yield sampling_case("sampling with penalties and a mask", model.vocab_size, adjusted=True)


def normal(shape: Sequence[int], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype)


def elementwise_cases(spec: KVSpec) -> Iterator[Check]:
    gate, up = (normal((3, 1024), spec.dtype, seed) for seed in (1, 2))
    yield Check("silu", lambda: [silu_mul(gate, up)], lambda: [fallbacks.silu_mul_fallback(gate, up)])
    yield Check("gelu", lambda: [gelu_mul(gate)], lambda: [fallbacks.gelu_mul_fallback(gate)])
    num_kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    qkv = normal((3, (4 + 2 * num_kv_heads) * head_dim), spec.dtype)
    positions, freqs = mx.array([0, 7, 3000], mx.int32), mx.arange(1, head_dim // 2 + 1).astype(mx.float32)
    norms = normal((2, head_dim), mx.float32, 3)

    def turned(op: Callable[..., tuple[mx.array, mx.array, mx.array]]) -> list[mx.array]:
        heads = {"num_heads": 2, "num_kv_heads": num_kv_heads}
        return list(op(qkv, positions, freqs, norms, **heads, eps=1e-6, length_factor=1.2, gated=True))

    yield Check("rope", lambda: turned(qkv_rope), lambda: turned(fallbacks.qkv_rope_fallback))


def quantize_case(spec: KVSpec, bits: int) -> Check:
    num_tokens = 2 * BLOCK_SIZE
    k, v = (normal((num_tokens, spec.num_kv_heads, spec.head_dim), spec.dtype, seed) for seed in (1, 2))

    def values(pool: KVPool) -> list[mx.array]:
        """The numbers that the integers stand for: two roundings may fall to either side."""
        pairs = ((pool.keys, pool.key_scales), (pool.values, pool.value_scales))
        return [array.astype(mx.float32) * scales[..., None] for array, scales in pairs if scales is not None]

    def arguments() -> tuple[KVPool, mx.array, mx.array, mx.array]:
        pool = new_kv_pool((2, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim), spec.dtype, bits=bits)
        return pool, k, v, mx.arange(num_tokens, dtype=mx.int32)

    return Check(
        "an 8-bit KV cache",
        lambda: values(write_kv(*arguments())),
        lambda: values(fallbacks.write_kv_fallback(*arguments())),
    )


def attention_case(
    name: str, spec: KVSpec, kv_bits: int | None, call: AttentionCall, lens: list[tuple[int, int]]
) -> Check:
    """lens: queries and context of each row."""
    blocks = [-(-context_len // BLOCK_SIZE) for _, context_len in lens]
    table = np.zeros((len(lens), max(blocks)), np.int32)
    for row, (begin, count) in enumerate(zip(np.cumsum([0, *blocks]), blocks, strict=False)):
        table[row, :count] = np.arange(begin, begin + count)
    num_tokens = sum(blocks) * BLOCK_SIZE
    k, v = (normal((num_tokens, spec.num_kv_heads, spec.head_dim), spec.dtype, seed) for seed in (1, 2))
    pool = new_kv_pool((sum(blocks), BLOCK_SIZE, spec.num_kv_heads, spec.head_dim), spec.dtype, bits=kv_bits)
    pool = write_kv(pool, k, v, mx.arange(num_tokens, dtype=mx.int32))
    mx.eval(pool_arrays(pool))
    query_lens, context_lens = (list(column) for column in zip(*lens, strict=True))
    batch = AttentionBatch(mx.array(table), query_lens, context_lens)
    q = normal((sum(query_lens), call.num_heads, spec.head_dim), spec.dtype)
    sinks = normal((call.num_heads,), spec.dtype, 3) if call.has_sinks else None
    scale, window, softcap = call.scale, call.window, call.softcap
    return Check(
        name,
        lambda: [paged_attention(q, pool, batch, scale=scale, window=window, softcap=softcap, sinks=sinks)],
        lambda: [
            fallbacks.paged_attention_fallback(q, pool, batch, scale=scale, window=window, softcap=softcap, sinks=sinks)
        ],
    )


def state_case(name: str, spec: StateSpec, call: StateCall, query_lens: list[int]) -> Check:
    num_tokens, heads, num_slots = sum(query_lens), spec.num_value_heads, len(query_lens) + 1
    qkv = normal((num_tokens, spec.conv_channels), spec.dtype)
    a, b = (normal((num_tokens, heads), spec.dtype, seed) for seed in (1, 2))

    def states() -> tuple[mx.array, mx.array]:
        """New ones for each call, which takes them over."""
        conv = normal((num_slots, spec.conv_kernel - 1, spec.conv_channels), spec.dtype, 3)
        state = 0.1 * normal((num_slots, heads, spec.value_head_dim, spec.key_head_dim), mx.float32, 4)
        return conv, state

    slots, fresh = mx.arange(1, num_slots, dtype=mx.int32), [False] * (len(query_lens) - 1) + [True]

    def compute(op: Callable[..., Sequence[mx.array]]) -> Sequence[mx.array]:
        return op(
            qkv,
            call.conv_weight,
            a,
            b,
            call.a_log,
            call.dt_bias,
            *states(),
            slots=slots,
            query_lens=query_lens,
            fresh=fresh,
            num_key_heads=call.num_key_heads,
            key_head_dim=call.key_head_dim,
        )

    return Check(name, lambda: compute(gated_delta), lambda: compute(fallbacks.gated_delta_fallback))


def linear_cases(matrix: Matrix | QuantizedMatrix) -> Iterator[Check]:
    """Of few tokens: many are MLX's, and so are plain matrices, but for the batch-invariant mode."""
    if is_batch_invariant():
        yield linear_case("linear", matrix, INVARIANT_TOKENS)
        yield invariance_case(matrix)
    elif isinstance(matrix, QuantizedMatrix):
        yield from (linear_case(f"linear ({name})", matrix, tokens) for name, tokens in LINEAR_TOKENS.items())


def linear_case(name: str, matrix: Matrix | QuantizedMatrix, num_tokens: int) -> Check:
    x = normal((num_tokens, matrix.num_columns), matrix.dtype)

    def dense() -> mx.array:
        if isinstance(matrix, Matrix):
            return matrix.weight
        group_size, bits, mode = matrix.quantization.group_size, matrix.quantization.bits, matrix.quantization.mode
        arrays = matrix.weight, matrix.scales, matrix.biases
        return mx.dequantize(*arrays, group_size=group_size, bits=bits, mode=mode, dtype=matrix.dtype)

    return Check(name, lambda: [matrix.linear(x)], lambda: [x @ dense().T])


def invariance_case(matrix: Matrix | QuantizedMatrix) -> Check:
    """Kernels are compiled for the rows of a tile: the compiler might order a row's sums by them."""
    x = normal((INVARIANT_TOKENS, matrix.num_columns), matrix.dtype)
    parts = [x[:1], x[1:4], x[4:]]
    return Check(
        "linear (of rows alone)",
        lambda: [matrix.linear(x)],
        lambda: [mx.concatenate([matrix.linear(part) for part in parts])],
        exact=True,
    )


def routing_case(name: str, block: SparseMoE, logits: mx.array) -> Check:
    top_k, normalize, scoring = block.top_k, block.normalize, fallbacks.Scoring.SOFTMAX
    return Check(
        name,
        lambda: route(logits, top_k=top_k, normalize=normalize),
        lambda: fallbacks.route_fallback(logits, top_k=top_k, scoring=scoring, normalize=normalize),
    )


def expert_case(name: str, block: SparseMoE, x: mx.array, experts: mx.array, weights: mx.array) -> Check:
    gate, up, down = block.gate_proj, block.up_proj, block.down_proj
    return Check(
        name,
        lambda: [moe_mlp(x, experts, weights, gate=gate, up=up, down=down, shared=x)],
        lambda: [fallbacks.moe_mlp_fallback(x, experts, weights, gate=gate, up=up, down=down, shared=x)],
    )


def block_cases(block: SparseMoE, dtype: mx.Dtype) -> Iterator[Check]:
    """Of few tokens and of many, which go different ways."""
    num_experts, features = block.gate_proj.weight.shape[0], block.down_proj.weight.shape[1]
    for name, num_tokens in {"decode": 2, "prefill": num_experts // block.top_k + 9}.items():
        routing = routing_case(f"routing ({name})", block, normal((num_tokens, num_experts), dtype, 1))
        yield routing
        yield expert_case(f"experts ({name})", block, normal((num_tokens, features), dtype, 2), *routing.reference())


def sampling_case(name: str, vocab_size: int, *, adjusted: bool) -> Check:
    """A greedy row, one drawn with filters, one drawn from all."""
    logits = 4 * normal((3, vocab_size), mx.float32)  # few likely tokens, so that rounding moves no draw
    rows = make_rows(3, seed=[1, 2, 3], temperature=[0, 0.8, 1], top_k=[0, 20, 0], top_p=[1, 0.9, 1])
    rows["num_logprobs"] = SAMPLED_TOP if not adjusted else 0
    tables = SampleTables()
    if adjusted:
        history = np.random.default_rng(1).integers(0, vocab_size, 64).astype(np.int32)
        ids = mx.array([0, vocab_size - 1], mx.int32)
        masks = mx.full((1, -(-vocab_size // 32)), 0x55555555, mx.uint32)  # every second token is allowed
        tables = SampleTables(masks, ids, mx.array([-2.0, 3.0]), history=mx.array(history))
        rows["mask_row"] = 0
        rows["bias_end"], rows["history_end"] = 2, len(history)
        rows["repetition_penalty"], rows["frequency_penalty"], rows["presence_penalty"] = 1.2, 0.3, 0.2
    return Check(name, lambda: sample(logits, rows, tables), lambda: sample_fallback(logits, rows, tables))


def _matrix_form(matrix: Matrix | QuantizedMatrix) -> tuple[object, ...]:
    return matrix.weight.shape, matrix.quantization if isinstance(matrix, QuantizedMatrix) else None


def _form(block: SparseMoE) -> tuple[object, ...]:
    """What its kernels are compiled for."""
    matrices = block.gate_proj, block.up_proj, block.down_proj
    return tuple((m.weight.shape, m.weight.dtype, m.group_size, m.bits, m.mode) for m in matrices)
