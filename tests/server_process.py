"""A server under test, as a process of its own."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil

T = TypeVar("T")


def until(condition: Callable[[], T | None], what: str, deadline_s: float = 20.0) -> T:
    """Poll until `condition` gives something true; what it gives."""
    end_s = time.monotonic() + deadline_s
    while time.monotonic() < end_s:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline_s} s: {what}")


class ServerProcess:
    """Starts `command` with the given arguments; on exit nothing of it is left.

    Its settings come from `args` alone, its temporary directory is its own.
    """

    def __init__(self, command: Sequence[str], args: Sequence[str], env: dict[str, str] | None = None) -> None:
        # Not pytest's tmp_path: a unix socket's path has about 100 bytes.
        self.tmp_dir = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MLX_SERVER_")}
        self._out_path, self._err_path = self.tmp_dir / "stdout", self.tmp_dir / "stderr"
        self._seen: dict[int, psutil.Process] = {}
        self.environment = clean | {"TMPDIR": str(self.tmp_dir), "PYTHONUNBUFFERED": "1"} | (env or {})
        with self._out_path.open("wb") as out, self._err_path.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, *args],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env=self.environment,
            )

    def __enter__(self) -> "ServerProcess":  # noqa: PYI034 - Self is Python 3.11's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(f"--- stdout\n{self.out}--- stderr\n{self.err}")
        if self.process.poll() is None:
            self.processes()
            self.process.kill()
            self.process.wait()
        for process in self._seen.values():
            if process.is_running():
                process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        shutil.rmtree(self.tmp_dir, ignore_errors=True)

    @property
    def out(self) -> str:
        return self._out_path.read_text()

    @property
    def err(self) -> str:
        return self._err_path.read_text()

    @property
    def run_dirs(self) -> list[Path]:
        return list(self.tmp_dir.glob("mlx-server-*"))

    def url(self, deadline_s: float = 60.0) -> str:
        """Where the server is, once it says that it is ready."""

        def find() -> str | None:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.out}\n{self.err}")
            found = re.search(r"Ready *(?:\x1b\[0m)? (http://\S+)\s", self.out)
            return found and found[1]

        return until(find, "the Ready line", deadline_s)

    def processes(self, word: str = "", *, recursive: bool = True) -> list[psutil.Process]:
        """Those of the server's children, grandchildren … that are alive and have `word` in their command line."""
        children = psutil.Process(self.process.pid).children(recursive)
        found = [child for child in children if _is_alive(child) and (not word or word in _command(child))]
        self._seen |= {process.pid: process for process in found}
        return found

    def child(self, word: str, other_than: psutil.Process | None = None, deadline_s: float = 20.0) -> psutil.Process:
        """The child whose command line has `word`: the first one, without its own children."""

        def find() -> psutil.Process | None:
            return next((p for p in self.processes(word, recursive=False) if p != other_than), None)

        return until(find, f"a child process {word}", deadline_s)

    def usage(self) -> dict[int, tuple[float, int, int]]:
        """Of each process: resident MiB, open files, threads."""
        processes = [psutil.Process(self.process.pid), *self.processes()]
        return {p.pid: (round(p.memory_info().rss / 2**20, 1), p.num_fds(), p.num_threads()) for p in processes}

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def type(self, keys: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def wait(self, deadline_s: float = 20.0) -> int:
        return self.process.wait(deadline_s)

    def assert_nothing_left(self) -> None:
        """All processes that were seen are gone, and the run directory too."""
        for process in self._seen.values():
            until(lambda p=process: not _is_alive(p), f"the end of {process}")  # type: ignore[misc]
        until(lambda: not self.run_dirs, "the removal of the run directory")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
