"""One version of mlx and of nanobind everywhere: what we build with, run with, and check at import."""

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli

import mlx_server

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    return tomli.loads((ROOT / "pyproject.toml").read_text())


def pins(requirements: list[str], package: str) -> set[str]:
    matches = [re.match(rf"{package}(?:\[\w+\])?==([\d.]+)", line) for line in requirements]
    return {match[1] for match in matches if match}


def test_mlx_is_pinned_once() -> None:
    config = project()
    extras = config["project"]["optional-dependencies"]
    built = pins(config["build-system"]["requires"], "mlx")
    run = pins(config["project"]["dependencies"], "mlx")
    assert len(run) == 1
    assert built == run == pins(extras["cpu"], "mlx") == pins(extras["cuda"], "mlx")
    assert f"find_package(MLX {run.pop()} EXACT CONFIG REQUIRED)" in (ROOT / "csrc/CMakeLists.txt").read_text()


def test_nanobind_is_pinned() -> None:
    config = project()
    built = pins(config["build-system"]["requires"], "nanobind")
    assert len(built) == 1
    assert f"find_package(nanobind {built.pop()} EXACT CONFIG REQUIRED)" in (ROOT / "csrc/CMakeLists.txt").read_text()
    assert len(pins(config["project"]["dependencies"], "nanobind-backend")) == 1


def test_version_comes_from_pyproject() -> None:
    assert mlx_server.__version__ == metadata.version("mlx-server") == project()["project"]["version"]
