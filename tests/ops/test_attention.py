"""`paged_attention` against a NumPy oracle, on the default device."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_server import _ext
from mlx_server.ops.attention import AttentionBatch, KVPool, new_kv_pool, paged_attention, write_kv
from reference.paged_attention import paged_attention as oracle

Op = Callable[..., mx.array]
OPS = pytest.mark.parametrize("op", [paged_attention, _ext.paged_attention_fallback], ids=["op", "fallback"])
ON_CPU = mx.default_device().type == mx.cpu
ATOL = {mx.float32: 4e-6 if ON_CPU else 1e-5, mx.float16: 5e-3, mx.bfloat16: 4e-2}


class Case:
    """A batch of rows over a pool whose blocks they use in random order; all else in pool and tables is NaN and -1."""

    def __init__(
        self,
        lens: list[tuple[int, int]],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        block_size: int = 16,
        window: int | None = None,
        softcap: float | None = None,
        with_sinks: bool = False,
    ) -> None:
        rng = np.random.default_rng(0)
        self.query_lens = [query_len for query_len, _ in lens]
        self.context_lens = [context_len for _, context_len in lens]
        num_blocks = [-(-context_len // block_size) for _, context_len in lens]
        free = iter(rng.permutation(sum(num_blocks) + 3).tolist())
        self.block_tables = np.full((len(lens), max(num_blocks) + 1), -1, np.int32)
        pool_shape = (sum(num_blocks) + 3, block_size, kv_heads, head_dim)
        self.k_pool, self.v_pool = np.full(pool_shape, np.nan, np.float32), np.full(pool_shape, np.nan, np.float32)
        for row, (n, context_len) in enumerate(zip(num_blocks, self.context_lens, strict=True)):
            self.block_tables[row, :n] = [next(free) for _ in range(n)]
            seen = np.arange(context_len)
            where = self.block_tables[row, seen // block_size], seen % block_size
            self.k_pool[where] = rng.standard_normal((context_len, kv_heads, head_dim))
            self.v_pool[where] = rng.standard_normal((context_len, kv_heads, head_dim))
        self.q = rng.standard_normal((sum(self.query_lens), heads, head_dim)).astype(np.float32)
        self.scale = head_dim**-0.5
        self.window, self.softcap = window, softcap
        self.sinks = rng.standard_normal(heads).astype(np.float32) if with_sinks else None
        if window is not None:
            self.forget_all_before_the_window(window, spare_block=next(free))

    def forget_all_before_the_window(self, window: int, spare_block: int) -> None:
        """NaN in what no query of a row sees; whole blocks of it are someone else's, all NaN."""
        block_size = self.k_pool.shape[1]
        for table, query_len, context_len in zip(self.block_tables, self.query_lens, self.context_lens, strict=True):
            unseen = np.arange(max(0, context_len - query_len + 1 - window))
            where = table[unseen // block_size], unseen % block_size
            self.k_pool[where] = self.v_pool[where] = np.nan
            table[: len(unseen) // block_size] = spare_block

    def run(self, op: Op = paged_attention, dtype: mx.Dtype = mx.float32) -> NDArray[np.float32]:
        out = op(
            mx.array(self.q).astype(dtype),
            KVPool(mx.array(self.k_pool).astype(dtype), mx.array(self.v_pool).astype(dtype)),
            AttentionBatch(mx.array(self.block_tables), self.query_lens, self.context_lens),
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=None if self.sinks is None else mx.array(self.sinks).astype(dtype),
        )
        assert out.dtype == dtype
        return np.array(out.astype(mx.float32))

    def expected(self, dtype: mx.Dtype = mx.float32) -> NDArray[np.float64]:
        """Of the inputs as `dtype` rounds them."""

        def rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.array(mx.array(x).astype(dtype).astype(mx.float32))

        return oracle(
            rounded(self.q),
            rounded(self.k_pool),
            rounded(self.v_pool),
            block_tables=self.block_tables,
            query_lens=self.query_lens,
            context_lens=self.context_lens,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=None if self.sinks is None else rounded(self.sinks),
        )

    def check(self, op: Op = paged_attention, dtype: mx.Dtype = mx.float32, atol: float | None = None) -> None:
        np.testing.assert_allclose(self.run(op, dtype), self.expected(dtype), atol=atol or ATOL[dtype], rtol=0)

    def only_row(self, row: int) -> "Case":
        alone = object.__new__(Case)
        begin = sum(self.query_lens[:row])
        alone.q = self.q[begin : begin + self.query_lens[row]]
        alone.k_pool, alone.v_pool, alone.scale, alone.window = self.k_pool, self.v_pool, self.scale, self.window
        alone.softcap, alone.sinks = self.softcap, self.sinks
        alone.block_tables = self.block_tables[row : row + 1]
        alone.query_lens, alone.context_lens = [self.query_lens[row]], [self.context_lens[row]]
        return alone


MIXED = [(1, 1), (1, 37), (5, 5), (1, 64), (7, 50), (40, 40), (33, 130)]  # (query_len, context_len)
LONG = [(1, 300), (3, 1030), (1, 256), (90, 300)]


@OPS
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (9, 3), (8, 1), (8, 2), (40, 2)])
def test_grouped_queries(op: Op, heads: int, kv_heads: int) -> None:
    Case(MIXED, heads=heads, kv_heads=kv_heads).check(op)


