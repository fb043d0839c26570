"""Writes python/mlx_server/_ext.pyi from the built extension; with --check, says whether the committed one is current.

nanobind's CMake command for this does not work in editable installs, where no mlx lies beside the staging folder.
"""

import sys
from difflib import unified_diff
from pathlib import Path

import mlx.core  # noqa: F401 - registers mx.array, so that signatures name it
from nanobind.stubgen import StubGen

from mlx_server import _ext

STUB = Path(__file__).parents[1] / "python/mlx_server/_ext.pyi"


def generate() -> str:
    generator = StubGen(_ext)
    generator.put(_ext)
    return str(generator.get())


def main() -> int:
    generated = generate()
    if sys.argv[1:] != ["--check"]:
        STUB.write_text(generated)
        return 0
    diff = list(
        unified_diff(STUB.read_text().splitlines(), generated.splitlines(), "committed", "generated", lineterm="")
    )
    if diff:
        print(*diff, "", "The bindings changed: run `python tools/stubs.py` and commit _ext.pyi.", sep="\n")
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
