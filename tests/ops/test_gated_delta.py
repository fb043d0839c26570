"""`gated_delta` against a NumPy oracle, on the default device."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_server import _ext
from mlx_server.ops.gated_delta import gated_delta
from reference.gated_delta import gated_delta as oracle

Op = Callable[..., tuple[mx.array, mx.array, mx.array]]
OPS = pytest.mark.parametrize("op", [gated_delta, _ext.gated_delta_fallback], ids=["op", "fallback"])
NUM_SLOTS = 9
TENSORS = ["qkv", "conv_weight", "a", "b", "a_log", "dt_bias", "conv_state", "state"]


class Case:
    """Rows of random lengths in slots of random order."""

    def __init__(
        self,
        query_lens: list[int],
        fresh: list[bool] | None = None,
        *,
        key_heads: int = 2,
        heads: int = 4,
        key_dim: int = 32,
        value_dim: int = 32,
        taps: int = 4,
    ) -> None:
        rng = np.random.default_rng(0)

        def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
            return (rng.standard_normal(shape) * scale).astype(np.float32)

        num_tokens, channels = sum(query_lens), 2 * key_heads * key_dim + heads * value_dim
        self.tensors = {
            "qkv": normal(num_tokens, channels),
            "conv_weight": normal(channels, taps, scale=0.5),
            "a": normal(num_tokens, heads, scale=2),
            "b": normal(num_tokens, heads),
            "a_log": rng.uniform(-4, 1, heads).astype(np.float32),
            "dt_bias": normal(heads),
            "conv_state": normal(NUM_SLOTS, taps - 1, channels),
            "state": normal(NUM_SLOTS, heads, value_dim, key_dim, scale=0.3),
        }
        self.slots = rng.permutation(NUM_SLOTS)[: len(query_lens)].astype(np.int32)
        self.query_lens = query_lens
        self.fresh = fresh or [False] * len(query_lens)
        for name in ["conv_state", "state"]:
            self.tensors[name][self.slots[self.fresh]] = np.nan  # what no row may read
        self.heads: dict[str, Any] = {"num_key_heads": key_heads, "key_head_dim": key_dim}

    def run(self, op: Op = gated_delta, dtype: mx.Dtype = mx.float32) -> list[NDArray[np.float32]]:
        arrays = {name: mx.array(value).astype(dtype) for name, value in self.tensors.items()}
        arrays["state"] = mx.array(self.tensors["state"])
        y, conv_state, state = op(
            *arrays.values(),
            slots=mx.array(self.slots),
            query_lens=self.query_lens,
            fresh=self.fresh,
            **self.heads,
        )
        assert (y.dtype, conv_state.dtype, state.dtype) == (dtype, dtype, mx.float32)
        return [np.array(out.astype(mx.float32)) for out in (y, conv_state, state)]

    def expected(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        return oracle(**self.tensors, slots=self.slots, query_lens=self.query_lens, fresh=self.fresh, **self.heads)

    def check(self, op: Op = gated_delta, dtype: mx.Dtype = mx.float32, atol: float = 3e-5) -> None:
        """atol: of y and the state; only y is rounded to dtype."""
        (y, conv_state, state), (expected_y, expected_conv, expected_state) = self.run(op, dtype), self.expected()
        np.testing.assert_allclose(y, expected_y, atol=atol, rtol=float(mx.finfo(dtype).eps), err_msg="y")
        np.testing.assert_array_equal(conv_state, expected_conv, err_msg="conv_state")
        np.testing.assert_allclose(state, expected_state, atol=atol, err_msg="state")


@OPS
def test_decodes(op: Op) -> None:
    Case([1, 1, 1, 1, 1]).check(op)


@OPS
def test_ragged_batch_with_fresh_rows(op: Op) -> None:
    Case([1, 70, 1, 2, 3, 4, 130], [False, True, True, False, True, False, False]).check(op)


@OPS
def test_prompts_of_many_lengths(op: Op) -> None:
    Case([65, 9, 64, 128, 10], [True, False, False, True, False]).check(op)


@OPS
@pytest.mark.parametrize("key_heads, heads", [(1, 1), (1, 3), (4, 4), (2, 8)])
def test_heads(op: Op, key_heads: int, heads: int) -> None:
    Case([1, 20], key_heads=key_heads, heads=heads).check(op)


@OPS
@pytest.mark.parametrize(
    "key_dim, value_dim",
    [(128, 128), (64, 64), (64, 32), (32, 96), (16, 8), (48, 36), (144, 16), (20, 12), (5, 3)],
)
def test_head_sizes(op: Op, key_dim: int, value_dim: int) -> None:
    Case([1, 67], key_dim=key_dim, value_dim=value_dim).check(op)


@OPS
@pytest.mark.parametrize("taps", [2, 3, 8])
def test_taps(op: Op, taps: int) -> None:
    Case([1, 3, 20], [True, False, False], taps=taps).check(op)


@OPS
@pytest.mark.parametrize("query_len", [2, 15, 16, 17, 31, 33, 63, 64, 65, 128, 200])
def test_lengths_around_chunks(op: Op, query_len: int) -> None:
    Case([query_len]).check(op)


@OPS
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(op: Op, dtype: mx.Dtype) -> None:
    case = Case([1, 70, 5])
    for name in TENSORS[:-1]:  # what the op is given is exact, and computed in float32: only y is rounded
        case.tensors[name] = np.array(mx.array(case.tensors[name]).astype(dtype).astype(mx.float32))
    case.check(op, dtype)


@OPS
def test_strong_decay_and_equal_keys(op: Op) -> None:
    """States that vanish within a chunk, and keys that are one another's multiples, where the solve is hardest."""
    case = Case([150])
    case.tensors["a_log"][:2] = 4
    case.tensors["a"][:, 0], case.tensors["a"][10:20] = -8, 30  # head 0 keeps what comes after these
    case.tensors["qkv"][50:120] = case.tensors["qkv"][50]
    case.tensors["b"][50:120] = 8
    case.check(op)


