"""Logging of all processes: one line an entry, on standard error.

Entries hold ids, counts and times, never a prompt, an answer or a key. A traceback follows an entry only for a fault of
ours, or at level debug.
"""

import logging
import sys
from typing import Literal

from mlx_server.config import LogLevel
from mlx_server.errors import ServerError

Role = Literal["server", "engine", "api"]


class _Formatter(logging.Formatter):
    def __init__(self, role: Role, *, show_all_tracebacks: bool) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s {role}: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self._show_all_tracebacks = show_all_tracebacks

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name in the base class
        # A line break in a value that came from outside must not look like an entry of its own.
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        expected = record.exc_info is not None and isinstance(record.exc_info[1], ServerError)
        if expected and not self._show_all_tracebacks:
            record = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        return super().format(record)


def configure(level: LogLevel, role: Role) -> None:
    """Send this process's log to standard error. Of libraries only warnings: below are URLs and headers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(role, show_all_tracebacks=level == "debug"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING if level in ("debug", "info") else level.upper())
    logging.getLogger("mlx_server").setLevel(level.upper())
    logging.captureWarnings(True)
