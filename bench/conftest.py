"""Fixtures of several benchmarks."""

from pathlib import Path

import pytest

from mlx_server.checkpoint.demo import fetch_demo
from mlx_server.checkpoint.progress import NoProgress


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, downloaded on first use."""
    return fetch_demo(NoProgress())
