"""Choosing the next token of each row."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_server import _ext

INVALID_TOKEN = 0xFFFFFFFF  # of a row whose logits hold NaN or +infinity, or nothing finite

# A row's parameters, as csrc/sampling/sample_row.h has them. Ranges are of the flat arrays, half open.
ROW_DTYPE = np.dtype(
    [
        ("seed", "<u8"),
        ("position", "<u4"),  # of the drawn token in its request
        ("given_token", "<i4"),  # a token that is not drawn, only scored; -1: draw
        ("num_logprobs", "<i4"),  # -1: none; 0: of the token; N: of the N likeliest as well
        ("processed_logprobs", "<i4"),  # 0: of the logits as they came; 1: of what is drawn from
        ("mask_row", "<i4"),  # of masks; -1: all tokens are allowed
        ("bias_begin", "<i4"),
        ("bias_end", "<i4"),
        ("repetition_begin", "<i4"),  # repetition_penalty: history from here to history_end
        ("output_begin", "<i4"),  # frequency_penalty, presence_penalty
        ("dry_begin", "<i4"),  # dry_multiplier
        ("history_end", "<i4"),
        ("breakers_begin", "<i4"),
        ("breakers_end", "<i4"),
        ("repetition_penalty", "<f4"),  # 1: none; > 0
        ("frequency_penalty", "<f4"),
        ("presence_penalty", "<f4"),
        ("dry_multiplier", "<f4"),  # 0: none
        ("dry_base", "<f4"),
        ("dry_allowed_length", "<i4"),
        ("top_n_sigma", "<f4"),  # 0 keeps all
        ("temperature", "<f4"),  # 0 is greedy: the largest logit, the lowest id among equals
        ("top_k", "<i4"),  # 0 keeps all
        ("typical_p", "<f4"),  # 1 keeps all
        ("top_p", "<f4"),  # 1 keeps all
        ("min_p", "<f4"),  # 0 keeps all
        ("xtc_probability", "<f4"),  # 0: never
        ("xtc_threshold", "<f4"),
    ]
)

_NEUTRAL = {
    "given_token": -1,
    "num_logprobs": -1,
    "mask_row": -1,
    "repetition_penalty": 1,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "temperature": 1,
    "typical_p": 1,
    "top_p": 1,
    "xtc_threshold": 0.1,
}


class Sampled(NamedTuple):
    """What `sample` gives for B rows."""

    token_ids: mx.array  # [B] uint32; INVALID_TOKEN for a row with NaN or +infinity, or without a finite logit
    logprobs: mx.array  # [B] float32 of the token; 0 where it was not asked for
    top_ids: mx.array  # [B, MAX_TOP_LOGPROBS] uint32, the likeliest first
    top_logprobs: mx.array  # [B, MAX_TOP_LOGPROBS] float32; -infinity where fewer were asked for, or are left


def make_rows(num_rows: int, **fields: npt.ArrayLike) -> npt.NDArray[Any]:
    """[num_rows] of ROW_DTYPE: neutral, but for the `fields`, each a value or [num_rows]."""
    rows = np.zeros(num_rows, ROW_DTYPE)
    for name, value in (_NEUTRAL | fields).items():
        rows[name] = value
    return rows


@dataclass(frozen=True, slots=True)
class SampleTables:
    """Flat arrays of which rows have ranges. None: empty."""

    masks: mx.array | None = None  # [M, ceil(V / 32)] uint32: token t is allowed if bit t % 32 of word t // 32 is set
    bias_ids: mx.array | None = None  # [N] int32
    bias_values: mx.array | None = None  # [N] float32: added to the row's logits; -infinity forbids a token
    history: mx.array | None = None  # [H] int32: tokens of prompts and outputs
    breakers: mx.array | None = None  # [S] int32: tokens that DRY's repetitions do not span


def sample(logits: mx.array, rows: npt.NDArray[Any], tables: SampleTables | None = None) -> Sampled:
    """Choose one token for each row. It depends on nothing but the row's own logits, parameters and ranges.

    In this order: logit bias, allowed-token mask, repetition, frequency and presence penalties, DRY; then greedy rows
    take the largest logit, all others go on: top-n-sigma, temperature, softmax, top-k, typical-p, top-p, min-p, XTC,
    one draw. Each filter sees the distribution that the one before has left, renormalised; csrc/sampling/sampling.h
    defines each. They order tokens by likelihood, lower ids first among equals.

    The draw inverts the cumulative distribution, in the order of ids, at one uniform number: Philox4x32-10 (Salmon et
    al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a pure function of seed (its key) and position (its
    counter).

    Args:
        logits: [B, V] floating point; -infinity is never drawn.
        rows: [B] of ROW_DTYPE.
        tables: what the rows' ranges are of. Ids outside the vocabulary are skipped.
    Raises:
        ValueError: shapes or dtypes don't fit. Values of the parameters are not checked.
    """
    return Sampled(*_ext.sample(*_arguments(logits, rows), **_table_arguments(tables or SampleTables(), logits)))


def sample_fallback(logits: mx.array, rows: npt.NDArray[Any], tables: SampleTables | None = None) -> Sampled:
    """The specification of `sample` in MLX's own ops. Slow: for tests."""
    return Sampled(
        *_ext.sample_fallback(*_arguments(logits, rows), **_table_arguments(tables or SampleTables(), logits))
    )


def _arguments(logits: mx.array, rows: npt.NDArray[Any]) -> tuple[mx.array, mx.array]:
    return logits, mx.array(rows.view(np.uint32).reshape(len(rows), ROW_DTYPE.itemsize // 4))


def _table_arguments(tables: SampleTables, logits: mx.array) -> dict[str, mx.array]:
    num_words = -(-logits.shape[-1] // 32)
    return {
        "masks": _or_empty(tables.masks, (0, num_words), np.uint32),
        "bias_ids": _or_empty(tables.bias_ids, (0,), np.int32),
        "bias_values": _or_empty(tables.bias_values, (0,), np.float32),
        "history": _or_empty(tables.history, (0,), np.int32),
        "breakers": _or_empty(tables.breakers, (0,), np.int32),
    }


def _or_empty(array: mx.array | None, shape: tuple[int, ...], dtype: npt.DTypeLike) -> mx.array:
    return mx.array(np.zeros(shape, dtype)) if array is None else array
