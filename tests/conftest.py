"""Fixtures of several suites."""

import signal
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fake_engine import Backend
    from mlx_server.wire import RequestOutput

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


@pytest.fixture
def outputs_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers take the engine's outputs one at a time, so that two are never joined, however late a thread runs."""
    from mlx_server.engine_client import EngineStream  # noqa: PLC0415 - only its users need ZeroMQ

    get_all = EngineStream.get
    held: defaultdict[EngineStream, list[RequestOutput]] = defaultdict(list)

    def get(self: EngineStream, timeout_s: float) -> "list[RequestOutput] | None":
        outputs = held[self] or get_all(self, timeout_s) or []
        held[self] = outputs[1:]
        return outputs[:1] or None

    monkeypatch.setattr(EngineStream, "get", get)


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
