"""Requests a minute and client, counted right across the API's worker processes."""

import fcntl
import hashlib
import mmap
import os
import struct
import threading
import time
from pathlib import Path

_PERIOD_S = 60.0
_NUM_SLOTS = 1 << 16
_SLOT = struct.Struct("d")  # the time, on the monotonic clock, at which the client has used up nothing


class RateLimiter:
    """GCRA, a leaky bucket that needs one number a client: up to `limit` requests at once, then `limit` a minute.

    The numbers live in a file that all worker processes map; a client's slot is a hash of its address. One pair of
    clients in 65,536 shares a slot and is limited together. The clock is the machine's monotonic one, which all its
    processes share until it boots again.
    """

    def __init__(self, path: Path, limit: int) -> None:
        """Open or create the file. `limit` >= 1."""
        self._interval_s = _PERIOD_S / limit
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._file, _NUM_SLOTS * _SLOT.size)
        self._slots = mmap.mmap(self._file, _NUM_SLOTS * _SLOT.size)
        self._lock = threading.Lock()  # fcntl's locks keep processes apart, not threads

    def admit(self, client: str) -> float:
        """Count a request of this client. 0.0: it is admitted; else the seconds until one would be."""
        digest = hashlib.blake2b(client.encode(), digest_size=8).digest()
        offset = int.from_bytes(digest, "little") % _NUM_SLOTS * _SLOT.size
        with self._lock:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                now = time.monotonic()
                (empty_at,) = _SLOT.unpack_from(self._slots, offset)
                filled_until = max(empty_at, now) + self._interval_s
                wait_s: float = filled_until - now - _PERIOD_S
                if wait_s > 1e-9:  # the sum of `limit` intervals is a minute but for rounding
                    return wait_s
                _SLOT.pack_into(self._slots, offset, filled_until)
                return 0.0
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self._slots.close()
        os.close(self._file)
