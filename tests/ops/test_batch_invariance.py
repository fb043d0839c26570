"""In the batch-invariant mode a row of any op has the same bits in any batch, on the default device."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_server.ops.attention import AttentionBatch, new_kv_pool, paged_attention, write_kv
from mlx_server.ops.gated_delta import gated_delta
from mlx_server.ops.kernels import is_batch_invariant, take_launched_kernels
from mlx_server.ops.linear import linear, quantized_linear
from mlx_server.ops.moe import ExpertMatrix, moe_mlp, route

pytestmark = pytest.mark.usefixtures("batch_invariant")

ON_GPU = mx.default_device().type == mx.gpu
BATCHES = [2, 9, 40, 130]
DTYPES = [mx.float16, mx.bfloat16, mx.float32] if ON_GPU else [mx.float32]  # CPUs have kernels for float32 alone
# On a GPU one row's sums are cut into parts there, and 130 rows' are not.
MANY_GROUPS = [(16384, 512)] if ON_GPU else []


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def assert_rows_are_alike(op: Callable[[mx.array], mx.array], x: mx.array) -> None:
    """op(x [T, …]) row by row, and in batches that begin at the first row and in the middle."""
    alone = mx.concatenate([op(x[i : i + 1]) for i in range(len(x))])
    assert np.isfinite(np.array(alone.astype(mx.float32))).all()
    for size in BATCHES:
        for begin in {0, (len(x) - size) // 2}:
            assert mx.array_equal(op(x[begin : begin + size]), alone[begin : begin + size]), (size, begin)


def test_the_mode_is_on() -> None:
    assert is_batch_invariant()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(70, 2112), (1, 64), (5000, 256), *MANY_GROUPS])
def test_quantized_linear(n: int, k: int, dtype: mx.Dtype) -> None:
    weight, *rest = mx.quantize(normal(n, k), 64, 4)
    arrays = weight, *(array.astype(dtype) for array in rest)
    assert_rows_are_alike(lambda x: quantized_linear(x, *arrays, group_size=64, bits=4), normal(130, k, dtype=dtype))


@pytest.mark.parametrize("bits", [8] if ON_GPU else [2, 3, 5, 6, 8])
def test_quantized_linear_of_other_bits(bits: int) -> None:
    weight, *rest = mx.quantize(normal(70, 576), 32, bits)
    arrays = weight, *(array.astype(DTYPES[0]) for array in rest)
    x = normal(130, 576, dtype=DTYPES[0])
    assert_rows_are_alike(lambda x: quantized_linear(x, *arrays, group_size=32, bits=bits), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(70, 2112), (9, 32), (1, 64), (9, 50), (3, 5), *MANY_GROUPS])
def test_linear(n: int, k: int, dtype: mx.Dtype) -> None:
    weight, x = normal(n, k, dtype=dtype), normal(130, k, dtype=dtype)
    assert_rows_are_alike(lambda x: linear(x, weight), x)
    expected = np.array(x.astype(mx.float32), np.float64) @ np.array(weight.astype(mx.float32)).T
    error = np.abs(np.array(linear(x, weight).astype(mx.float32)) - expected).max()
    assert error <= {2: 1e-2, 4: 1e-5}[dtype.size] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [None, 4])
def test_experts(bits: int | None, dtype: mx.Dtype) -> None:
    def matrix(*shape: int) -> ExpertMatrix:
        dense = normal(*shape) / shape[-1] ** 0.5
        if bits is None:
            return ExpertMatrix(dense.astype(dtype))
        weight, *rest = mx.quantize(dense, 32, bits)
        return ExpertMatrix(weight, *(array.astype(dtype) for array in rest), group_size=32, bits=bits)

    gate, up, down = matrix(12, 64, 96), matrix(12, 64, 96), matrix(12, 96, 64)
    router, x = normal(12, 96, dtype=dtype, seed=1), normal(130, 96, dtype=dtype)

    def op(x: mx.array) -> mx.array:
        experts, weights = route(linear(x, router), top_k=3, normalize=True)
        return moe_mlp(x, experts, weights, gate=gate, up=up, down=down, shared=x)

    assert_rows_are_alike(op, x)


@pytest.mark.skipif(not ON_GPU, reason="the CPU computes all forms so")
def test_experts_without_such_a_kernel_are_refused() -> None:
    matrix = ExpertMatrix(normal(4, 40, 40))
    x, experts = normal(2, 40), mx.zeros((2, 1), mx.int32)
    with pytest.raises(
        ValueError, match=r"\[moe_mlp\] no kernel computes experts token by token whose gate is float32"
    ):
        moe_mlp(x, experts, mx.ones((2, 1)), gate=matrix, up=matrix, down=matrix)


class Sequences:
    """Prompts whose tokens are computed in steps: what a token gives may depend on nothing but those before it."""

    lens = (300, 41, 7)

    def steps(self, sizes: Sequence[int]) -> list[list[tuple[int, int, int]]]:
        """For each step its rows: prompt, first token and end. Each prompt takes parts of `sizes`, in turn."""
        begins, steps, turn = [0] * len(self.lens), [], 0
        while begins != list(self.lens):
            rows = []
            for prompt, length in enumerate(self.lens):
                end = min(begins[prompt] + sizes[(turn + prompt) % len(sizes)], length)
                if end > begins[prompt]:
                    rows.append((prompt, begins[prompt], end))
                    begins[prompt] = end
            steps.append(rows)
            turn += 1
        return steps


# One token a step, whole prompts, parts of many lengths.
CUTS = [[1], [300], [64, 1, 9, 130, 40]]
BLOCK_SIZE, KV_HEADS, HEADS, HEAD_DIM = 16, 2, 6, 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 40}, {"softcap": 3.0}, {"sinks": True}, {"bits": 8}],
    ids="".join,
)
def test_attention(options: dict[str, Any], dtype: mx.Dtype) -> None:
    prompts = Sequences()
    q = [normal(length, HEADS, HEAD_DIM, dtype=dtype, seed=length) for length in prompts.lens]
    k, v = (
        [normal(length, KV_HEADS, HEAD_DIM, dtype=dtype, seed=seed * length) for length in prompts.lens]
        for seed in (2, 3)
    )
    how: dict[str, Any] = {"scale": 0.125, "window": options.get("window"), "softcap": options.get("softcap")}
    if "sinks" in options:
        how["sinks"] = normal(HEADS, dtype=dtype, seed=4)
    blocks = [-(-length // BLOCK_SIZE) for length in prompts.lens]
    firsts = np.cumsum([0, *blocks])

    def run(sizes: list[int]) -> list[mx.array]:
        pool = new_kv_pool((sum(blocks), BLOCK_SIZE, KV_HEADS, HEAD_DIM), dtype, bits=options.get("bits"))
        outputs: list[list[mx.array]] = [[] for _ in prompts.lens]
        for rows in prompts.steps(sizes):

            def of_step(arrays: list[mx.array], rows: list[tuple[int, int, int]] = rows) -> mx.array:
                return mx.concatenate([arrays[prompt][begin:end] for prompt, begin, end in rows])

            slots = [firsts[prompt] * BLOCK_SIZE + np.arange(begin, end) for prompt, begin, end in rows]
            pool = write_kv(pool, of_step(k), of_step(v), mx.array(np.concatenate(slots).astype(np.int32)))
            table = np.stack([firsts[prompt] + np.arange(max(blocks)) for prompt, *_ in rows]).astype(np.int32)
            batch = AttentionBatch(mx.array(table), [end - begin for _, begin, end in rows], [row[2] for row in rows])
            y = paged_attention(of_step(q), pool, batch, **how)
            at = 0
            for prompt, begin, end in rows:
                outputs[prompt].append(y[at : at + end - begin])
                at += end - begin
        return [mx.concatenate(parts) for parts in outputs]

    alone = run(CUTS[0])
    for sizes in CUTS[1:]:
        assert all(map(mx.array_equal, run(sizes), alone)), sizes


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_delta(dtype: mx.Dtype) -> None:
    prompts, key_heads, heads, dim, taps = Sequences(), 2, 4, 32, 4
    channels = 2 * key_heads * dim + heads * dim
    qkv, a, b = (
        [normal(length, size, dtype=dtype, seed=seed + length) for length in prompts.lens]
        for seed, size in ((1, channels), (2, heads), (3, heads))
    )
    weights = normal(channels, taps, dtype=dtype), normal(heads), normal(heads, seed=1)

    def run(sizes: list[int]) -> list[mx.array]:
        conv = mx.zeros((len(prompts.lens), taps - 1, channels), dtype)
        state = mx.zeros((len(prompts.lens), heads, dim, dim))
        outputs: list[list[mx.array]] = [[] for _ in prompts.lens]
        for rows in prompts.steps(sizes):
            step_qkv, step_a, step_b = (
                mx.concatenate([arrays[prompt][begin:end] for prompt, begin, end in rows]) for arrays in (qkv, a, b)
            )
            y, conv, state = gated_delta(
                step_qkv,
                weights[0],
                step_a,
                step_b,
                *weights[1:],
                conv,
                state,
                slots=mx.array([prompt for prompt, *_ in rows], mx.int32),
                query_lens=[end - begin for _, begin, end in rows],
                fresh=[begin == 0 for _, begin, _ in rows],
                num_key_heads=key_heads,
                key_head_dim=dim,
            )
            at = 0
            for prompt, begin, end in rows:
                outputs[prompt].append(y[at : at + end - begin])
                at += end - begin
            mx.eval(outputs, conv, state)
        return [mx.concatenate(parts) for parts in outputs] + [conv, state]

    alone = run(CUTS[0])
    for sizes in CUTS[1:]:
        assert all(map(mx.array_equal, run(sizes), alone)), sizes


@pytest.mark.skipif(not ON_GPU, reason="the CPU has none of these kernels")
def test_no_other_kernels_are_launched() -> None:
    take_launched_kernels()
    test_attention({}, mx.float16)
    test_gated_delta(mx.float16)
    test_experts(4, mx.float16)
    # The second of each pair where there are matrix units.
    linear = {"linear_dense", "linear_matrix"}
    experts = [{"moe_hidden", "moe_output"}, {"moe_sort", "moe_matrix", "gated_mul", "moe_join"}]
    others = {"attention_combine", "attention_decode", "gated_delta_step", "moe_route"}
    assert set(take_launched_kernels()) - linear in [others | kernels for kernels in experts]
