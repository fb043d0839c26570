"""How many prompt tokens may share a step with decodes, so that a long prompt does not make other streams stutter."""

from mlx_server.engine.batch import Batch

SLOWDOWN = 2.0  # a step with a part of a prompt may take so many times what its decodes alone take
MIN_TOKENS = 2  # prompts go on, however slow the device: a token far behind in a long prompt costs many decodes
GRANULE = 16  # of more tokens than that: whole blocks, and few different shapes; and the first guess
WEIGHT = 0.25  # of the newest observation
# So many steps beside decodes in a row are without prompts, of each so many, so that the time of decodes stays known.
FREE_STEPS, PERIOD = 2, 32


class PrefillPacer:
    """A model of a step's time: decodes take what such steps took lately, each prompt token adds a constant.

    Pure arithmetic on what it is told.
    """

    def __init__(self) -> None:
        self._decode_s: dict[int, float] = {}  # by the bits in the number of decodes
        self._prefill_token_s: float | None = None
        self._num_steps = 0

    def observe(self, previous: Batch, launched: Batch, duration_s: float) -> None:
        """Between the ends of two steps went `duration_s`.

        A GPU computes `previous` in that time; on the CPU, MLX lets a launch wait until most of `launched` is computed.
        So only pairs that are alike tell something.
        """
        num_decodes = launched.num_decodes
        prefills = [batch.num_prefill_tokens for batch in (previous, launched)]
        if not any(prefills) and num_decodes:
            key = num_decodes.bit_length()
            self._decode_s[key] = blend(self._decode_s.get(key), duration_s)
        elif all(prefills):
            num_prefill_tokens = sum(prefills) / 2
            decode_s = (self._expected_decode_s(num_decodes) or 0.0) if num_decodes else 0.0
            per_token_s = max(duration_s - decode_s, 0.1 * duration_s) / num_prefill_tokens
            self._prefill_token_s = blend(self._prefill_token_s, per_token_s)

    def max_prefill_tokens(self, num_decodes: int) -> int:
        """How many prompt tokens may go into the next step, beside `num_decodes` (at least one) decodes."""
        is_free = self._num_steps % PERIOD < FREE_STEPS  # the first ones too: what decodes take must be known
        self._num_steps += 1
        if is_free:
            return 0
        decode_s = self._expected_decode_s(num_decodes)
        if decode_s is None or self._prefill_token_s is None:
            return GRANULE
        num_tokens = int((SLOWDOWN - 1) * decode_s / self._prefill_token_s)
        return max(num_tokens if num_tokens < GRANULE else num_tokens // GRANULE * GRANULE, MIN_TOKENS)

    def _expected_decode_s(self, num_decodes: int) -> float | None:
        """Of the closest number of decodes that has been seen."""
        wanted = num_decodes.bit_length()
        closest = min(self._decode_s, key=lambda key: abs(key - wanted), default=None)
        return None if closest is None else self._decode_s[closest]


def blend(old: float | None, new: float) -> float:
    """A running mean that one odd step (a first compilation, a busy machine) hardly moves."""
    if old is None:
        return new
    return (1 - WEIGHT) * old + WEIGHT * min(max(new, old / 2), 2 * old)
