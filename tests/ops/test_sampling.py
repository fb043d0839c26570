"""`sample` and its fallback against a NumPy oracle, and the distribution of what is drawn."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mlx_server import _ext
from mlx_server.ops.sampling import (
    INVALID_TOKEN,
    SampleTables,
    make_rows,
    sample,
    sample_fallback,
)
from mlx_server.sampling_params import MAX_TOP_LOGPROBS
from ops.sampling_rows import OPS, Op, assert_as_oracle, draw, draw_many, pack
from reference.sampling import Params, adjust, filtered

finite = st.floats(-60, 60, width=32)
logits_rows = st.lists(st.one_of(finite, st.just(-np.inf), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=40)
shares = st.one_of(st.just(1.0), st.floats(2.0**-30, 1.0, width=32))
filters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.5, 1e30]),
        "top_k": st.integers(0, 50),
        "top_p": shares,
        "min_p": st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32)),
        "typical_p": shares,
        "top_n_sigma": st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0]),
        "xtc_probability": st.sampled_from([0.0, 0.0, 0.5, 1.0]),
        "xtc_threshold": st.floats(0.0, 0.625, width=32),
        "seed": st.integers(0, 2**64 - 1),
        "position": st.integers(0, 2**32 - 1),
        "num_logprobs": st.integers(-1, MAX_TOP_LOGPROBS),
        "processed_logprobs": st.booleans(),
    }
)
penalties = st.fixed_dictionaries(
    {
        "penalty_window": st.sampled_from([0, 1, 5]),
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, -0.5, 0.7]),
        "presence_penalty": st.sampled_from([0.0, -1.5, 0.3]),
        "dry_multiplier": st.sampled_from([0.0, 0.8]),
        "dry_allowed_length": st.sampled_from([0, 1, 2, 3]),
        "dry_window": st.sampled_from([0, 3, 7]),
    }
)


@st.composite
def logits_and_params(draw: st.DrawFn) -> tuple[NDArray[np.float32], Params]:
    logits = draw(logits_rows)
    ids = st.integers(0, len(logits) - 1)
    few = st.integers(0, min(2, len(logits) - 1))
    fields: dict[str, Any] = draw(filters)
    if draw(st.booleans()):
        fields |= draw(penalties)
        fields["history"] = tuple(draw(st.lists(st.one_of(few, ids), min_size=1, max_size=20)))
        fields["num_output"] = draw(st.integers(0, len(fields["history"])))
        fields["breakers"] = tuple(draw(st.lists(ids, max_size=2)))
        fields["bias"] = draw(st.dictionaries(ids, st.sampled_from([-np.inf, -3.0, 1.5, 100.0]), max_size=3))
        fields["allowed"] = draw(st.one_of(st.none(), st.frozensets(ids, min_size=1)))
    return np.array([logits], np.float32), Params(**fields)


@settings(max_examples=200)
@given(row=logits_and_params())
def test_small_rows(row: tuple[NDArray[np.float32], Params]) -> None:
    logits, params = row
    assert_as_oracle(sample, logits, [params])


@settings(max_examples=30)
@given(row=logits_and_params())
def test_small_rows_of_the_fallback(row: tuple[NDArray[np.float32], Params]) -> None:
    logits, params = row
    assert_as_oracle(sample_fallback, logits, [params])


@OPS
@pytest.mark.parametrize("vocab_size", [511, 512, 4097, 49152])
@pytest.mark.parametrize("deviation", [0.0, 0.05, 3.0], ids=["equal", "flat", "peaked"])
def test_large_rows(op: Op, vocab_size: int, deviation: float) -> None:
    rng = np.random.default_rng(vocab_size)
    choices = [
        Params(top_p=0.95),
        Params(top_k=50),
        Params(min_p=0.05),
        Params(0.7, top_k=50, top_p=0.9, min_p=0.02),
        Params(top_k=vocab_size // 2, top_p=0.5),
        Params(1.3),
        Params(0.0, top_k=5, top_p=0.5),
        Params(0.8, top_p=0.999, min_p=0.001),
        Params(typical_p=0.6),
        Params(0.9, top_n_sigma=1.0, typical_p=0.9),
        Params(top_k=100, xtc_probability=1.0, xtc_threshold=0.02),
        Params(xtc_probability=1.0, xtc_threshold=0.0005),
    ]
    rows = [
        params.but(seed=int(seed), num_logprobs=20, processed_logprobs=bool(seed % 2))
        for params in choices
        for seed in rng.integers(0, 2**63, 3)
    ]
    logits = (rng.standard_normal((len(rows), vocab_size)) * deviation).astype(np.float32)
    assert_as_oracle(op, logits, rows)


@OPS
@pytest.mark.parametrize(
    "params, kept",
    [
        (Params(), {0, 1, 2, 3, 4, 5}),
        (Params(top_k=1), {2}),
        (Params(top_k=2), {1, 2}),
        (Params(top_k=3), {0, 1, 2}),  # 0 and 3 are equally likely: the lower id stays
        (Params(top_k=6), {0, 1, 2, 3, 4, 5}),
        (Params(top_k=99), {0, 1, 2, 3, 4, 5}),
        (Params(top_p=1e-9), {2}),
        (Params(top_p=0.39), {2}),
        (Params(top_p=0.41), {1, 2}),
        (Params(top_p=0.71), {0, 1, 2}),
        (Params(top_p=0.81), {0, 1, 2, 3}),
        (Params(top_k=2, top_p=0.58), {1, 2}),  # of what top-k leaves, token 2 alone has 4/7
        (Params(top_k=2, top_p=0.56), {2}),
        (Params(min_p=0.74), {1, 2}),
        (Params(min_p=0.76), {2}),
        (Params(min_p=1.0), {2}),
        (Params(min_p=0.24), {0, 1, 2, 3}),
        (Params(top_k=3, min_p=0.24), {0, 1, 2}),
        (Params(0.5, min_p=0.74), {2}),  # temperature comes first: 0.75 ** 2 is below
        (Params(typical_p=0.2), {1}),  # the entropy, 1.485 nats, is closest to -log 0.3, then to -log 0.4
        (Params(typical_p=0.5), {1, 2}),
        (Params(typical_p=0.71), {0, 1, 2}),
        (Params(typical_p=0.5, min_p=0.76), {2}),
        (Params(top_k=3, typical_p=0.1), {1}),
        (Params(top_n_sigma=0.1), {2}),
        (Params(top_n_sigma=0.5), {1, 2}),  # the standard deviation is 0.80
        (Params(3.0, top_n_sigma=0.5), {1, 2}),
        (Params(top_n_sigma=1.8), {0, 1, 2, 3}),
        (Params(xtc_probability=1.0, xtc_threshold=0.35), {0, 1, 2, 3, 4, 5}),
        (Params(xtc_probability=1.0, xtc_threshold=0.25), {0, 1, 3, 4, 5}),
        (Params(xtc_probability=1.0, xtc_threshold=0.09), {3, 4, 5}),
        (Params(top_k=2, xtc_probability=1.0, xtc_threshold=0.3), {1}),
        (Params(bias={2: -np.inf, 1: -np.inf}), {0, 3, 4, 5}),
        (Params(bias={4: 100.0}), {4}),
        (Params(allowed=frozenset({0, 5})), {0, 5}),
        (Params(allowed=frozenset({0, 2, 5}), top_k=1), {2}),
        (Params(0.0, allowed=frozenset({0, 3, 5})), {0}),
        (Params(0.0, history=(2,), repetition_penalty=2.0), {1}),
        (Params(0.0, history=(2, 0), num_output=2, penalty_window=1, presence_penalty=2.0), {2}),
        (Params(0.0, history=(2, 0), num_output=2, penalty_window=2, presence_penalty=2.0), {1}),
        (Params(0.0, history=(2, 1, 0), num_output=1, presence_penalty=2.0), {2}),
        (Params(0.0, history=(2, 1, 1), num_output=3, frequency_penalty=-0.4), {1}),
        (Params(0.0, history=(0, 1, 2, 0, 1), dry_multiplier=5.0), {1}),
        (Params(0.0, history=(0, 1, 2, 0, 1), dry_multiplier=5.0, breakers=(0,)), {2}),
        (Params(0.0, history=(0, 1, 2, 0, 1), dry_multiplier=5.0, breakers=(2,)), {2}),
        (Params(0.0, history=(0, 1, 2, 0, 1), dry_multiplier=5.0, dry_window=4), {2}),
        (Params(0.0, history=(0, 1, 2, 0, 1), dry_multiplier=5.0, dry_allowed_length=3), {2}),
        (Params(0.0, given_token=4), {4}),
        (Params(given_token=4, top_k=1, num_logprobs=0, processed_logprobs=True), {4}),
    ],
)
def test_filters_keep(op: Op, params: Params, kept: set[int]) -> None:
    probabilities = [0.1, 0.3, 0.4, 0.1, 0.05, 0.05]
    assert set(draw_many(op, np.log(probabilities).tolist(), params, 400).tolist()) == kept


PLAIN = Params()
HISTORY = (1, 2, 3, 1, 2)


def expected_probabilities(logits: NDArray[np.float32], params: Params) -> NDArray[np.float64]:
    """Of each token, whatever the random numbers: XTC applies in its share of the draws."""
    probabilities = np.zeros(len(logits))
    for xtc_u, share in [(1.0, 1 - params.xtc_probability), (0.0, params.xtc_probability)]:
        kept = filtered(adjust(logits, params), params, xtc_u)
        probabilities[kept.order] += share * kept.weights[kept.order] / kept.total()
    return probabilities


@OPS
@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        Params(0.6),
        Params(1.5, top_k=12),
        Params(top_p=0.8),
        Params(min_p=0.15),
        Params(typical_p=0.7),
        Params(top_n_sigma=1.5),
        Params(xtc_probability=0.4, xtc_threshold=0.08),
        Params(bias={3: 2.0, 5: -1.0}),
        Params(allowed=frozenset(range(15))),
        Params(history=HISTORY, repetition_penalty=2.0),
        Params(history=HISTORY, num_output=3, frequency_penalty=0.5),
        Params(history=HISTORY, num_output=3, presence_penalty=0.5),
        Params(history=HISTORY, num_output=5, presence_penalty=0.5, penalty_window=2),
        Params(history=HISTORY, dry_multiplier=0.7),
        Params(0.8, 15, 0.95, 0.05, typical_p=0.95, top_n_sigma=2.0, xtc_probability=0.5),
    ],
    ids=lambda params: ",".join(f.name for f in fields(params) if getattr(params, f.name) != getattr(PLAIN, f.name)),
)
def test_distribution(op: Op, params: Params) -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(20).astype(np.float32)
    drawn = draw_many(op, logits.tolist(), params.but(seed=1), count := 8_000)
    observed = np.bincount(drawn, minlength=20)

    def chi_square(params: Params) -> float:
        expected = count * expected_probabilities(logits, params)
        if observed[expected == 0].any():
            return np.inf
        return float((((observed - expected) ** 2)[expected > 0] / expected[expected > 0]).sum())

    # 44 is the 99.9% quantile for 19 degrees of freedom; the seeds are fixed, so the results never change.
    assert chi_square(params) < 44
    assert params == PLAIN or chi_square(PLAIN) > 44


def test_draws_of_different_seeds_and_positions_are_independent() -> None:
    rows = [Params(seed=seed, position=position) for seed in range(100) for position in range(100)]
    tokens = draw(sample, np.zeros((len(rows), 2), np.float32), rows).reshape(100, 100).astype(int)
    for sums in (tokens.sum(0), tokens.sum(1)):  # binomial, mean 50, deviation 5
        assert sums.min() > 25
        assert sums.max() < 75
        assert 3.5 < sums.std() < 6.5


def test_same_seed_and_position_same_token() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 1000)).astype(np.float32)
    rows = [Params(seed=2**64 - 1, position=7)]
    assert draw(sample, logits, rows) == draw(sample, logits, rows)


def test_row_does_not_depend_on_the_batch() -> None:
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((16, 5000)) * 2).astype(np.float32)
    rows = [
        Params(float(rng.choice([0.0, 0.7, 1.0])), int(rng.choice([0, 40])), float(rng.choice([0.9, 1.0])), 0.01, seed)
        for seed in range(16)
    ]
    logits[3, 5] = np.nan
    alone = [int(draw(sample, logits[i : i + 1], rows[i : i + 1])[0]) for i in range(16)]
    assert draw(sample, logits, rows).tolist() == alone
    assert draw(sample, logits[::-1].copy(), rows[::-1]).tolist() == alone[::-1]


@OPS
@pytest.mark.parametrize(
    "params", [Params(0.0), Params(1.0), Params(1.0, 5, 0.9, 0.1)], ids=["greedy", "draw", "filter"]
)
def test_bad_row_fails_alone(op: Op, params: Params) -> None:
    logits = np.zeros((6, 70), np.float32)
    logits[:, 33] = 50
    logits[1, 0] = np.nan
    logits[2, 69] = np.inf
    logits[3] = -np.inf
    logits[4, :33] = -np.inf
    expected = [33, INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, 33, 33]
    assert draw(op, logits, [params] * 6).tolist() == expected


@OPS
def test_one_token_vocabulary(op: Op) -> None:
    rows = [Params(0.0), Params(1.0), Params(1.0, 1, 0.5, 1.0)]
    assert draw(op, np.full((3, 1), -3.5, np.float32), rows).tolist() == [0, 0, 0]


@OPS
def test_extreme_temperatures(op: Op) -> None:
    logits = [0.0, 1.0, -np.inf, 0.5]
    assert set(draw_many(op, logits, Params(1e-38), 50).tolist()) == {1}
    counts = np.bincount(draw_many(op, logits, Params(1e30), 3000))
    assert counts[2] == 0
    assert counts[[0, 1, 3]].min() > 900


@OPS
def test_no_rows(op: Op) -> None:
    sampled = op(mx.zeros((0, 5)), make_rows(0))
    assert [array.shape for array in sampled] == [(0,), (0,), (0, MAX_TOP_LOGPROBS), (0, MAX_TOP_LOGPROBS)]


@OPS
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits(op: Op, dtype: mx.Dtype) -> None:
    logits = mx.random.normal((4, 300), key=mx.random.key(0)).astype(dtype)
    rows = [Params(top_p=0.9, seed=seed) for seed in range(4)]
    half, single = (op(x, *pack(rows, 300)).token_ids.tolist() for x in (logits, logits.astype(mx.float32)))
    assert half == single


@OPS
def test_strided_logits(op: Op) -> None:
    logits = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    rows = [Params(seed=seed) for seed in range(4)]
    strided = op(mx.array(logits).T, *pack(rows, 300))
    assert strided.token_ids.tolist() == draw(op, np.ascontiguousarray(logits.T), rows).tolist()


@pytest.mark.parametrize("op", [_ext.sample, _ext.sample_fallback], ids=["op", "fallback"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": mx.zeros((3,))}, r"logits must be floating point \[B, V\] with V >= 1 but got float32 \(3\)"),
        ({"logits": mx.zeros((2, 0))}, r"logits must be .* but got float32 \(2,0\)"),
        ({"logits": mx.zeros((2, 3), mx.int32)}, r"logits must be .* but got int32 \(2,3\)"),
        ({"rows": mx.zeros((3, 29), mx.uint32)}, r"rows must be uint32 \(2,29\) .* but got uint32 \(3,29\)"),
        ({"rows": mx.zeros((2, 29))}, r"rows must be uint32 \(2,29\) .* but got float32 \(2,29\)"),
        ({"masks": mx.zeros((2, 2), mx.uint32)}, r"masks must be uint32 \(-1,1\) .* but got uint32 \(2,2\)"),
        ({"bias_ids": mx.zeros((2,))}, r"bias_ids must be int32 \(-1\) .* but got float32 \(2\)"),
        ({"bias_values": mx.zeros((1,))}, r"bias_values must be float32 \(0\) .* but got float32 \(1\)"),
        ({"history": mx.zeros((2, 1), mx.int32)}, r"history must be int32 \(-1\) .* but got int32 \(2,1\)"),
        ({"breakers": mx.zeros((2,), mx.uint32)}, r"breakers must be int32 \(-1\) .* but got uint32 \(2\)"),
    ],
)
def test_wrong_arguments(op: Callable[..., Any], change: dict[str, mx.array], message: str) -> None:
    arguments = {
        "logits": mx.zeros((2, 3)),
        "rows": mx.zeros((2, 29), mx.uint32),
        "masks": mx.zeros((0, 1), mx.uint32),
        "bias_ids": mx.zeros((0,), mx.int32),
        "bias_values": mx.zeros((0,)),
        "history": mx.zeros((0,), mx.int32),
        "breakers": mx.zeros((0,), mx.int32),
    } | change
    with pytest.raises(ValueError, match=r"\[sample\] " + message):
        op(**arguments)


@OPS
def test_ids_outside_the_vocabulary_are_skipped(op: Op) -> None:
    ids = mx.array(np.array([-1, 7, 10**9, -(2**31), 2**31 - 1, 7], np.int32))
    tables = SampleTables(bias_ids=ids, bias_values=mx.ones(6), history=ids, breakers=ids)
    rows = make_rows(
        1,
        temperature=0,
        bias_end=6,
        history_end=6,
        breakers_end=6,
        repetition_penalty=2,
        presence_penalty=1,
        dry_multiplier=1,
    )
    assert op(mx.array([[0.0, 3.0, 2.0]]), rows, tables).token_ids.tolist() == [1]
