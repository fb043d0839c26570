"""The supervisor's child processes."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from mlx_server import status

_log = logging.getLogger(__name__)

# What libraries read when a process starts; the user's own settings win.
_ENVIRONMENT = {
    "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",  # gunicorn forks, on macOS too
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages: a CPU reads all weights for each token, 10% faster so
}

# The system kills it, an exception in a thread of MLX's aborts it, MLX's allocator for CPUs gives a null pointer.
_OUT_OF_MEMORY = (status.EXIT_OUT_OF_MEMORY, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV)


class Child:
    """A process in a session of its own, so that a terminal's Ctrl-C reaches only the supervisor.

    Whatever it starts in turn belongs to the same process group and ends with it.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._events = asyncio.StreamReader()
        self._pipe: asyncio.ReadTransport | None = None
        self._is_killed = False  # by the supervisor

    async def read_events(self, fd: int) -> None:
        """Take `fd` as the read end of the child's status pipe."""
        protocol = asyncio.StreamReaderProtocol(self._events)
        pipe = os.fdopen(fd, "rb", buffering=0)
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    @property
    def may_have_run_out_of_memory(self) -> bool:
        """It said so at its end, or died as processes do then, and not because the supervisor killed it."""
        code = self._process.returncode
        return code in _OUT_OF_MEMORY and not (code == -signal.SIGKILL and self._is_killed)

    async def events(self) -> AsyncIterator[status.Event]:
        """What the child says of its state, until it ends."""
        while line := await self._events.readline():
            yield status.decode(line)

    async def wait(self) -> str:
        """Wait for the end of the process, end what it left behind, and say how it ended."""
        code = await self._process.wait()
        self._kill_group()
        if self._pipe is not None:
            self._pipe.close()
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{end} (perhaps memory ran out)" if self.may_have_run_out_of_memory else end

    async def stop(self, *, grace_s: float) -> None:
        """Ask the process to end, and end it after `grace_s` seconds."""
        if self.is_alive:
            self._process.terminate()
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except asyncio.TimeoutError:
            _log.warning("the %s process did not end within %.0f s and is killed", self.name, grace_s)
            await self.kill()

    def send_signal(self, signum: signal.Signals) -> None:
        if self.is_alive:
            self._process.send_signal(signum)

    async def kill(self) -> None:
        self.send_kill()
        await self.wait()

    def send_kill(self) -> None:
        """End the process and what it started at once, without waiting."""
        if self.is_alive:
            self._is_killed = True
            self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError if all are zombies
            os.killpg(self._process.pid, signal.SIGKILL)


class Children:
    """Starts children and knows those that may be alive.

    Their working directory is the run directory: `python -m` imports from there first, and the user's holds anything.
    Their standard input is the lifeline, see `status`; their output goes to the log.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._lifeline_fd, self._held_fd = (
            os.pipe()
        )  # the write end is never written to and held until this process dies
        self._children: list[Child] = []

    async def start(
        self, name: str, command: Sequence[str], *, pass_fds: Sequence[int] = (), stdout_fd: int = 2
    ) -> Child:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=self._lifeline_fd,
            stdout=stdout_fd,
            cwd=self._run_dir,
            env=_ENVIRONMENT | os.environ,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        _log.debug("%s process %d started", name, process.pid)
        child = Child(name, process)
        self._children = [other for other in self._children if other.is_alive] + [child]
        return child

    async def start_reporting(self, name: str, command: Sequence[str], *, stdout_fd: int = 2) -> Child:
        """Start `command` with `--status-fd N` added; `Child.events` gives what it writes there."""
        read_fd, write_fd = os.pipe()
        try:
            command = [*command, "--status-fd", str(write_fd)]
            child = await self.start(name, command, pass_fds=[write_fd], stdout_fd=stdout_fd)
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        await child.read_events(read_fd)
        return child

    def send_kill(self) -> None:
        for child in self._children:
            child.send_kill()

    async def kill(self) -> None:
        self.send_kill()
        for child in self._children:
            await child.wait()
