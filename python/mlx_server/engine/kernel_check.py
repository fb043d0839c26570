"""Compares the kernels that a model needs with their references on this GPU, before any request is served.

A kernel is proved on other hardware and compiled here for the first time. One that does not compile or gives other
numbers than MLX's own ops is not used: the op takes its next best way, which is compared in turn. The batch-invariant
mode has no other way: there the model is not served.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_server.errors import ModelLoadError
from mlx_server.ops.kernels import disable_kernel, is_batch_invariant, take_launched_kernels

log = logging.getLogger(__name__)

# How far an output may lie from its reference, relative to the reference's largest number. Wide, as references are not
# exact on GPUs: MLX multiplies float32 in TF32 or less there, and rounds half precision between its ops.
TOLERANCE = {mx.float32: 3e-2, mx.float16: 3e-2, mx.bfloat16: 5e-2}

Run = Callable[[], Sequence[mx.array]]
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Check:
    """One op on one kind of batch. Each call computes anew, on the same values; integers must be equal.

    exact: so must all numbers.
    """

    name: str
    run: Run
    reference: Run
    exact: bool = False


def check_kernels(checks: Iterable[Check]) -> None:
    """Compare each; `checks` are made one by one, with what is in use by then."""
    begin = time.monotonic()
    num_checks = sum(1 for check in checks if _check(check))
    log.info("%d checks of kernels took %.1f s", num_checks, time.monotonic() - begin)


def _check(check: Check) -> bool:
    """Disable what is wrong until nothing is; False if there is nothing to compare with."""
    try:
        expected = _numbers(check.reference())
    except (RuntimeError, ValueError) as error:
        log.warning("%s can't be checked on %s: its reference fails: %s", check.name, device_name(), error)
        return False
    while (fault := _fault(check, expected)) is not None:
        kernels = take_launched_kernels()
        names = ", ".join(kernels) or "MLX's own ops"
        if is_batch_invariant():
            by = f", by {names}" if kernels else ""
            raise ModelLoadError(f"--batch-invariant can't be kept on {device_name()}: {check.name}{by}: {fault}")
        log.warning("%s is wrong on %s with %s: %s", check.name, device_name(), names, fault)
        if not kernels:
            break
        for kernel in kernels:
            disable_kernel(kernel)
        log.warning("not used from now on: %s; the server may be slower", names)
    return True


def _fault(check: Check, expected: list[Numbers]) -> str | None:
    """What is wrong with what the op gives, or None. The kernels that it launched can be asked for afterwards."""
    take_launched_kernels()
    try:
        outputs = check.run()
        got = _numbers(outputs)
    except (RuntimeError, ValueError) as error:  # it does not compile, or can't be launched
        return str(error)
    for output, ours, theirs in zip(outputs, got, expected, strict=True):
        with np.errstate(invalid="ignore"):
            difference = np.where(ours == theirs, 0, np.abs(ours - theirs)).max(initial=0)
        finite = np.abs(theirs[np.isfinite(theirs)])
        tolerance = 0 if check.exact else TOLERANCE.get(output.dtype, 0)
        if not difference <= tolerance * finite.max(initial=0):
            return f"the largest difference is {difference:.3g}, of numbers up to {finite.max(initial=0):.3g}"
    return None


def _numbers(arrays: Sequence[mx.array]) -> list[Numbers]:
    return [np.array(array.astype(mx.float32)) for array in arrays]


def device_name() -> str:
    return str(mx.device_info().get("device_name", mx.default_device()))
