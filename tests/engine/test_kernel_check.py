"""What the check of kernels does with stand-ins for ops, and the cases of real ops on the default device."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_server.engine import kernel_check, warm_up
from mlx_server.engine.kernel_cases import kernel_cases
from mlx_server.engine.kernel_check import Check, check_kernels
from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model

PARITY = Path(__file__).parents[1] / "models" / "parity"
RIGHT = [1.0, -2.0, float("-inf")]


def right() -> list[mx.array]:
    return [mx.array(RIGHT)]


def nearly_right() -> list[mx.array]:
    return [mx.array([1.001, -2.0, float("-inf")])]


def wrong() -> list[mx.array]:
    return [mx.array([1.0, -2.5, float("-inf")])]


def nan() -> list[mx.array]:
    return [mx.array([1.0, float("nan"), float("-inf")])]


def raising() -> list[mx.array]:
    raise RuntimeError("unknown type name 'simd'")


def refusing() -> list[mx.array]:
    raise ValueError("[op] no kernel computes it.")


class StandIn:
    """An op with kernels, the best first, and a fallback behind them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *kernels: tuple[str, Callable[[], list[mx.array]]]) -> None:
        self.kernels, self.disabled, self.launched = kernels, list[str](), list[str]()
        monkeypatch.setattr(kernel_check, "disable_kernel", self.disabled.append)
        monkeypatch.setattr(kernel_check, "take_launched_kernels", self.take_launched)

    def take_launched(self) -> list[str]:
        launched, self.launched = self.launched, []
        return launched

    def run(self) -> list[mx.array]:
        for name, compute in self.kernels:
            if name not in self.disabled:
                self.launched = [name]
                return compute()
        return right()

    def check(self) -> None:
        check_kernels([Check("the op", self.run, right)])


@pytest.mark.parametrize("compute", [right, nearly_right])
def test_a_kernel_that_agrees_is_used(monkeypatch, caplog, compute):
    op = StandIn(monkeypatch, ("best", compute))
    op.check()
    assert op.disabled == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "compute, fault",
    [
        (wrong, "the largest difference is 0.5, of numbers up to 2"),
        (nan, "the largest difference is nan"),
        (raising, "unknown type name 'simd'"),
    ],
)
def test_a_wrong_kernel_is_disabled_with_a_warning(monkeypatch, caplog, compute, fault):
    op = StandIn(monkeypatch, ("best", compute), ("other", right))
    op.check()
    assert op.disabled == ["best"]
    assert "the op is wrong on" in caplog.text and "with best: " + fault in caplog.text
    assert kernel_check.device_name() in caplog.text


def test_what_is_used_instead_is_checked_too(monkeypatch):
    op = StandIn(monkeypatch, ("best", wrong), ("other", raising))
    op.check()
    assert op.disabled == ["best", "other"]


@pytest.mark.parametrize(
    "kernels, what",
    [
        ([("best", wrong), ("other", right)], "the op, by best: the largest difference is 0.5"),
        ([("best", raising), ("other", right)], "the op, by best: unknown type name 'simd'"),
        ([], "the op: [op] no kernel computes it"),
    ],
)
def test_the_batch_invariant_mode_does_without_no_kernel(monkeypatch, kernels, what):
    monkeypatch.setattr(kernel_check, "is_batch_invariant", lambda: True)
    op = StandIn(monkeypatch, *kernels)
    if not kernels:
        monkeypatch.setattr(op, "run", refusing)
    with pytest.raises(ModelLoadError, match=re.escape("--batch-invariant can't be kept on ") + ".*" + re.escape(what)):
        op.check()
    assert op.disabled == []


def test_an_exact_check_allows_no_difference(monkeypatch):
    op = StandIn(monkeypatch, ("best", nearly_right), ("other", right))
    check_kernels([Check("the op", op.run, right, exact=True)])
    assert op.disabled == ["best"]


def test_integers_must_be_equal(monkeypatch):
    def ids(last: int) -> list[mx.array]:
        return [mx.array([1000, last])]

    op = StandIn(monkeypatch, ("best", lambda: ids(1001)), ("other", lambda: ids(1002)))
    check_kernels([Check("the op", op.run, lambda: ids(1002))])
    assert op.disabled == ["best"]


def test_a_difference_that_no_kernel_makes_ends_the_check(monkeypatch, caplog):
    op = StandIn(monkeypatch)
    check_kernels([Check("the op", op.run, wrong)])
    assert op.disabled == []
    assert "with MLX's own ops" in caplog.text


def test_without_a_reference_nothing_is_disabled(monkeypatch, caplog):
    op = StandIn(monkeypatch, ("best", right))
    check_kernels([Check("the op", op.run, raising)])
    assert op.disabled == []
    assert "its reference fails: unknown type name" in caplog.text


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe/mlx-4bit", "qwen3_next"])
def test_a_models_ops_agree_with_their_references(caplog, name, kv_bits):
    cases = list(kernel_cases(load_model(str(PARITY / name)), kv_bits))
    check_kernels(cases)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    names = {case.name for case in cases}
    assert {
        "silu",
        "gelu",
        "rope",
        "attention (decode)",
        "attention (prefill)",
        "sampling",
        "sampling with penalties and a mask",
    } <= names
    assert ("an 8-bit KV cache" in names) == (kv_bits == 8)
    assert ("linear (decode of 1)" in names) == ("4bit" in name)
    for op, is_used in (
        ("routing", "qwen3_moe" in name or "qwen3_next" in name),
        ("experts", "qwen3_moe" in name or "qwen3_next" in name),
        ("gated delta", "qwen3_next" in name),
    ):
        ways = {f"{op} (decode)", f"{op} (prefill)"}
        assert ways & names == (ways if is_used else set())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe/mlx-4bit", "qwen3_next/mlx-4bit"])
def test_the_batch_invariant_modes_cases(batch_invariant, caplog, name):
    """Also of plain matrices, and whether rows are alike."""
    model = load_model(str(PARITY / name))
    cases = list(kernel_cases(model, None))
    check_kernels(cases)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    names = [case.name for case in cases]
    forms = {(matrix.num_columns, matrix.weight.shape) for matrix in model.matrices}
    assert names.count("linear") == names.count("linear (of rows alone)") == len(forms)


def test_nothing_is_checked_on_the_cpu(monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr(warm_up, "check_kernels", asked.append)
    model = load_model(str(PARITY / "llama"))
    default = mx.default_device()
    try:
        mx.set_default_device(mx.cpu)
        warm_up.check_model_kernels(model, None)
    finally:
        mx.set_default_device(default)
    assert asked == []
