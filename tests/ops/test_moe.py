"""`route` and `moe_mlp` and their fallbacks against a NumPy oracle."""

import re
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_server import _ext
from mlx_server.ops.moe import ExpertMatrix, moe_mlp, route
from reference import moe as oracle


class Form(NamedTuple):
    """How matrices are stored; plain if group_size is 0."""

    group_size: int = 0
    bits: int = 0
    mode: str = "affine"

    def store(self, dense: mx.array, dtype: mx.Dtype = mx.float32) -> ExpertMatrix:
        if self.group_size == 0:
            return ExpertMatrix(dense.astype(dtype))
        weight, *rest = mx.quantize(dense, self.group_size, self.bits, self.mode, stream=mx.cpu)
        if self.mode == "affine":
            rest = [array.astype(dtype) for array in rest]
        return ExpertMatrix(weight, *rest, group_size=self.group_size, bits=self.bits, mode=self.mode)

    def dense(self, matrix: ExpertMatrix) -> np.ndarray:
        if matrix.scales is None:
            return np.array(matrix.weight.astype(mx.float32)).astype(np.float64)
        scales, biases = matrix.scales, matrix.biases
        if biases is not None:  # else scales have a type of their own
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(
            matrix.weight,
            scales,
            biases,
            self.group_size,
            self.bits,
            self.mode,
            dtype=mx.float32,
            stream=mx.cpu,
        )
        return np.array(weight).astype(np.float64)


ON_GPU = mx.default_device() == mx.Device(mx.gpu)
PLAIN = Form()
FAST_FORMS = [PLAIN] + [Form(group_size, bits) for group_size in (32, 64, 128) for bits in (4, 8)]
FAST_FORMS += [Form(64, bits) for bits in (2, 3, 5, 6)]
OTHER_FORMS = [Form(32, 4, "mxfp4"), Form(32, 8, "mxfp8"), Form(16, 4, "nvfp4")]
# form, number of tokens
OP_CASES = [(form, tokens) for form in FAST_FORMS + OTHER_FORMS for tokens in (1, 5, 70)]
FALLBACK_CASES = OP_CASES
# How many experts, how many of them for a token
ROUTES = [(num_experts, top_k) for num_experts in range(1, 41) for top_k in range(1, num_experts + 1)]
BITS = [3, 4, 5, 6, 8]
if ON_GPU:  # CUDA compiles each kernel anew for each form, for a second or so, and MLX has no kernels for some forms
    FALLBACK_CASES = [(form, tokens) for form in (PLAIN, Form(32, 4), Form(64, 8)) for tokens in (5, 70)]
    OP_CASES = FALLBACK_CASES + [(form, 5) for form in FAST_FORMS if form.group_size == 64]
    ROUTES = [(4, 4), (40, 3), (40, 40)]
    BITS = [4]


class Experts:
    """Random matrices of E experts, and what computes with them."""

    def __init__(
        self, num_experts: int, n: int, d: int, form: Form = PLAIN, seed: int = 0, dtype: mx.Dtype = mx.float32
    ) -> None:
        rng = np.random.default_rng(seed)

        def matrix(*shape: int) -> ExpertMatrix:
            return form.store(mx.array(rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))), dtype)

        self.num_experts, self.d = num_experts, d
        self.matrices = {
            "gate": matrix(num_experts, n, d),
            "up": matrix(num_experts, n, d),
            "down": matrix(num_experts, d, n),
        }
        self.dense = oracle.Experts(**{name: form.dense(matrix) for name, matrix in self.matrices.items()})

    def __call__(
        self, *arrays: mx.array, shared: mx.array | None = None, op: Callable[..., mx.array] = moe_mlp
    ) -> mx.array:
        return op(*arrays, **self.matrices, shared=shared)

    def oracle(self, *arrays: mx.array, shared: mx.array | None = None) -> np.ndarray:
        return oracle.moe_mlp(*map(np.array, arrays), self.dense, None if shared is None else np.array(shared))


def make_x(*shape: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32))


