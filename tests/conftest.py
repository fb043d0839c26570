"""Fixtures of several suites."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fake_engine import Backend

# The same examples in every run, and no test that fails because the machine is busy.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")

# `nohup pytest` and background jobs ignore these, and the servers that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def backend(tmp_path: Path) -> "Iterator[Backend]":
    from fake_engine import Backend  # noqa: PLC0415 - only its users need falcon

    backend = Backend(tmp_path)
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, downloaded on first use. Tests that need it carry the marker `model`."""
    from mlx_server.checkpoint.demo import fetch_demo  # noqa: PLC0415 - only its users need the file
    from mlx_server.checkpoint.progress import NoProgress  # noqa: PLC0415

    return fetch_demo(NoProgress())


@pytest.fixture(scope="module")
def batch_invariant() -> "Iterator[None]":
    """The batch-invariant mode, for the rest of the module."""
    from mlx_server.ops.kernels import set_batch_invariant  # noqa: PLC0415 - only its users need MLX

    set_batch_invariant(True)
    yield
    set_batch_invariant(False)
