"""Choosing the next token of each row."""

import mlx.core as mx

from mlx_server import _ext

INVALID_TOKEN = 0xFFFFFFFF  # of a row whose logits hold NaN or +infinity, or nothing finite


def sample(
    logits: mx.array,
    *,
    temperature: mx.array,
    top_k: mx.array,
    top_p: mx.array,
    min_p: mx.array,
    seed: mx.array,
    position: mx.array,
) -> mx.array:
    """Draw one token for each row. A row's token depends on nothing but its own logits and parameters.

    In this order: temperature, softmax, top-k, top-p, min-p, one draw. Each filter sees the distribution that the one
    before has left, renormalised. They keep the likeliest tokens, lower ids first among equals: top-k so many, top-p as
    few as reach the share p, min-p all that are at least p times as likely as the likeliest. The draw inverts the
    cumulative distribution, in the order of ids, at one uniform number: Philox4x32-10 (Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"), a pure function of seed (its key) and position (its counter).

    Args:
        logits: [B, V] floating point; -infinity is never drawn.
        temperature: [B] float32; 0 is greedy: the largest logit, the lowest id among equals.
        top_k: [B] int32; 0 keeps all.
        top_p: [B] float32; 1 keeps all. At least one token is kept.
        min_p: [B] float32; 0 keeps all.
        seed: [B] uint64.
        position: [B] uint32, of the drawn token in its request.
    Returns:
        [B] uint32 token ids; INVALID_TOKEN for a row with NaN or +infinity, or without a finite logit.
    Raises:
        ValueError: shapes or dtypes don't fit. Values of the parameters are not checked.
    """
    return _ext.sample(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, position=position
    )
