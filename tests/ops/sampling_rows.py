"""Rows of sampling parameters as the op and its NumPy oracle want them."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_server.ops.sampling import Sampled, SampleTables, make_rows, sample, sample_fallback
from mlx_server.sampling_params import MAX_TOP_LOGPROBS
from reference.sampling import Params
from reference.sampling import sample as oracle

Op = Callable[..., Sampled]
OPS = pytest.mark.parametrize("op", [sample, sample_fallback], ids=["op", "fallback"])
LISTED = ("bias", "allowed", "history", "num_output", "penalty_window", "dry_window", "breakers")  # not in ROW_DTYPE


class Shared:
    """A flat array in which rows with equal parts share them."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._ranges: dict[tuple[Any, ...], tuple[int, int]] = {}

    def add(self, part: tuple[Any, ...]) -> tuple[int, int]:
        if part not in self._ranges:
            self._ranges[part] = (len(self.items), len(self.items) + len(part))
            self.items += part
        return self._ranges[part]


def pack(params: Sequence[Params], vocab_size: int) -> tuple[NDArray[Any], SampleTables]:
    """Rows and tables as the op wants them."""
    columns = {f.name: [getattr(row, f.name) for row in params] for f in fields(Params) if f.name not in LISTED}
    rows = make_rows(len(params), **columns)
    masks: list[NDArray[np.uint32]] = []
    history, breakers, bias = Shared(), Shared(), Shared()
    for row, p in zip(rows, params, strict=True):
        row["bias_begin"], row["bias_end"] = bias.add(tuple(p.bias.items()))
        row["breakers_begin"], row["breakers_end"] = breakers.add(p.breakers)
        _, end = history.add(p.history)
        row["history_end"] = end
        row["repetition_begin"] = end - len(p.newest(p.penalty_window))
        row["output_begin"] = end - len(p.output())
        row["dry_begin"] = end - len(p.newest(p.dry_window))
        if p.allowed is not None:
            row["mask_row"] = len(masks)
            bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
            bits[list(p.allowed)] = 1
            masks.append(np.packbits(bits, bitorder="little").view(np.uint32))
    tables = SampleTables(
        masks=mx.array(np.stack(masks)) if masks else None,
        bias_ids=mx.array(np.array([token for token, _ in bias.items], np.int32)),
        bias_values=mx.array(np.array([value for _, value in bias.items], np.float32)),
        history=mx.array(np.array(history.items, np.int32)),
        breakers=mx.array(np.array(breakers.items, np.int32)),
    )
    return rows, tables


def run(op: Op, logits: NDArray[np.float32], params: Sequence[Params]) -> Sampled:
    sampled = op(mx.array(logits), *pack(params, logits.shape[1]))
    assert sampled.token_ids.shape == sampled.logprobs.shape == (len(params),)
    assert sampled.top_ids.shape == sampled.top_logprobs.shape == (len(params), MAX_TOP_LOGPROBS)
    assert sampled.token_ids.dtype == sampled.top_ids.dtype == mx.uint32
    assert sampled.logprobs.dtype == sampled.top_logprobs.dtype == mx.float32
    return sampled


def draw(op: Op, logits: NDArray[np.float32], params: Sequence[Params]) -> NDArray[np.uint32]:
    return np.array(run(op, logits, params).token_ids)


def draw_many(op: Op, logits: Sequence[float], params: Params, count: int) -> NDArray[np.uint32]:
    """`count` draws from the same distribution, at consecutive positions."""
    rows = [params.but(position=position) for position in range(count)]
    return draw(op, np.tile(np.array(logits, np.float32), (count, 1)), rows)


def assert_as_oracle(op: Op, logits: NDArray[np.float32], params: Sequence[Params]) -> None:
    """Equal tokens and log-probabilities, except where the draw or a filter is so near to another result that rounding
    decides."""
    sampled = run(op, logits, params)
    tokens, logprobs = np.array(sampled.token_ids), np.array(sampled.logprobs)
    top_ids, top_logprobs = np.array(sampled.top_ids), np.array(sampled.top_logprobs)
    for i, row in enumerate(params):
        expected = oracle(logits[i], row)
        if expected.margin < 2e-6:
            continue
        assert tokens[i] == expected.token, (row, expected)
        assert logprobs[i] == pytest.approx(expected.logprob, rel=1e-5, abs=1e-4), (row, expected)
        ids, values = zip(*expected.top, strict=True) if expected.top else ((), ())
        assert top_logprobs[i, : len(values)] == pytest.approx(values, rel=1e-5, abs=1e-4), (row, expected)
        assert (top_logprobs[i, len(values) :] == -np.inf).all()
        assert tuple(top_ids[i, : len(ids)]) == ids and not top_ids[i, len(ids) :].any()
