"""Fixtures of several benchmarks."""

import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_server.checkpoint.demo import fetch_demo
from mlx_server.checkpoint.progress import NoProgress


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, downloaded on first use."""
    return fetch_demo(NoProgress())


@pytest.fixture(autouse=True)
def _full_clock() -> None:
    """Keep a GPU busy until it runs at its full clock: an idle one starts at a fifth of it."""
    if mx.default_device() == mx.gpu:
        x = mx.random.normal((4096, 4096))
        end_s = time.monotonic() + 0.2
        while time.monotonic() < end_s:
            mx.eval(x @ x)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Peers may warn, and take their time."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(0))
