"""How the next token is chosen, per request."""

import msgspec

MAX_TOP_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of `ops.sampling.sample`, in the order in which they apply. The defaults change nothing.

    The random stream is a pure function of `seed` and the token's position, so a request with a seed gives the same
    tokens alone and in any batch.
    """

    logit_bias: dict[int, float] = {}  # added to the logits of these token ids
    min_tokens: int = 0  # end tokens are forbidden before so many tokens
    repetition_penalty: float = 1.0  # > 0: divides positive and multiplies negative logits of prompt and output tokens
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the output
    presence_penalty: float = 0.0  # subtracted once if it is
    penalty_window: int = 0  # only the newest so many tokens count; 0: all
    dry_multiplier: float = 0.0  # >= 0; tokens that would make a repetition longer lose multiplier * base^excess
    dry_base: float = 1.75  # >= 1
    dry_allowed_length: int = 2  # excess: the repetition's length beyond this
    dry_window: int = 0  # only the newest so many tokens count; 0: all
    dry_sequence_breakers: tuple[int, ...] = ()  # token ids that repetitions do not span
    top_n_sigma: float = 0.0  # keep logits within n standard deviations of the largest; 0 keeps all
    temperature: float = 1.0  # >= 0; 0 is greedy, and none of the filters applies
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    typical_p: float = 1.0  # (0, 1]: keep the smallest set of tokens nearest to the entropy that reaches p
    top_p: float = 1.0  # (0, 1]: keep the smallest set of most likely tokens whose probability reaches p
    min_p: float = 0.0  # [0, 1]: keep tokens with at least min_p times the probability of the most likely one
    xtc_probability: float = 0.0  # [0, 1]: how often all but the least likely of the tokens above the threshold go
    xtc_threshold: float = 0.1  # [0, 1]
    seed: int = 0  # uint64
    logprobs: int | None = None  # log-probabilities of the token (0) and of the N likeliest, N <= MAX_TOP_LOGPROBS
    processed_logprobs: bool = False  # of what is drawn from, after all of the above; False: of the model's own logits