@OPS
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 24, 7, 320])
def test_head_sizes(op: Op, head_dim: int) -> None:
    Case(MIXED, head_dim=head_dim).check(op)


@OPS
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 256])
def test_block_sizes(op: Op, block_size: int) -> None:
    Case(MIXED, block_size=block_size).check(op)


@OPS
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256, 72])
def test_half_precision(op: Op, head_dim: int, dtype: mx.Dtype) -> None:
    Case(MIXED + LONG, head_dim=head_dim, window=700, softcap=20.0, with_sinks=True).check(op, dtype)


@OPS
def test_long_contexts(op: Op) -> None:
    Case(LONG).check(op)


@OPS
def test_long_context_with_large_scores(op: Op) -> None:
    case = Case([(1, 3000), (70, 1100)])
    case.q *= 30  # softmax is near one-hot: exp must not overflow
    case.check(op, atol=1e-4)


@OPS
@pytest.mark.parametrize("window", [1, 2, 8, 16, 50, 63, 64, 65, 129, 130, 1000])
def test_window(op: Op, window: int) -> None:
    Case(MIXED + LONG, window=window).check(op)


@OPS
@pytest.mark.parametrize("block_size, heads", [(1, 4), (32, 2), (256, 16)])
def test_window_over_blocks_of_any_size(op: Op, block_size: int, heads: int) -> None:
    Case(MIXED + LONG, window=20, block_size=block_size, heads=heads).check(op)


@OPS
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(op: Op, softcap: float, window: int | None) -> None:
    case = Case(MIXED + LONG, softcap=softcap, window=window)
    case.q *= 30  # scores far beyond the cap
    case.check(op, atol=5e-5)


@OPS
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(op: Op, window: int | None) -> None:
    Case(MIXED + LONG, with_sinks=True, window=window).check(op)
    large = Case(MIXED, with_sinks=True, window=window)
    assert large.sinks is not None
    large.sinks += 20  # above all scores
    large.check(op)


@OPS
def test_softcap_sinks_and_window_together(op: Op) -> None:
    Case(MIXED + LONG, heads=9, kv_heads=3, softcap=5.0, with_sinks=True, window=30).check(op)


@OPS
def test_rows_of_few_and_many_queries_in_any_order(op: Op) -> None:
    Case([(20, 30), (1, 5), (9, 9), (2, 40)]).check(op)


@pytest.mark.parametrize("window", [None, 20])
def test_row_does_not_depend_on_the_batch(window: int | None) -> None:
    case = Case(MIXED + LONG, window=window, softcap=30.0, with_sinks=True)
    together = case.run()
    alone = np.concatenate([case.only_row(row).run() for row in range(len(case.query_lens))])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("window", [None, 1, 20, 70, 600])
def test_query_does_not_depend_on_how_the_prompt_was_cut(window: int | None) -> None:
    whole = Case([(1100, 1100)], window=window)
    together = whole.run()
    for begin, end in [(0, 60), (60, 1099), (1099, 1100)]:
        chunk = whole.only_row(0)
        chunk.q, chunk.query_lens, chunk.context_lens = whole.q[begin:end], [end - begin], [end]
        if ON_CPU or end - begin > 1:
            np.testing.assert_array_equal(chunk.run(), together[begin:end])
        else:  # GPUs have another kernel for single queries
            np.testing.assert_allclose(chunk.run(), together[begin:end], atol=1e-6)


