"""What sampling needs of the requests of a step, as the flat arrays of `ops.sampling`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlx_server.ops.sampling import ROW_DTYPE, make_rows
from mlx_server.sampling_params import SamplingParams

Ints = npt.NDArray[np.int32]

_PARAMS = [name for name in SamplingParams.__struct_fields__ if name in (ROW_DTYPE.names or ())]


class SamplingState:
    """What one request brings to each of its draws: its parameters, and the tokens that came before."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        end_token_ids: frozenset[int],
    ) -> None:
        """`output_token_ids` grows while the request runs."""
        self.params = params
        self.num_prompt_tokens = len(prompt_token_ids)
        num_logprobs = -1 if params.logprobs is None else params.logprobs
        fields = {name: getattr(params, name) for name in _PARAMS}
        self.row = make_rows(1, **fields, num_logprobs=num_logprobs).tobytes()
        self.bias = list(params.logit_bias.items())
        self.bias_before_min_tokens = [*self.bias, *((token_id, -np.inf) for token_id in sorted(end_token_ids))]
        self._prompt_token_ids = prompt_token_ids
        self._output_token_ids = output_token_ids
        self._tokens: Ints | None = None  # with room for more
        self._num_tokens = 0

    def bias_at(self, position: int) -> list[tuple[int, float]]:
        """(token id, value) pairs for the draw of the token at `position`."""
        num_output = position - self.num_prompt_tokens
        return self.bias_before_min_tokens if num_output < self.params.min_tokens else self.bias

    def history_ranges(self, position: int) -> dict[str, int]:
        """Where each penalty's part of the history begins for the draw of the token at `position`."""
        params = self.params
        newest_pos = max(position - params.penalty_window, 0) if params.penalty_window else 0
        begins = {}
        if params.repetition_penalty != 1:
            begins["repetition_begin"] = newest_pos
        if params.frequency_penalty or params.presence_penalty:
            begins["output_begin"] = max(newest_pos, self.num_prompt_tokens)
        if params.dry_multiplier:
            begins["dry_begin"] = max(position - params.dry_window, 0) if params.dry_window else 0
        return begins

    def known_tokens(self, start_pos: int, end_pos: int) -> Ints:
        """Token ids of positions [start_pos, end_pos), as far as they are known."""
        num_known = self.num_prompt_tokens + len(self._output_token_ids)
        if self._tokens is None or num_known > len(self._tokens):
            tokens = np.empty(2 * num_known, np.int32)
            tokens[: self.num_prompt_tokens] = self._prompt_token_ids
            self._tokens, self._num_tokens = tokens, self.num_prompt_tokens
        if self._num_tokens < num_known:
            new = self._output_token_ids[self._num_tokens - self.num_prompt_tokens :]
            self._tokens[self._num_tokens : num_known] = new
            self._num_tokens = num_known
        return self._tokens[start_pos : min(end_pos, num_known)]


class Draw(NamedTuple):
    """A token to be drawn, and one more after each draft as if the draft were the token before it."""

    state: SamplingState  # of its request
    position: int  # of the first token
    source: int | None  # if the token before it is in flight, that one's index in the step before
    draft_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """R draws as arrays."""

    rows: npt.NDArray[Any]  # [R] of ROW_DTYPE
    bias_ids: Ints  # [N]
    bias_values: npt.NDArray[np.float32]  # [N]
    breakers: Ints  # [S]
    history: Ints  # [H]; 0 where the token is still in flight
    history_holes: Ints  # [K] index in history of tokens in flight
    hole_sources: Ints  # [K] index of each in the tokens of the step before

    @property
    def has_logprobs(self) -> bool:
        return bool((self.rows["num_logprobs"] >= 0).any())

    @staticmethod
    def build(draws: Sequence[Draw]) -> "SamplingArrays":
        rows = np.frombuffer(
            bytearray(b"".join(draw.state.row * (1 + len(draw.draft_token_ids)) for draw in draws)), ROW_DTYPE
        )
        flat = _Flat()
        first = 0
        for draw in draws:
            stop = first + 1 + len(draw.draft_token_ids)
            flat.fill(rows[first:stop], draw)
            first = stop
        return SamplingArrays(
            rows=rows,
            bias_ids=np.array([token_id for token_id, _ in flat.bias], np.int32),
            bias_values=np.array([value for _, value in flat.bias], np.float32),
            breakers=np.array(flat.breakers, np.int32),
            history=np.concatenate(flat.history) if flat.history else np.zeros(0, np.int32),
            history_holes=np.array(flat.holes, np.int32),
            hole_sources=np.array(flat.sources, np.int32),
        )


class _Flat:
    """What the rows' ranges are of, one draw's after the other."""

    def __init__(self) -> None:
        self.bias: list[tuple[int, float]] = []
        self.breakers: list[int] = []
        self.history: list[Ints] = []
        self.history_size = 0
        self.holes: list[int] = []
        self.sources: list[int] = []

    def fill(self, rows: npt.NDArray[Any], draw: Draw) -> None:
        """The 1 + drafts rows of a draw. They share what they can."""
        state, begins = draw.state, draw.state.history_ranges(draw.position)
        offset = self._add_history(draw, min(begins.values())) if begins else 0
        breakers_begin = len(self.breakers)
        if state.params.dry_multiplier:
            self.breakers += state.params.dry_sequence_breakers
        bias: list[tuple[int, float]] | None = None
        for row, position in zip(rows, range(draw.position, draw.position + len(rows)), strict=True):
            row["position"] = position
            if state.bias_at(position) is not bias:
                bias = state.bias_at(position)
                bias_range = self._add_bias(bias)
            row["bias_begin"], row["bias_end"] = bias_range
            for name, begin in state.history_ranges(position).items():
                row[name] = begin + offset
                row["history_end"] = position + offset
            row["breakers_begin"], row["breakers_end"] = breakers_begin, len(self.breakers)

    def _add_bias(self, bias: list[tuple[int, float]]) -> tuple[int, int]:
        begin = len(self.bias)
        self.bias += bias
        return begin, len(self.bias)

    def _add_history(self, draw: Draw, start_pos: int) -> int:
        """The tokens from start_pos on that come before the draw's last; what to add to a position to get its index."""
        offset = self.history_size - start_pos
        end_pos = draw.position
        self.history.append(draw.state.known_tokens(start_pos, end_pos))
        if draw.source is not None and start_pos < end_pos:  # the newest is in flight
            self.history.append(np.zeros(1, np.int32))
            self.holes.append(end_pos - 1 + offset)
            self.sources.append(draw.source)
        self.history.append(np.array(draw.draft_token_ids, np.int32))
        self.history_size += max(end_pos - start_pos, 0) + len(draw.draft_token_ids)
        return offset