@OPS
def test_long_prompt(op: Op) -> None:
    """Heads that keep everything, nearly everything or nothing; tokens that write all of their value, nothing, some."""
    case = Case([1500])
    case.tensors["a_log"][1], case.tensors["dt_bias"][:] = 4, 0
    case.tensors["a"][:, :3] = -60, -16.5, 30
    case.tensors["b"][:500], case.tensors["b"][500:1000] = 30, -30
    case.check(op, atol=5e-5)


def test_row_does_not_depend_on_the_batch() -> None:
    together = Case([1, 70, 3, 1, 90])
    y, conv_state, state = together.run()
    begin = 0
    for row, n in enumerate(together.query_lens):
        alone = Case([1])
        alone.tensors = dict(together.tensors)
        for name in ["qkv", "a", "b"]:
            alone.tensors[name] = together.tensors[name][begin : begin + n]
        alone.slots, alone.query_lens = together.slots[row : row + 1], [n]
        alone_y, alone_conv, alone_state = alone.run()
        np.testing.assert_array_equal(alone_y, y[begin : begin + n])
        np.testing.assert_array_equal(alone_conv[alone.slots], conv_state[alone.slots])
        np.testing.assert_array_equal(alone_state[alone.slots], state[alone.slots])
        begin += n


@OPS
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row(op: Op, bad: float) -> None:
    case = Case([1, 3, 70, 20, 1])
    y, conv_state, state = case.run(op)
    for row in (slice(2, 3), slice(20, 21)):  # of the rows of 3 and of 70 tokens
        for name in ["qkv", "a", "b"]:
            case.tensors[name][row] = bad
    broken = case.run(op)
    others = np.isin(np.arange(NUM_SLOTS), case.slots[1:3], invert=True)
    assert not np.isfinite(broken[0][20]).any()
    np.testing.assert_array_equal(broken[0][[0, *range(74, 95)]], y[[0, *range(74, 95)]])
    np.testing.assert_array_equal(broken[1][others], conv_state[others])
    np.testing.assert_array_equal(broken[2][others], state[others])