class QuantizedCase(Case):
    """The same, in a pool of 8 bits, and the oracle over what the pool holds."""

    def fill_pool(self) -> KVPool:
        num_blocks, block_size, kv_heads, head_dim = self.k_pool.shape
        pool = new_kv_pool(self.k_pool.shape, mx.float32, bits=8)
        flat = (num_blocks * block_size, kv_heads, head_dim)
        k, v = (mx.array(x.reshape(flat)) for x in (self.k_pool, self.v_pool))
        pool = write_kv(pool, k, v, mx.arange(flat[0]))
        assert pool.key_scales is not None and pool.value_scales is not None
        self.k_pool = np.array(pool.keys).astype(np.float32) * np.array(pool.key_scales)[..., None]
        self.v_pool = np.array(pool.values).astype(np.float32) * np.array(pool.value_scales)[..., None]
        return pool

    def run_and_compare(self, op: Op, dtype: mx.Dtype = mx.float32) -> None:
        pool = self.fill_pool()
        out = op(
            mx.array(self.q).astype(dtype),
            pool,
            AttentionBatch(mx.array(self.block_tables), self.query_lens, self.context_lens),
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )
        np.testing.assert_allclose(np.array(out.astype(mx.float32)), self.expected(), atol=ATOL[dtype], rtol=0)

    def expected(self, dtype: mx.Dtype = mx.float32) -> NDArray[np.float64]:
        return super().expected(mx.float32)


@OPS
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 7])
def test_eight_bits(op: Op, head_dim: int) -> None:
    QuantizedCase(MIXED + LONG, head_dim=head_dim, heads=6).run_and_compare(op)


@OPS
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_eight_bits_with_half_precision(op: Op, dtype: mx.Dtype) -> None:
    case = QuantizedCase(MIXED + LONG, window=200, softcap=20.0)
    case.q = np.array(mx.array(case.q).astype(dtype).astype(mx.float32))
    case.run_and_compare(op, dtype)


def test_no_rows() -> None:
    pool = new_kv_pool((4, 16, 2, 64), mx.float32)
    batch = AttentionBatch(mx.zeros((0, 2), mx.int32), [], [])
    assert paged_attention(mx.zeros((0, 4, 64)), pool, batch, scale=1).shape == (0, 4, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_tables": mx.zeros((2, 2))}, r"block_tables must be int32 \[B, M\] but got float32 \(2,2\)"),
        ({"query_lens": [3]}, r"one entry for each of the 2 rows of block_tables but got 1 and 2"),
        ({"context_lens": [9, 1]}, r"query_len <= context_len but row 1 got query_len 2 and context_len 1"),
        ({"query_lens": [0, 3]}, r"row 0 got query_len 0"),
    ],
)
def test_wrong_batches(change: dict[str, Any], message: str) -> None:
    arguments = {"block_tables": mx.zeros((2, 2), mx.int32), "query_lens": [1, 2], "context_lens": [9, 12]}
    with pytest.raises(ValueError, match=r"\[AttentionBatch\] .*" + message):
        AttentionBatch(**(arguments | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": mx.zeros((3, 4, 32))}, r"q must have the shape \[T, H, 64\] with H a multiple of 2 but got \(3,4,32\)"),
        ({"q": mx.zeros((3, 3, 64))}, r"H a multiple of 2 but got \(3,3,64\)"),
        ({"q": mx.zeros((2, 4, 64))}, r"query_lens must add up to q's 2 tokens but got 3"),
        (
            {"pool": KVPool(mx.zeros((4, 16, 2, 64)), mx.zeros((4, 8, 2, 64)))},
            r"one shape \[N, block_size, Hk, D\] and one dtype but got",
        ),
        (
            {"batch": AttentionBatch(mx.zeros((2, 2), mx.int32), [1, 2], [9, 33])},
            r"at most M \* block_size = 32 but row 1 got 33",
        ),
        (
            {
                "pool": KVPool(
                    mx.zeros((4, 16, 2, 64), mx.int8), mx.zeros((4, 16, 2, 64), mx.int8), mx.zeros((4, 16, 2))
                )
            },
            r"must have keys and values of int8 and float32 scales \(4,16,2\)",
        ),
        ({"scale": -1.0}, r"scale must be at least 0 but got -1"),
        ({"window": 0}, r"window must be at least 1 but got 0"),
        ({"softcap": 0.0}, r"softcap must be greater than 0 but got 0"),
        ({"sinks": mx.zeros(3)}, r"sinks must have the shape \[4\] but got \(3\)"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": mx.zeros((3, 4, 64)),
        "pool": KVPool(mx.zeros((4, 16, 2, 64)), mx.zeros((4, 16, 2, 64))),
        "batch": AttentionBatch(mx.zeros((2, 2), mx.int32), [1, 2], [9, 12]),
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=r"\[paged_attention\] .*" + message):
        paged_attention(**(arguments | change))
