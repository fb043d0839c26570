"""Grammars that outputs must match: compiled beside the step loop, then asked before each draw what may come next."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from mlx_server.chat.grammar import LIMITS
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.engine.batch import Batch, StepResult
from mlx_server.engine.request import Request
from mlx_server.ops.sampling import INVALID_TOKEN

log = logging.getLogger(__name__)

Words = npt.NDArray[np.uint32]

_MAX_FAULT_LENGTH = 500


class OutputGrammar:
    """What the output of one request must match, and how far it has come.

    Where only one text can follow, its tokens are forced: they need not be drawn. They follow from the tokens before
    alone, so that a request has the same output whatever else runs.
    """

    def __init__(self, matcher: "Future[LLMatcher]", end_token_ids: frozenset[int], vocab_size: int) -> None:
        self._compiled = matcher
        self._end_token_ids = end_token_ids
        self._vocab_size = vocab_size
        self._token_ids: list[int] = []  # that the matcher has consumed: those of the output, then forced ones
        self._is_at_end = False  # after these nothing can follow

    @property
    def is_ready(self) -> bool:
        """It is compiled, or can't be."""
        return self._compiled.done()

    def abandon(self) -> None:
        """Nobody waits for it any more: it need not be compiled."""
        self._compiled.cancel()

    @property
    def fault(self) -> str:
        """Why there can be no more output; empty if all is well."""
        if not self.is_ready:
            return ""
        if (error := self._compiled.exception()) is not None:
            return f"This model can't follow the grammar: {error}"[:_MAX_FAULT_LENGTH]
        return self._matcher.get_error()[:_MAX_FAULT_LENGTH]

    @property
    def _matcher(self) -> LLMatcher:
        return self._compiled.result()

    def advance(self, output_token_ids: Sequence[int], newest: int | None = None) -> None:
        """Take in the output's tokens, and `newest` after them, as far as they are not known yet."""
        num_tokens = len(output_token_ids) + (newest is not None)
        while len(self._token_ids) < num_tokens and not self._is_at_end and not self._matcher.is_error():
            index = len(self._token_ids)
            token_id = output_token_ids[index] if index < len(output_token_ids) else newest
            assert token_id is not None
            self._matcher.consume_token(token_id)
            forced = self._forced()
            self._matcher.consume_tokens(forced)
            self._token_ids += [token_id, *forced]
            self._is_at_end = self._matcher.is_stopped() and not self._matcher.is_error()

    def forced_after(self, num_tokens: int) -> list[int]:
        """What must follow after so many tokens of output."""
        return self._token_ids[num_tokens:]

    def is_complete_after(self, num_tokens: int) -> bool:
        """Nothing can follow after so many tokens of output."""
        return self._is_at_end and num_tokens >= len(self._token_ids)

    def rewind(self) -> None:
        """The newest tokens may be lost: the output is taken in anew."""
        if self._token_ids and not self.fault:
            self._matcher.reset()
            self._token_ids = []
            self._is_at_end = False

    def finish_mask(self, mask: Words, eos_token_ids: Sequence[int]) -> None:
        """Where the output may end, let the request's own end tokens do it; `mask` [W] has the vocabulary's."""
        if self._matcher.is_error() or not self._matcher.is_accepting():
            return
        for token_id in eos_token_ids:
            mask[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        self._is_at_end = not mask.any()
        for token_id in self._end_token_ids:
            if token_id < 32 * mask.size:
                mask[token_id // 32] |= np.uint32(1 << token_id % 32)

    def _forced(self) -> list[int]:
        """Tokens that must come next. An end token is drawn, and so ends the request; so is a token that the model does
        not have, and so fails."""
        forced: list[int] = self._matcher.compute_ff_tokens()
        is_drawn = [token_id in self._end_token_ids or token_id >= self._vocab_size for token_id in forced]
        return forced[: [*is_drawn, True].index(True)]


class Grammars:
    """Compiles grammars for one model's vocabulary, and computes masks of the tokens that they allow.

    A thread of its own makes llguidance's tokenizer, which takes up to seconds, and then compiles one grammar after
    the other; chat/grammar.py has refused what takes long.
    """

    def __init__(self, make_tokenizer: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """`vocab_size`: of the model's logits."""
        self._vocab_size = vocab_size
        self._worker = ThreadPoolExecutor(1, "grammars")
        self._tokenizer = self._worker.submit(make_tokenizer)
        self._tokenizer.add_done_callback(_log_failure)

    @staticmethod
    def of_model(path: Path, vocab_size: int) -> "Grammars":
        """For the tokenizer of a model directory or a GGUF file."""
        return Grammars(lambda: _load_tokenizer(path), vocab_size)

    def compile(self, grammar: str, end_token_ids: frozenset[int]) -> OutputGrammar:
        """Begin to compile; the result tells when it is ready."""
        matcher = self._worker.submit(self._match, grammar)
        return OutputGrammar(matcher, end_token_ids, self._vocab_size)

    def masks(self, grammars: Sequence[OutputGrammar]) -> Words:
        """[M, ceil(V / 32)]: what may come next in each of the M outputs, as `ops.sampling` has it.

        All are computed in parallel, without the interpreter's lock.
        """
        if not grammars:
            return np.zeros((0, -(-self._vocab_size // 32)), np.uint32)
        tokenizer = self._tokenizer.result()
        masks = np.zeros((len(grammars), -(-tokenizer.vocab_size // 32)), np.uint32)
        matchers = [(grammar._matcher, i) for i, grammar in enumerate(grammars)]  # noqa: SLF001
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(grammars))
        for mask, grammar in zip(masks, grammars, strict=True):
            grammar.finish_mask(mask, tokenizer.eos_tokens)
        fitted = np.zeros((len(grammars), -(-self._vocab_size // 32)), np.uint32)
        num_words = min(fitted.shape[1], masks.shape[1])
        fitted[:, :num_words] = masks[:, :num_words]
        return fitted

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def _match(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer.result(), grammar, limits=LIMITS, log_level=0)


def constrain(batch: Batch, previous: StepResult | None, rows: npt.NDArray[Any]) -> list[OutputGrammar]:
    """Tell the draws of a batch what their grammars want: a token, or that a mask be obeyed.

    Args:
        previous: the step before the batch, whose tokens their requests don't have yet.
        rows: [R] of ROW_DTYPE; `given_token` and `mask_row` are written.
    Returns:
        Whose masks the draws refer to, M of them. Of draws that will not count there is none.
    """
    newest = _newest_tokens(previous) if previous else {}
    masked: list[OutputGrammar] = []
    for request, i in batch.first_draws().items():
        grammar, token_id = request.grammar, newest.get(request)
        if grammar is None or token_id in request.end_token_ids or token_id == INVALID_TOKEN:
            continue
        grammar.advance(request.output_token_ids, token_id)
        num_tokens = len(request.output_token_ids) + (token_id is not None)
        if forced := grammar.forced_after(num_tokens):
            rows["given_token"][i] = forced[0]
        elif not grammar.is_complete_after(num_tokens) and not grammar.fault:
            rows["mask_row"][i] = len(masked)
            masked.append(grammar)
    return masked


def _newest_tokens(previous: StepResult) -> dict[Request, int]:
    """The tokens that a step has drawn, but for those that a grammar had forced already."""
    drawn = zip(previous.batch.sampling_rows, previous.token_ids, strict=True)
    return {row.request: token_ids[0] for row, token_ids in drawn if row.end_pos == row.request.num_known_tokens}


def _log_failure(tokenizer: "Future[LLTokenizer]") -> None:
    if (error := tokenizer.exception()) is not None:
        log.warning("no grammars with this model's tokenizer: %s", error)


def _load_tokenizer(path: Path) -> LLTokenizer:
    tokenizer = Tokenizer.load(path)
    return LLTokenizer(tokenizer.to_json(), eos_token=tokenizer.end_token_ids or None)