def test_prefill_in_chunks_is_prefill_in_one_piece() -> None:
    whole = Case([150])
    y, conv_state, state = whole.run()
    part, outputs, begin = Case([1]), [], 0
    part.slots, part.tensors = whole.slots, dict(whole.tensors)
    for n in [64, 1, 1, 13, 71]:
        for name in ["qkv", "a", "b"]:
            part.tensors[name] = whole.tensors[name][begin : begin + n]
        part.query_lens, begin = [n], begin + n
        part_y, part.tensors["conv_state"], part.tensors["state"] = part.run()
        outputs.append(part_y)
    np.testing.assert_allclose(np.concatenate(outputs), y, atol=3e-5)
    np.testing.assert_array_equal(part.tensors["conv_state"], conv_state)
    np.testing.assert_allclose(part.tensors["state"], state, atol=3e-5)


def test_inputs_with_gaps() -> None:
    case = Case([1, 20])
    arrays = {name: mx.array(value) for name, value in case.tensors.items()}
    for name in TENSORS[:-2]:
        arrays[name] = mx.repeat(arrays[name], 2, axis=-1)[..., ::2]
    outputs = gated_delta(
        *arrays.values(), slots=mx.array(case.slots), query_lens=case.query_lens, fresh=case.fresh, **case.heads
    )
    for got, expected in zip(outputs, case.expected(), strict=True):
        np.testing.assert_allclose(np.array(got), expected, atol=3e-5)


def test_states_in_buffers_that_are_too_large() -> None:
    """MLX gives out cached buffers of up to twice the size, and copies where it would else write in place."""
    case = Case([1, 20], heads=64)
    for _ in range(4):
        spare = [mx.zeros(case.tensors["state"].size * 17 // 10) for _ in range(8)]
        mx.eval(spare)
        del spare
        case.check()


@pytest.mark.parametrize("wait", [True, False], ids=["step by step", "pipelined"])
def test_states_are_updated_in_place(wait: bool) -> None:
    case = Case([1])
    arrays = {name: mx.array(value) for name, value in case.tensors.items()}
    state, conv_state = mx.zeros((1000, *arrays["state"].shape[1:])), mx.zeros((1000, *arrays["conv_state"].shape[1:]))
    slots = mx.array([7], dtype=mx.int32)
    mx.eval(arrays, state, conv_state, slots)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(5):
        arrays["conv_state"], arrays["state"] = conv_state, state
        y, conv_state, state = gated_delta(*arrays.values(), slots=slots, query_lens=[1], fresh=[False], **case.heads)
        arrays["qkv"] = arrays["qkv"] + y.sum()  # the next step depends on this one, which may still be in flight
        mx.async_eval(y, conv_state, state)
        if wait:
            mx.eval(y)
    mx.eval(y, conv_state, state)
    assert mx.get_peak_memory() - before < state.nbytes // 10


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("qkv", (4, 7), r"qkv must be floating point \(4,256\) but got float32 \(4,7\)"),
        ("conv_state", (9, 3, 5), r"conv_state must be floating point \(9,3,256\)"),
        ("a", (3, 4), r"a must be floating point \(4,4\)"),
        ("a_log", (5,), r"a_log must be floating point \(4\)"),
        ("state", (9, 4, 32, 16), r"state must be \[S, Hv, Dv, 32\]"),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...], message: str) -> None:
    case = Case([1, 3])
    case.tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"^\[gated_delta\] " + message):
        case.run()


def test_wrong_rows() -> None:
    case = Case([1, 3])
    case.query_lens = [1, 4]
    with pytest.raises(ValueError, match=r"^\[gated_delta\] query_lens must add up to qkv's 4 tokens but got 5\.$"):
        case.run()
    case.query_lens = [4, 0]
    with pytest.raises(ValueError, match=r"^\[gated_delta\] query_lens must be at least 1 but got 0\.$"):
        case.run()
    case.query_lens, case.fresh = [1, 3], [True]
    with pytest.raises(ValueError, match=r"^\[gated_delta\] slots must be int32 \[B\]"):
        case.run()
