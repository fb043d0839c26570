"""Answers of /v1/responses that later requests may refer to, shared by the API's worker processes."""

import contextlib
import logging
import os
import re
from pathlib import Path

import msgspec
from msgspec import Struct

from mlx_server.api.openai.responses_types import InputItem

log = logging.getLogger(__name__)

_MAX_RESPONSES = 1000
_MAX_BYTES = 64 << 20
_ID = re.compile(r"resp_[0-9a-f]{32}")


class StoredResponse(Struct):
    """An answer with the whole conversation that led to it, so that it needs no other one."""

    response: msgspec.Raw  # as it was sent
    items: list[InputItem]  # of the conversation, its own output last


class ResponseStore:
    """A private folder with a file for each answer; those that were not used for longest go first.

    A file appears whole or not at all, and is gone at once, so that processes need no lock. The limits may be passed by
    what others write at the same moment, until the next answer is kept.
    """

    def __init__(self, folder: Path, *, max_responses: int = _MAX_RESPONSES, max_bytes: int = _MAX_BYTES) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._decoder = msgspec.json.Decoder(StoredResponse)

    def put(self, response_id: str, stored: StoredResponse) -> None:
        """Keep an answer. A disk that is full costs a line in the log, not the answer."""
        path = self._folder / response_id
        unfinished = path.with_suffix(".new")
        try:
            file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(file, "wb") as writer:
                writer.write(msgspec.json.encode(stored))
            unfinished.rename(path)
            self._evict()
        except OSError as error:
            log.warning("a response could not be kept: %s", error.strerror)
            unfinished.unlink(missing_ok=True)

    def get(self, response_id: str) -> StoredResponse | None:
        """The answer, if it is still there; it then counts as just used."""
        if not _ID.fullmatch(response_id):
            return None
        path = self._folder / response_id
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return self._decoder.decode(stored)

    def delete(self, response_id: str) -> bool:
        """Whether it was there."""
        if not _ID.fullmatch(response_id):
            return False
        try:
            (self._folder / response_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def _evict(self) -> None:
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        num_left, num_bytes = len(files), sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if num_left <= self._max_responses and num_bytes <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            num_left, num_bytes = num_left - 1, num_bytes - size
