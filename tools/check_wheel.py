"""Checks a built wheel: small, one stable-ABI extension, libmlx found beside it and never bundled, no absolute rpath.

python tools/check_wheel.py dist/*.whl
"""

import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import lief

MAX_WHEEL_BYTES = 2 << 20
NATIVE_SUFFIXES = {".so", ".dylib", ".a", ".metallib"}
# From mlx_server/_ext.abi3.so to libmlx of the mlx package in the same site-packages.
RPATHS = {lief.ELF.Binary: "$ORIGIN/../mlx/lib", lief.MachO.Binary: "@loader_path/../mlx/lib"}


def parse(path: Path) -> lief.ELF.Binary | lief.MachO.Binary:
    """The ELF or (one-architecture) Mach-O file."""
    universal = lief.MachO.parse(path) if lief.is_macho(path) else None
    binary = universal.at(0) if universal else lief.ELF.parse(path)
    if binary is None:
        raise SystemExit(f"{path} is neither ELF nor Mach-O")
    return binary


def search_paths(binary: lief.ELF.Binary | lief.MachO.Binary) -> list[str]:
    """Where the loader looks for the libraries that the file needs."""
    if isinstance(binary, lief.MachO.Binary):
        return [str(command.path) for command in binary.rpaths]
    entries = [
        e for e in binary.dynamic_entries if isinstance(e, lief.ELF.DynamicEntryRunPath | lief.ELF.DynamicEntryRpath)
    ]
    return [path for entry in entries for path in entry.paths]


def libraries(binary: lief.ELF.Binary | lief.MachO.Binary) -> list[str]:
    """The libraries that the file needs, as it names them."""
    if isinstance(binary, lief.MachO.Binary):
        own_name = lief.MachO.LoadCommand.TYPE.ID_DYLIB
        return [str(library.name) for library in binary.libraries if library.command != own_name]
    return [str(name) for name in binary.libraries]


def extension_faults(path: Path) -> list[str]:
    """What keeps the extension from finding libmlx on another machine."""
    binary = parse(path)
    faults = []
    expected = [RPATHS[type(binary)]]
    if (paths := search_paths(binary)) != expected:
        faults.append(f"the extension's rpaths are {paths}, not {expected}")
    system = ("/usr/lib/", "/System/Library/")
    faults += [
        f"the extension needs a library by its absolute path: {name}"
        for name in libraries(binary)
        if name.startswith("/") and not name.startswith(system)
    ]
    if not any(Path(name).name in {"libmlx.so", "libmlx.dylib"} for name in libraries(binary)):
        faults.append("the extension does not link with libmlx")
    return faults


def wheel_faults(wheel: Path) -> list[str]:
    """Everything that is wrong with a wheel, one sentence each."""
    faults = []
    if (size := wheel.stat().st_size) >= MAX_WHEEL_BYTES:
        faults.append(f"the wheel has {size} bytes, not less than {MAX_WHEEL_BYTES}")
    if "-cp310-abi3-" not in wheel.name:
        faults.append("the wheel is not tagged cp310-abi3")
    with ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        native = [name for name in archive.namelist() if NATIVE_SUFFIXES & set(Path(name).suffixes)]
        if native != ["mlx_server/_ext.abi3.so"]:
            return [*faults, f"the wheel's native files are {native}, not the extension alone"]
        return faults + extension_faults(Path(archive.extract(native[0], folder)))


def main() -> int:
    lief.logging.disable()
    faults = [f"{wheel}: {fault}" for wheel in sys.argv[1:] for fault in wheel_faults(Path(wheel))]
    print(*(faults or [f"{len(sys.argv) - 1} wheel checked: no fault"]), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
