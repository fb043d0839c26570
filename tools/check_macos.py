"""Builds the extension for a Mac, with zig on any machine, and checks that it would load beside the macOS libmlx.

    python tools/check_macos.py

The build is CMakeLists.txt's own, with macos.toolchain.cmake as compiler and linker, against PyPI's mlx-metal wheel.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import lief
import nanobind
from check_wheel import extension_faults, parse

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/macos"
MIN_MACOS = [14, 0, 0]
FROM_ANY_LIBRARY = -2  # the ordinal of a symbol that the linker found nowhere (dynamic_lookup)


def download_mlx() -> Path:
    """The macOS wheel of the mlx that is installed here, unpacked."""
    version = metadata.version("mlx")
    folder = BUILD / f"mlx-metal-{version}"
    if not folder.exists():
        options = ["--platform", "macosx_14_0_arm64", "--only-binary", ":all:", "--no-deps", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(BUILD), f"mlx-metal=={version}"]
        subprocess.run(command, check=True)
        with ZipFile(next(BUILD.glob(f"mlx_metal-{version}-*.whl"))) as archive:
            archive.extractall(folder)
    return folder / "mlx"


def build(mlx: Path) -> Path:
    """Compiles and links; the extension's path."""
    toolchain = ROOT / "tools/macos.toolchain.cmake"
    options = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", f"-DMLX_ROOT={mlx}", f"-DPython_EXECUTABLE={sys.executable}"]
    tools = Path(sys.executable).parent  # cmake and ninja of this environment
    environment = os.environ | {"PYTHON": sys.executable, "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options], check=True, env=environment)
    subprocess.run(["cmake", "--build", BUILD], check=True, env=environment)
    return BUILD / "csrc/_ext.abi3.so"


def symbol_faults(extension: lief.MachO.Binary, libmlx: lief.MachO.Binary) -> list[str]:
    """Symbols that nobody on a Mac will supply: neither libmlx, nor Python as far as nanobind tells the linker."""
    python = (Path(nanobind.__file__).parent / "cmake/darwin-ld-cpython.sym").read_text().split()
    exported = {str(symbol.name) for symbol in libmlx.exported_symbols} | set(python)
    bindings = [(str(binding.symbol.name), binding.library_ordinal) for binding in extension.bindings if binding.symbol]
    needed = {name for name, ordinal in bindings if ordinal == FROM_ANY_LIBRARY or "mlx4core" in name}
    return [f"nobody exports {name}" for name in sorted(needed - exported)]


def main() -> int:
    lief.logging.disable()
    BUILD.mkdir(parents=True, exist_ok=True)
    mlx = download_mlx()
    path = build(mlx)
    extension, libmlx = parse(path), parse(mlx / "lib/libmlx.dylib")
    assert isinstance(extension, lief.MachO.Binary)
    assert isinstance(libmlx, lief.MachO.Binary)
    faults = extension_faults(path) + symbol_faults(extension, libmlx)
    minimum = extension.build_version.minos if extension.build_version else None
    if minimum != MIN_MACOS:
        faults.append(f"the extension is for macOS {minimum}, not {MIN_MACOS}")
    print(*(faults or ["The extension builds for arm64 macOS 14 and finds all its symbols."]), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
