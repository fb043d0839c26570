"""Are the packages whose compiled interface the extension uses the ones that it was built against?

Every mlx patch release drops exported C++ symbols, and nanobind-backend may change its internal ABI in one; a mismatch
shows as a crash or as "incompatible function arguments" much later. The build takes the exact versions that
pyproject.toml requires (CMake refuses others), so this package's metadata says what it was built against. Nothing here
imports mlx.
"""

import re
import sys
from importlib import metadata, util
from pathlib import Path

# Each brings libmlx and must have mlx's version. On Linux they are alternatives: all write the same mlx/lib/libmlx.so.
_LIBMLX_PACKAGES = ("mlx-metal", "mlx-cpu", "mlx-cuda-13", "mlx-cuda-12")


def check_packages() -> None:
    """Raises ImportError, one sentence that says what to install, unless mlx, libmlx and nanobind-backend fit."""
    required = _exact_requirements()
    for package, version in required.items():
        _check_version(package, version)
    libmlx_packages = [package for package in _LIBMLX_PACKAGES if _installed(package)]
    for package in libmlx_packages:
        _check_version(package, required["mlx"])
    if sys.platform == "linux" and not _libmlx_exists():
        if libmlx_packages:
            remedy = f"run `pip install --force-reinstall {libmlx_packages[0]}=={required['mlx']}`"
        else:
            remedy = "run `pip install 'mlx-server[cpu]'`, or `pip install 'mlx-server[cuda]'` for an NVIDIA GPU"
        raise ImportError(f"mlx-server needs libmlx, which is not installed: {remedy}.", name="mlx")


def _exact_requirements() -> dict[str, str]:
    """Package -> version, of the requirements that are pinned for everyone (not those of extras)."""
    matches = [re.fullmatch(r"([\w-]+)==([\w.]+)", line) for line in metadata.requires("mlx-server") or []]
    return {match[1]: match[2] for match in matches if match}


def _check_version(package: str, version: str) -> None:
    installed = _installed(package)
    if installed != version:
        found = "is not installed" if installed is None else f"is installed as {installed}"
        raise ImportError(
            f"mlx-server was built against {package} {version}, which {found}: run `pip install {package}=={version}`.",
            name=package,
        )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _libmlx_exists() -> bool:
    spec = util.find_spec("mlx")
    folders = spec.submodule_search_locations if spec else None
    return any(Path(folder, "lib", "libmlx.so").exists() for folder in folders or ())
