"""How the next token is chosen, per request."""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True):
    """Parameters of `ops.sampling.sample`, in the order in which they apply.

    The random stream is a pure function of `seed` and the token's position, so a request with a seed gives the same
    tokens alone and in any batch.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # (0, 1]: keep the smallest set of most likely tokens whose probability reaches p
    min_p: float = 0.0  # [0, 1]: keep tokens with at least min_p times the probability of the most likely one
    seed: int = 0  # uint64
    min_tokens: int = 0  # end tokens are forbidden before so many tokens
    logprobs: int | None = None  # log-probabilities of the token (0) and of the N likeliest
