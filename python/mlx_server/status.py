"""What the supervisor and its children say to each other while they start and end.

A child gets the write end of a pipe as `--status-fd` and writes one JSON object a line: any number of `Loading`, then
one of `Resolved`, `Ready`, `Failed`. It gets the read end of another pipe, the lifeline, as its standard input: end of
file there means that the supervisor is gone, however it died.
"""

import os
import shutil
import threading
import time
from pathlib import Path

import msgspec

from mlx_server.config import ResolvedModel

EXIT_OUT_OF_MEMORY = 3  # the engine's exit code when memory ran out where it could not go on


class Loading(msgspec.Struct, tag_field="event", tag="loading", frozen=True):
    """A step of the start that takes a while begins."""

    message: str  # such as "weights", for people


class Resolved(msgspec.Struct, tag_field="event", tag="resolved", frozen=True):
    """The model is on disk; the last message of the process that fetches it."""

    model: ResolvedModel


class Ready(msgspec.Struct, tag_field="event", tag="ready", frozen=True):
    """The engine takes requests. `lines` is what the start screen shows of the model: heading to text."""

    lines: dict[str, str] = {}


class Failed(msgspec.Struct, tag_field="event", tag="failed", frozen=True):
    """The model can't be found or loaded, and trying again would not help. `message` is one sentence for people."""

    message: str


Event = Loading | Resolved | Ready | Failed


def decode(line: bytes) -> Event:
    event: Event = msgspec.json.decode(line, type=Event)
    return event


class StatusPipe:
    """The child's end of the status pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)  # a grandchild that held it would hide this process's death

    def send(self, event: Event) -> None:
        """Write one event. Nothing happens when the supervisor is gone: the lifeline tells that."""
        line = msgspec.json.encode(event) + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except BrokenPipeError:
            pass


def end_with_supervisor(run_dir: Path | None = None, *, stdin_fd: int = 0) -> None:
    """Let this process end at once, without clean-up, when the supervisor is gone; `run_dir` is removed then."""

    def watch() -> None:
        while os.read(stdin_fd, 1):
            pass
        if run_dir is not None:
            _remove(run_dir)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _remove(folder: Path) -> None:
    """Again until it is gone: other threads and processes, which end too, may still write there, and that keeps it."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)
