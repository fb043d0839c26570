"""How a download says how far it is; the command line decides what that looks like."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichBar

Advance = Callable[[int], None]  # bytes more than before; may be called from any thread


class Progress(Protocol):
    def task(self, description: str, total_bytes: int, done_bytes: int = 0) -> AbstractContextManager[Advance]:
        """A piece of work that can be seen while the context is open. `done_bytes` were there before it began."""


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Advance]:
        yield lambda num_bytes: None


class RichProgress:
    """A bar with bytes, rate and time left. Where the console is no terminal, a line at the start of each task."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Advance]:
        if not self._console.is_terminal:
            self._console.print(f"{description} ({(total_bytes - done_bytes) / 1e6:,.1f} MB)", highlight=False)
            yield lambda num_bytes: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with RichBar(*columns, TimeRemainingColumn(), console=self._console, transient=True) as bar:
            task = bar.add_task(description, total=total_bytes, completed=done_bytes)
            yield lambda num_bytes: bar.advance(task, num_bytes)
