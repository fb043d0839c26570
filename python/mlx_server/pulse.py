"""A sign of life of the engine's loop, for the processes that must know when it stands still."""

import struct
import time
from pathlib import Path

_LAYOUT = struct.Struct(
    "=dd"
)  # when it was written, on the machine's monotonic clock; the slowest step so far; seconds
_INTERVAL_S = 0.5


class Pulse:
    """A small file in the run directory. The engine writes it in each turn of its loop, at work or idle."""

    IDLE_S = 1.0  # an idle loop turns at least so often

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "engine.pulse"
        self._written_s = 0.0

    def beat(self, slowest_step_s: float) -> None:
        """The loop goes on."""
        now_s = time.monotonic()
        if now_s - self._written_s >= _INTERVAL_S:
            self._written_s = now_s
            self._path.write_bytes(_LAYOUT.pack(now_s, slowest_step_s))

    def is_late(self, limit_s: float, num_steps: float) -> bool:
        """Whether the loop has stood still for `limit_s`, and for the time of so many of its slowest steps: what is
        slow is not dead. False before the first beat, and if the file can't be read: no file may be left to open."""
        try:
            beat_s, slowest_step_s = _LAYOUT.unpack(self._path.read_bytes())
        except (OSError, struct.error):
            return False
        return bool(time.monotonic() - beat_s > max(limit_s, num_steps * slowest_step_s))
