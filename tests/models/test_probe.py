"""Trying whether MLX can compute a form, in this process and in one of its own."""

import re
import sys

import mlx.core as mx
import pytest

from mlx_server.models import probe
from mlx_server.models.probe import is_computable, run_probe
from mlx_server.models.quantize import Quantization

USUAL, UNUSUAL = Quantization(64, 4), Quantization(128, 2)


@pytest.fixture
def cuda(monkeypatch):
    """Looks like a machine with CUDA; the processes that it starts compute on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    is_computable.cache_clear()
    yield
    is_computable.cache_clear()


def stand_in(monkeypatch, program: str) -> list[list[str]]:
    """Let `program` answer in the place of each trial; returns the commands that would have run."""
    commands = []

    def run(command, timeout_s):
        commands.append(command)
        run_probe([sys.executable, "-c", program], 20)

    monkeypatch.setattr(probe, "run_probe", run)
    return commands


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("form", [UNUSUAL, Quantization(32, 4, "mxfp4"), Quantization(16, 4, "nvfp4")])
def test_a_process_tries_what_may_hang(cuda, form, experts):
    assert is_computable(form, mx.float32, experts=experts)


def test_the_usual_forms_are_tried_here(cuda, monkeypatch):
    commands = stand_in(monkeypatch, "")
    for bits in (4, 8):
        for group_size in (32, 64):
            assert is_computable(Quantization(group_size, bits), mx.float32)
    assert commands == []


def test_a_form_is_tried_once(cuda, monkeypatch):
    commands = stand_in(monkeypatch, "")
    for _ in range(3):
        assert is_computable(UNUSUAL, mx.float16)
    [command] = commands
    assert command[1:] == ["-m", "mlx_server.models.probe", "128", "2", "affine", "float16", "matrix"]


@pytest.mark.parametrize(
    "program, reason",
    [
        ("import os; os.abort()", "a trial died of SIGABRT"),
        ("import sys; sys.exit('cuGraphAddKernelNode: invalid argument')", "cuGraphAddKernelNode: invalid argument"),
        ("import os; os._exit(3)", "a trial failed"),
    ],
    ids=["dies", "says why", "says nothing"],
)
def test_what_a_process_could_not_compute_is_not_computable(cuda, monkeypatch, caplog, program, reason):
    stand_in(monkeypatch, program)
    assert not is_computable(UNUSUAL, mx.float16)
    [record] = caplog.records
    assert record.getMessage() == (
        "MLX can't compute 2-bit affine weights in groups of 128 on this device; "
        f"they are held as mlx.core.float16: {reason}"
    )


def test_a_process_that_hangs_is_killed():
    hangs = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    with pytest.raises(RuntimeError, match=r"a trial did not end within 0\.5 s"):
        run_probe([sys.executable, "-c", hangs], 0.5)


def test_the_module_tries_one_form():
    command = [sys.executable, "-m", "mlx_server.models.probe", "32", "4", "affine"]
    run_probe([*command, "float32", "matrix"], 60)
    with pytest.raises(RuntimeError, match=re.escape("[quantized_matmul]")):
        run_probe([*command, "int32", "matrix"], 60)
