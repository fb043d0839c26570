"""An embedding, gathered from the steps that compute a prompt's parts."""

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlx_server.wire import Pooling

Vector = npt.NDArray[np.float32]  # [hidden_size]


@dataclass(slots=True)
class PooledStates:
    """The hidden states of a prompt's first tokens, pooled as far as they are computed."""

    pooling: Pooling
    num_tokens: int = 0
    _sum: Vector = field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, start_pos: int, end_pos: int, pooled: Vector) -> None:
        """What one step gives of positions [start_pos, end_pos): see `pooled_range`.

        A request that was preempted, or whose step failed, begins anew: with position 0.
        """
        if start_pos == 0:
            self._sum, self.num_tokens = pooled, end_pos
        elif start_pos == self.num_tokens:
            self._sum = pooled if self.pooling == "last" else self._sum + pooled
            self.num_tokens = end_pos

    def vector(self) -> Vector | None:
        """The pooled states, of length 1; None if they have no direction."""
        length = float(np.linalg.norm(self._sum))
        return self._sum / np.float32(length) if 0 < length < math.inf else None


def pooled_range(pooling: Pooling, start_pos: int, end_pos: int) -> tuple[int, int]:
    """Whose hidden states' sum a step gives, of the positions [start_pos, end_pos) that it computes; maybe nobody's."""
    match pooling:
        case "last":
            return end_pos - 1, end_pos
        case "cls":
            return start_pos, min(start_pos + 1, end_pos) if start_pos == 0 else start_pos
        case "mean":
            return start_pos, end_pos
