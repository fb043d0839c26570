"""What the draws of a step see of their requests: biases, and histories whose newest token may be in flight."""

import numpy as np
import pytest

from mlx_server.engine.sampling_state import Draw, SamplingArrays, SamplingState
from mlx_server.sampling_params import SamplingParams

PROMPT = [5, 6, 7]


def state(output: list[int], **params: object) -> SamplingState:
    return SamplingState(SamplingParams(**params), PROMPT, output, frozenset({2, 9}))


def histories(arrays: SamplingArrays, begin: str) -> list[list[int]]:
    rows = arrays.rows
    return [arrays.history[row[begin] : row["history_end"]].tolist() for row in rows]


def test_rows_without_features_bring_nothing() -> None:
    arrays = SamplingArrays.build([Draw(state([1], top_k=4, seed=2**64 - 1), 4, None)])
    assert [arrays.rows[name].item() for name in ("top_k", "seed", "position")] == [4, 2**64 - 1, 4]
    assert not arrays.history.size and not arrays.bias_ids.size and not arrays.breakers.size
    assert arrays.rows["num_logprobs"] == -1


@pytest.mark.parametrize(
    ("params", "begin", "expected"),
    [
        ({"repetition_penalty": 1.1}, "repetition_begin", [5, 6, 7, 1, 3]),
        ({"repetition_penalty": 1.1, "penalty_window": 3}, "repetition_begin", [7, 1, 3]),
        ({"frequency_penalty": 0.1}, "output_begin", [1, 3]),
        ({"presence_penalty": 0.1, "penalty_window": 1}, "output_begin", [3]),
        ({"presence_penalty": 0.1, "penalty_window": 4}, "output_begin", [1, 3]),
        ({"dry_multiplier": 0.1}, "dry_begin", [5, 6, 7, 1, 3]),
        ({"dry_multiplier": 0.1, "dry_window": 2}, "dry_begin", [1, 3]),
        ({"dry_multiplier": 0.1, "dry_window": 2, "repetition_penalty": 2.0}, "repetition_begin", [5, 6, 7, 1, 3]),
        ({"dry_multiplier": 0.1, "dry_window": 2, "repetition_penalty": 2.0}, "dry_begin", [1, 3]),
    ],
)
def test_history_of_each_penalty(params: dict[str, float], begin: str, expected: list[int]) -> None:
    draws = [Draw(state([1, 3], **params), 5, None), Draw(state([1, 3], **params), 5, None)]
    assert histories(SamplingArrays.build(draws), begin) == [expected, expected]


def test_token_in_flight_is_a_hole() -> None:
    other = Draw(state([8, 8], frequency_penalty=1.0), 5, None)
    waiting = Draw(state([1], frequency_penalty=1.0), 5, 3)  # of positions 3 and 4, the second is in flight
    arrays = SamplingArrays.build([other, waiting])
    assert arrays.history_holes.tolist() == [3] and arrays.hole_sources.tolist() == [3]
    arrays.history[arrays.history_holes] = 4
    assert histories(arrays, "output_begin") == [[8, 8], [1, 4]]


def test_known_tokens_follow_the_output() -> None:
    output: list[int] = []
    its_state = state(output)
    for token_id in range(100):
        assert its_state.known_tokens(0, 1000).tolist() == PROMPT + output
        output.append(token_id)
    assert its_state.known_tokens(2, 5).tolist() == [7, 0, 1]


def test_end_tokens_are_forbidden_before_min_tokens() -> None:
    its_state = state([], min_tokens=2, logit_bias={4: 1.5})
    assert [its_state.bias_at(position) for position in (3, 4, 5)] == [
        [(4, 1.5), (2, -np.inf), (9, -np.inf)],
        [(4, 1.5), (2, -np.inf), (9, -np.inf)],
        [(4, 1.5)],
    ]
