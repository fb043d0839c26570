"""Embeddings of texts: submit them, wait for their vectors."""

import time
import uuid
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlx_server.chat.generation import failure, timeout
from mlx_server.engine_client import EngineClient
from mlx_server.wire import Embed, Embedded, Failed, Pooling

_MAX_SUBMITTED = 16  # of one request at once: the others of its texts leave the queue to other requests


class EmbeddingRun:
    """Running embeddings. Ask with `poll` until it is `finished`; `close` it in any case.

    Attributes:
        vectors: of each text, [hidden_size] float32 of length 1, once it is finished.
    """

    def __init__(
        self, engine: EngineClient, texts: Sequence[list[int]], *, pooling: Pooling, client: str, timeout_s: float
    ) -> None:
        """`texts` are token ids that fit the context."""
        self._deadline = time.monotonic() + timeout_s
        self._stream = engine.open_stream()
        self._messages = [Embed(uuid.uuid4().hex, text, pooling, client, timeout_s) for text in texts]
        self._index = {message.request_id: i for i, message in enumerate(self._messages)}
        self._num_submitted = 0
        self._num_done = 0
        self.vectors: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)

    @property
    def finished(self) -> bool:
        return self._num_done == len(self.vectors)

    def poll(self, timeout_s: float) -> None:
        """Wait for vectors, up to `timeout_s`. Errors are those of `Generation.poll`."""
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise timeout()
        self._submit()
        for output in self._stream.get(min(timeout_s, remaining_s)) or ():
            match output:
                case Embedded():
                    self.vectors[self._index[output.request_id]] = np.frombuffer(output.vector, np.float32)
                    self._num_done += 1
                case Failed():
                    raise failure(output)

    def close(self) -> None:
        """End what still runs."""
        self._stream.close()

    def _submit(self) -> None:
        while self._num_submitted < min(self._num_done + _MAX_SUBMITTED, len(self._messages)):
            self._stream.submit(self._messages[self._num_submitted])
            self._num_submitted += 1
