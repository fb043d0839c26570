"""Fixtures of several benchmarks."""

from pathlib import Path

import pytest

from mlx_server.checkpoint.demo import fetch_demo
from mlx_server.checkpoint.progress import NoProgress


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, downloaded on first use."""
    return fetch_demo(NoProgress())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Peers may warn, and take their time."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(0))
