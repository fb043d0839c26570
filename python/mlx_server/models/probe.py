"""Whether MLX can compute with a quantized form on the device of this process.

`python -m mlx_server.models.probe GROUP_SIZE BITS MODE DTYPE PRODUCT` tries one form; exit code 0 if it can.
"""

import contextlib
import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import mlx.core as mx

from mlx_server.models.quantize import Quantization

log = logging.getLogger(__name__)

TIMEOUT_S = 60  # a process's start, MLX's own and the compilation of a few kernels take up to ten


@functools.cache
def is_computable(quantization: Quantization, dtype: mx.Dtype, *, experts: bool = False) -> bool:
    """Whether MLX can multiply `dtype` with such a matrix, or with matrices of `experts`, on the default device.

    It is tried once; a warning says if not.
    """
    try:
        if _may_hang(quantization):
            _try_in_process(quantization, dtype, experts)
        else:
            _try(quantization, dtype, experts)
    except (RuntimeError, ValueError) as error:
        log.warning(
            "MLX can't compute %d-bit %s weights in groups of %d on this device; they are held as %s: %s",
            quantization.bits,
            quantization.mode,
            quantization.group_size,
            dtype,
            error,
        )
        return False
    return True


def _may_hang(quantization: Quantization) -> bool:
    """On CUDA a form that lacks a kernel may block the whole process for good. The usual forms have theirs."""
    usual = quantization.mode == "affine" and quantization.bits in (4, 8) and quantization.group_size in (32, 64)
    return mx.default_device() == mx.Device(mx.gpu) and mx.cuda.is_available() and not usual


def _try(quantization: Quantization, dtype: mx.Dtype, experts: bool) -> None:
    """Compute with a tiny matrix: MLX's exception if that fails."""
    n, k = 64, 512
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    affine = mode == "affine"
    weight = mx.zeros((n, k * bits // 32), mx.uint32)
    scales = mx.zeros((n, k // group_size), dtype if affine else mx.uint8)
    biases = scales if affine else None
    for num_rows in (1, 64):  # a decode and a prompt take different kernels
        x = mx.zeros((num_rows, k), dtype)
        mx.eval(mx.quantized_matmul(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode))
    mx.eval(mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode))
    if experts:
        ids, stacked_biases = mx.zeros((1,), mx.uint32), None if biases is None else biases[None]
        stacked = weight[None], scales[None], stacked_biases
        mx.eval(mx.gather_qmm(x, *stacked, rhs_indices=ids, group_size=group_size, bits=bits, mode=mode))


def _try_in_process(quantization: Quantization, dtype: mx.Dtype, experts: bool) -> None:
    form = str(quantization.group_size), str(quantization.bits), quantization.mode
    product = "experts" if experts else "matrix"
    run_probe([sys.executable, "-m", __name__, *form, str(dtype).removeprefix("mlx.core."), product], TIMEOUT_S)


def run_probe(command: Sequence[str], timeout_s: float) -> None:
    """Run `command`: RuntimeError if it ends with an exit code other than 0 or not within `timeout_s` seconds.

    The last line of its standard error is the reason.
    """
    probe = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = probe.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        probe.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold even a killed process
            probe.communicate(timeout=5)
        raise RuntimeError(f"a trial did not end within {timeout_s:g} s") from error
    if probe.returncode < 0:
        raise RuntimeError(f"a trial died of {signal.Signals(-probe.returncode).name}")
    if probe.returncode > 0:
        lines = errors.decode(errors="replace").split("\n")
        raise RuntimeError(next((line.strip() for line in reversed(lines) if line.strip()), "a trial failed"))


def main(group_size: str, bits: str, mode: str, dtype: str, product: str) -> None:
    signal.alarm(TIMEOUT_S)  # ends the process even if the one that waits for it is gone
    quantization = Quantization(int(group_size), int(bits), mode)  # type: ignore[arg-type]
    try:
        _try(quantization, getattr(mx, dtype), product == "experts")
    except (RuntimeError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)  # MLX's clean-up at the end of a process may block too


if __name__ == "__main__":
    main(*sys.argv[1:])
