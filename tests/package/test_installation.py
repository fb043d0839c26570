"""`import mlx_server` in made-up environments: one sentence says what is wrong and which command mends it."""

import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "python"
REQUIRES = ["mlx==0.32.4", "nanobind-backend==1.0.0", "click>=8.1", 'mlx[cpu]==0.32.4; extra == "cpu"']
WHOLE = {"mlx": "0.32.4", "nanobind-backend": "1.0.0", "mlx-cpu": "0.32.4"}


def make_site(folder: Path, packages: dict[str, str], *, libmlx: bool = True) -> Path:
    """A site-packages folder with our sources and the metadata of packages that are not there."""
    folder.mkdir()
    (folder / "mlx_server").symlink_to(SOURCES / "mlx_server")
    (folder / "mlx/lib").mkdir(parents=True)
    if libmlx:
        (folder / "mlx/lib/libmlx.so").touch()
    for name, version in {"mlx-server": "1.2.3", **packages}.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        requires = "".join(f"Requires-Dist: {line}\n" for line in REQUIRES) if name == "mlx-server" else ""
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
    return folder


def run(site: Path, code: str, platform: str = "linux") -> subprocess.CompletedProcess[str]:
    """Runs code in a Python that sees the standard library and that folder only."""
    prelude = f"import sys; sys.path.insert(0, {str(site)!r}); sys.platform = {platform!r}; "
    command = [sys.executable, "-I", "-S", "-B", "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_imports_without_mlx_and_knows_its_version(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", WHOLE)
    result = run(site, "import mlx_server; print(mlx_server.__version__, 'mlx' in sys.modules)")
    assert (result.stderr, result.stdout) == ("", "1.2.3 False\n")


@pytest.mark.parametrize(
    ("changed", "libmlx", "platform", "sentence"),
    [
        (
            {"mlx": "0.32.3"},
            True,
            "linux",
            "mlx-server was built against mlx 0.32.4, which is installed as 0.32.3: run `pip install mlx==0.32.4`.",
        ),
        (
            {"nanobind-backend": "1.0.1"},
            True,
            "linux",
            "mlx-server was built against nanobind-backend 1.0.0, which is installed as 1.0.1: "
            "run `pip install nanobind-backend==1.0.0`.",
        ),
        (
            {"nanobind-backend": None},
            True,
            "linux",
            "mlx-server was built against nanobind-backend 1.0.0, which is not installed: "
            "run `pip install nanobind-backend==1.0.0`.",
        ),
        (
            {"mlx-cpu": None, "mlx-metal": "0.32.5"},
            False,
            "darwin",
            "mlx-server was built against mlx-metal 0.32.4, which is installed as 0.32.5: "
            "run `pip install mlx-metal==0.32.4`.",
        ),
        (
            {"mlx-cpu": None},
            False,
            "linux",
            "mlx-server needs libmlx, which is not installed: run `pip install 'mlx-server[cpu]'`, "
            "or `pip install 'mlx-server[cuda]'` for an NVIDIA GPU.",
        ),
        (
            {},
            False,
            "linux",
            "mlx-server needs libmlx, which is not installed: run `pip install --force-reinstall mlx-cpu==0.32.4`.",
        ),
    ],
    ids=["other mlx", "other nanobind", "no nanobind", "other libmlx", "no libmlx", "libmlx lost"],
)
def test_names_what_to_install(
    tmp_path: Path, changed: dict[str, str | None], libmlx: bool, platform: str, sentence: str
) -> None:
    packages = {name: version for name, version in (WHOLE | changed).items() if version is not None}
    site = make_site(tmp_path / "site", packages, libmlx=libmlx)
    result = run(site, "import mlx_server", platform)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: {sentence}"


FAKE_CORE = "class array:\n    def __init__(self, value): pass\n"
FAKE_EXTENSIONS = {
    "raise ImportError('undefined symbol: mlx')": (
        "mlx-server's C++ extension does not load (undefined symbol: mlx): "
        "run `pip install --force-reinstall --no-cache-dir mlx-server`."
    ),
    "def array_size(array): raise TypeError('incompatible function arguments')": (
        "mlx-server's C++ extension and mlx.core do not share one nanobind (found 0): "
        "run `pip install --force-reinstall --no-cache-dir mlx-server`."
    ),
}


@pytest.mark.parametrize(("extension", "sentence"), FAKE_EXTENSIONS.items(), ids=["does not load", "other nanobind"])
def test_a_broken_extension_is_one_sentence(tmp_path: Path, extension: str, sentence: str) -> None:
    site = make_site(tmp_path / "site", WHOLE)
    (site / "mlx/core.py").write_text(FAKE_CORE)
    (site / "mlx_server").unlink()
    (site / "mlx_server").mkdir()
    for source in ["__init__.py", "_installation.py", "ops"]:
        (site / "mlx_server" / source).symlink_to(SOURCES / "mlx_server" / source)
    (site / "mlx_server/_ext.py").write_text(extension)
    result = run(site, "import mlx_server; mlx_server.selfcheck()")
    assert result.stderr.splitlines()[-1] == f"ImportError: {sentence}"


def test_the_real_installation_passes() -> None:
    code = (
        "import mlx_server, sys; print('mlx' in sys.modules); mlx_server.selfcheck(); print('mlx.core' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.stderr, result.stdout) == ("", "False\nTrue\n")
