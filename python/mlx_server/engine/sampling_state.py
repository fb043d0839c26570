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
    """One token to be drawn."""

    state: SamplingState  # of its request
    position: int  # of the token
    source: int | None  # if the token before it is in flight, that one's index in the step before


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
        rows = np.frombuffer(bytearray(b"".join(draw.state.row for draw in draws)), ROW_DTYPE)
        rows["position"] = [draw.position for draw in draws]
        flat = _Flat()
        for i, (state, position, source) in enumerate(draws):
            if bias := state.bias_at(position):
                rows["bias_begin"][i], rows["bias_end"][i] = flat.add_bias(bias)
            if begins := state.history_ranges(position):
                offset = flat.add_history(state, min(begins.values()), position, source)
                for name, begin in begins.items():
                    rows[name][i] = begin + offset
                rows["history_end"][i] = position + offset
            if state.params.dry_sequence_breakers and state.params.dry_multiplier:
                rows["breakers_begin"][i] = len(flat.breakers)
                flat.breakers += state.params.dry_sequence_breakers
                rows["breakers_end"][i] = len(flat.breakers)
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
    """The ranges of all rows, one after the other."""

    def __init__(self) -> None:
        self.bias: list[tuple[int, float]] = []
        self.breakers: list[int] = []
        self.history: list[Ints] = []
        self.history_size = 0
        self.holes: list[int] = []
        self.sources: list[int] = []

    def add_bias(self, bias: list[tuple[int, float]]) -> tuple[int, int]:
        begin = len(self.bias)
        self.bias += bias
        return begin, len(self.bias)

    def add_history(self, state: SamplingState, start_pos: int, end_pos: int, source: int | None) -> int:
        """The tokens at [start_pos, end_pos); what to add to a position to get its index."""
        offset = self.history_size - start_pos
        tokens = state.known_tokens(start_pos, end_pos)
        self.history.append(tokens)
        if source is not None and start_pos < end_pos:  # the newest is in flight
            self.history.append(np.zeros(1, np.int32))
            self.holes.append(end_pos - 1 + offset)
            self.sources.append(source)
        self.history_size += max(end_pos - start_pos, 0)
        return offset
