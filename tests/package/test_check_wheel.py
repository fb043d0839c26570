"""tools/check_wheel.py passes what we build and names what others got wrong: rpaths, a bundled libmlx, weight, tag."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import lief
import mlx.core  # noqa: F401 - brings libmlx for the extension
import pytest

from mlx_server import _ext

CHECK = Path(__file__).parents[2] / "tools/check_wheel.py"
EXTENSION = Path(str(_ext.__file__))
TAG = "cp310-abi3-linux_x86_64"


def make_wheel(
    folder: Path, others: dict[str, bytes] | None = None, *, tag: str = TAG, extension: Path = EXTENSION
) -> Path:
    wheel = folder / f"mlx_server-1.0-{tag}.whl"
    with ZipFile(wheel, "w") as archive:
        archive.write(extension, "mlx_server/_ext.abi3.so")
        for name, content in (others or {}).items():
            archive.writestr(name, content)
    return wheel


def check(wheel: Path) -> tuple[int, str]:
    result = subprocess.run([sys.executable, CHECK, wheel], capture_output=True, text=True, check=False, timeout=60)
    return result.returncode, result.stdout.removeprefix(f"{wheel}: ").strip()


def test_our_own_passes(tmp_path: Path) -> None:
    assert check(make_wheel(tmp_path)) == (0, "1 wheel checked: no fault")


def test_absolute_rpath(tmp_path: Path) -> None:
    binary = lief.parse(EXTENSION)
    changed = tmp_path / "changed.so"
    if isinstance(binary, lief.ELF.Binary):
        binary.add(lief.ELF.DynamicEntryRunPath("/opt/venv/lib"))
    else:
        assert isinstance(binary, lief.MachO.Binary)
        command = lief.MachO.RPathCommand.create("/opt/venv/lib")
        assert command is not None
        binary.add(command)
    binary.write(str(changed))
    code, fault = check(make_wheel(tmp_path, extension=changed))
    assert code == 1
    assert "/opt/venv/lib" in fault


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"mlx_server/lib/libmlx.so": b""},
            "native files are ['mlx_server/_ext.abi3.so', 'mlx_server/lib/libmlx.so'], not the extension alone",
        ),
        ({"mlx_server/big.py": os.urandom(2 << 20)}, "bytes, not less than 2097152"),
    ],
    ids=["bundled libmlx", "too big"],
)
def test_foreign_files(tmp_path: Path, change: dict[str, bytes], fault: str) -> None:
    code, output = check(make_wheel(tmp_path, change))
    assert code == 1
    assert fault in output


def test_tag_of_one_python(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, tag="cp311-cp311-linux_x86_64")
    assert check(wheel) == (1, "the wheel is not tagged cp310-abi3")