def make_choice(tokens: int, num_experts: int, top_k: int, seed: int = 2) -> tuple[mx.array, mx.array]:
    """experts and weights [T, k]"""
    return route(make_x(tokens, num_experts, seed=seed), top_k=top_k, scoring="softmax", normalize=True)


def assert_close(y: mx.array, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    if ON_GPU:
        tolerance = max(tolerance, 5e-3)  # CUDA multiplies float32 in TF32
    assert y.shape == expected.shape
    scale = np.abs(expected).max(initial=1)
    np.testing.assert_allclose(np.array(y.astype(mx.float32)), expected, rtol=0, atol=tolerance * scale)


def logits_rows(num_experts: int) -> st.SearchStrategy[list[list[float]]]:
    logit = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([0.0, 1.0, -np.inf]))
    return st.lists(st.lists(logit, min_size=num_experts, max_size=num_experts), min_size=1, max_size=6)


@pytest.mark.parametrize("op", [_ext.route, _ext.route_fallback], ids=["op", "fallback"])
@settings(deadline=None)
@given(st.data(), st.sampled_from(["SOFTMAX", "SIGMOID"]), st.booleans())
def test_route_agrees_with_the_oracle(op, data, scoring, normalize):
    num_experts, top_k = data.draw(st.sampled_from(ROUTES))
    logits = np.array(data.draw(logits_rows(num_experts)), np.float32)
    logits[np.isneginf(logits).all(-1)] = 0
    experts, weights = op(mx.array(logits), top_k=top_k, scoring=_ext.Scoring[scoring], normalize=normalize)
    assert (experts.shape, experts.dtype) == (weights.shape, mx.int32) and weights.dtype == mx.float32
    _, scores = oracle.route(logits, top_k=logits.shape[1], scoring=scoring.lower(), normalize=False)
    order, _ = oracle.route(logits, top_k=logits.shape[1], scoring=scoring.lower(), normalize=False)
    for t, chosen in enumerate(np.array(experts)):
        assert len(set(chosen)) == top_k
        of_expert = dict(zip(order[t], scores[t], strict=True))
        expected = np.array([of_expert[expert] for expert in chosen])
        np.testing.assert_allclose(expected, scores[t, :top_k], rtol=1e-5, atol=1e-37)  # the best, up to near ties
        if not normalize:
            np.testing.assert_allclose(np.array(weights)[t], expected, rtol=1e-5, atol=1e-37)
        elif expected.sum() > 1e-30:
            np.testing.assert_allclose(np.array(weights)[t], expected / expected.sum(), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("op", [_ext.route, _ext.route_fallback], ids=["op", "fallback"])
@pytest.mark.parametrize("scoring", _ext.Scoring)
def test_equal_scores_go_to_the_lower_ids(op, scoring):
    logits = mx.array([[1.0, 2, 2, 0, 2, 1], [3, 3, 3, 3, 3, 3]])
    experts, weights = op(logits, top_k=4, scoring=scoring, normalize=True)
    assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert weights[1].tolist() == [0.25] * 4


@pytest.mark.parametrize("op", [_ext.route, _ext.route_fallback], ids=["op", "fallback"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_nan_stay_in_their_row(op, bad):
    logits = make_x(3, 20)
    expected = op(logits, top_k=2, scoring=_ext.Scoring.SOFTMAX, normalize=True)
    logits[1, 5] = bad
    experts, weights = op(logits, top_k=2, scoring=_ext.Scoring.SOFTMAX, normalize=True)
    assert experts[1].tolist() == [0, 1] and mx.isnan(weights[1]).all()
    for row in (0, 2):
        assert mx.array_equal(experts[row], expected[0][row]) and mx.array_equal(weights[row], expected[1][row])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_route_computes_in_float32(dtype):
    logits = make_x(7, 12).astype(dtype)
    half = route(logits, top_k=3, scoring="softmax", normalize=False)
    full = route(logits.astype(mx.float32), top_k=3, scoring="softmax", normalize=False)
    assert mx.array_equal(half[0], full[0]) and mx.array_equal(half[1], full[1])


@pytest.mark.parametrize(
    "op, form, tokens",
    [pytest.param(moe_mlp, *case, id=f"op-{case}") for case in OP_CASES]
    + [pytest.param(_ext.moe_mlp_fallback, *case, id=f"fallback-{case}") for case in FALLBACK_CASES],
)
def test_mlp_agrees_with_the_oracle(op, form, tokens):
    experts = Experts(6, 128, 256, form)
    arrays = make_x(tokens, 256), *make_choice(tokens, 6, 2)
    shared = make_x(tokens, 256, seed=3)
    assert_close(experts(*arrays, op=op), experts.oracle(*arrays))
    assert_close(experts(*arrays, op=op, shared=shared), experts.oracle(*arrays, shared=shared))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_distribution_of_tokens(data):
    """Unused experts, one that takes all, repeated ones, odd sizes."""
    num_experts = data.draw(st.integers(1, 9))
    tokens = data.draw(st.sampled_from([0, 1, 2, 3, 7, 33, 300]))
    top_k = data.draw(st.integers(1, num_experts))
    quantized = data.draw(st.booleans())
    n, d = (64, 96) if quantized else (data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
    used = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=num_experts))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    chosen = mx.array(rng.choice(used, (tokens, top_k)).astype(np.int32))
    form = Form(32, data.draw(st.sampled_from(BITS))) if quantized else PLAIN
    experts = Experts(num_experts, n, d, form)
    arrays = make_x(tokens, d), chosen, mx.array(rng.standard_normal((tokens, top_k)).astype(np.float32))
    shared = make_x(tokens, d, seed=4) if data.draw(st.booleans()) else None
    y = experts(*arrays, shared=shared)
    assert_close(y, experts.oracle(*arrays, shared=shared), 1e-5)
    assert_close(y, np.array(experts(*arrays, shared=shared, op=_ext.moe_mlp_fallback)), 1e-5)


@pytest.mark.parametrize("form", FAST_FORMS + OTHER_FORMS, ids=str)
def test_a_token_does_not_depend_on_the_tokens_beside_it(form):
    """Promised on the CPU; MLX's products on GPUs may depend on the number of rows."""
    with mx.stream(mx.cpu):
        experts, logits, x = Experts(8, 128, 128, form), make_x(90, 8), make_x(90, 128)

        def block(begin: int, end: int) -> mx.array:
            choice = route(logits[begin:end], top_k=3, scoring="softmax", normalize=True)
            return experts(x[begin:end], *choice, shared=x[begin:end])

        alone = mx.concatenate([block(i, i + 1) for i in range(90)])
        for tokens in (1, 2, 3, 5, 8, 33, 90):
            assert mx.array_equal(block(0, tokens), alone[:tokens]), tokens


@pytest.mark.parametrize("op", [moe_mlp, _ext.moe_mlp_fallback], ids=["op", "fallback"])
@pytest.mark.parametrize("form", [PLAIN, Form(32, 4)], ids=str)
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_token(op, form, tokens, bad):
    experts, choice, x = Experts(4, 32, 64, form), make_choice(tokens, 4, 2), make_x(tokens, 64)
    y = np.array(experts(x, *choice, shared=x, op=op))
    x[1] = bad
    broken = np.array(experts(x, *choice, shared=x, op=op))
    assert not np.isfinite(broken[1]).any()
    np.testing.assert_array_equal(np.delete(broken, 1, 0), np.delete(y, 1, 0))


@pytest.mark.parametrize("form", [PLAIN, Form(32, 4)], ids=str)
def test_arrays_with_gaps(form):
    experts, choice = Experts(4, 32, 64, form), make_choice(6, 4, 2)
    for x in (make_x(64, 6).T, make_x(12, 128)[::2, ::2]):
        assert_close(experts(x, *choice, shared=x), experts.oracle(x, *choice, shared=x))
    experts.matrices["up"] = form.store(make_x(64, 32, 4).transpose(2, 1, 0).transpose(0, 2, 1).swapaxes(1, 2)[:, :32])
    turned = [a[::-1] for a in choice]
    x = make_x(6, 64)
    assert_close(experts(x[::-1], *turned), np.array(experts(x, *choice))[::-1])


@pytest.mark.parametrize("form", [PLAIN, Form(32, 4)], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [6, 90])
def test_half_precision(form, dtype, tolerance, tokens):
    """Numbers of both kinds: a GPU computes few tokens in another way than many."""
    experts = Experts(4, 32, 64, form, dtype=dtype if ON_GPU else mx.float32)  # CPUs hold scales in float32
    choice, x = make_choice(tokens, 4, 2), make_x(tokens, 64).astype(dtype)
    y = experts(x, *choice, shared=x)
    assert y.dtype == dtype
    assert_close(y, experts.oracle(x.astype(mx.float32), *choice, shared=x.astype(mx.float32)), tolerance)


def test_a_block_not_yet_computed():
    """Routing and experts in one graph, several layers deep, as a model runs them."""
    experts, router = Experts(8, 64, 64, Form(64, 4)), make_x(64, 8)

    def layer(x: mx.array) -> mx.array:
        return experts(x, *route(x @ router, top_k=2, scoring="softmax", normalize=True), shared=x) / 2

    x = step = make_x(5, 64)
    for _ in range(20):
        x = layer(x)
        step = layer(step)
        mx.eval(step)
    assert mx.array_equal(x, step)


def test_mistakes_are_named():
    experts, x, (ids, weights) = Experts(4, 32, 64, Form(32, 4)), make_x(3, 64), make_choice(3, 4, 2)
    gate, down = experts.matrices["gate"], experts.matrices["down"]

    def fails(message: str, *arrays: mx.array, shared: mx.array | None = None, **matrices: ExpertMatrix) -> None:
        with pytest.raises(ValueError, match=re.escape("[moe_mlp] " + message)):
            moe_mlp(*arrays, **{**experts.matrices, **matrices}, shared=shared)

    fails("x must be floating point [T, D] but got int32 (3,64)", x.astype(mx.int32), ids, weights)
    fails("experts must be int32 [3, k] but got uint32 (3,2)", x, ids.astype(mx.uint32), weights)
    fails("weights must be float32 (3,2) like experts but got float32 (3,1)", x, ids, weights[:, :1])
    fails("shared must be float32 (3,64) like x but got float32 (2,64)", x, ids, weights, shared=x[:2])
    fails("up must be uint32 (4,32,8) but got uint32 (4,64,4)", x, ids, weights, up=down)
    fails("down must be uint32 (4,64,4) but got uint32 (4,32,8)", x, ids, weights, down=gate)
    fails("gate must be [E, N, D] but got (3,64)", x, ids, weights, gate=ExpertMatrix(x))
    fails("up must be floating point (4,32,64) but got uint32 (4,32,8)", x, ids, weights, up=ExpertMatrix(gate.weight))
    without_biases = ExpertMatrix(gate.weight, gate.scales, group_size=32, bits=4)
    fails("gate must have biases in the mode affine and no other but got", x, ids, weights, gate=without_biases)
    other_groups = ExpertMatrix(gate.weight, gate.scales, gate.biases, group_size=64, bits=4)
    fails("scales and biases of gate must have the shape (4,32,1)", x, ids, weights, gate=other_groups)
    no_groups = ExpertMatrix(gate.weight, gate.scales, gate.biases)
    fails("gate must have bits in 1..8 and groups that divide its 64 columns", x, ids, weights, gate=no_groups)
    for message, logits, top_k in [
        ("logits must be floating point [T, E] but got float32 (4)", weights[0, :1].reshape(1)[[0, 0, 0, 0]], 1),
        ("top_k must be in 1..2 but got 3", weights, 3),
        ("top_k must be in 1..2 but got 0", weights, 0),
    ]:
        with pytest.raises(ValueError, match=re.escape("[route] " + message)):
            route(logits, top_k=top_k, scoring="softmax", normalize=True)
    with pytest.raises(ValueError, match=re.escape("[route] scoring must be softmax or sigmoid but got relu")):
        route(weights, top_k=1, scoring="relu", normalize=True)
