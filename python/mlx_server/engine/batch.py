"""What one step computes, as the scheduler decides it, and the same as flat arrays, as the model wants it.

All tokens of all requests lie on one axis T, request after request: no padding, no batch axis.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from mlx_server.engine.pooling import Vector
from mlx_server.engine.request import BlockCopy, Request
from mlx_server.engine.sampling_state import Draw, SamplingArrays
from mlx_server.wire import Progress, TokenLogprobs

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class BatchRow:
    """The part of one request that a step computes: positions [start_pos, end_pos), the last of them those of drafts.

    Where it samples, a token is drawn after the newest token and after each draft.
    """

    request: Request
    start_pos: int
    end_pos: int
    samples: bool  # the range ends at the request's newest token, so the next one is drawn
    copy: BlockCopy | None = None  # a part of its positions before start_pos that another request has computed
    restore_from: int | None = None  # slot whose recurrent states the request's own are to be before the step
    keep_to: int | None = None  # slot that is to hold the request's recurrent states as they are before the step
    save_to: int | None = None  # and as they are after it
    draft_token_ids: tuple[int, ...] = ()  # guesses of the tokens that come next
    is_decode: bool = False  # nothing older than the newest token, but for what drafts have spoilt

    @property
    def num_tokens(self) -> int:
        return self.end_pos - self.start_pos

    @property
    def num_draws(self) -> int:
        """How many tokens it gives."""
        return 1 + len(self.draft_token_ids) if self.samples else 0

    @property
    def certain_end_pos(self) -> int:
        """Where its drafts begin."""
        return self.end_pos - len(self.draft_token_ids)

    def accepted(self, token_ids: list[int]) -> list[int]:
        """Of its draws, those after right drafts only, up to one that ends the request."""
        for i, draft in enumerate(self.draft_token_ids):
            if token_ids[i] != draft or draft in self.request.end_token_ids:
                return token_ids[: i + 1]
        return token_ids

    @property
    def progress(self) -> Progress:
        """Of its request's prompt, once the row is computed."""
        num_prompt = len(self.request.prompt_token_ids)
        num_computed = min(self.end_pos, num_prompt)
        return Progress(self.request.request_id, num_prompt, self.request.num_cached_tokens, num_computed)

    @property
    def num_scored(self) -> int:
        """How many prompt tokens, from start_pos + 1 on, this part gives log-probabilities of."""
        request = self.request
        if not request.scores_prompt:
            return 0
        return max(min(self.end_pos, len(request.prompt_token_ids) - 1) - self.start_pos, 0)

    @property
    def is_prompt(self) -> bool:
        """Some of it is part of the prompt."""
        return self.start_pos < len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    rows: list[BatchRow]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_decodes(self) -> int:
        return sum(row.is_decode for row in self.rows)

    @property
    def num_drafts(self) -> int:
        return sum(len(row.draft_token_ids) for row in self.rows)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows if not row.is_decode)

    @property
    def sampling_rows(self) -> list[BatchRow]:
        """The rows whose tokens the step gives, in order."""
        return [row for row in self.rows if row.samples]

    def first_draws(self) -> dict[Request, int]:
        """Where each sampling row's tokens begin among those that the step draws."""
        rows = self.sampling_rows
        return dict(zip([row.request for row in rows], accumulate([0, *(row.num_draws for row in rows)]), strict=False))


@dataclass(frozen=True, slots=True)
class StepResult:
    """A batch that has been computed."""

    batch: Batch
    token_ids: list[list[int]]  # drawn for each of its sampling rows: 1 + drafts
    logprobs: list[list[TokenLogprobs] | None]  # of each of them, if its request asks for it
    prompt_logprobs: list[list[TokenLogprobs]]  # for each row, of the prompt tokens that it has scored
    pooled: dict[Request, Vector] = field(
        default_factory=dict
    )  # of those that ask for an embedding: see `PooledStates`


@dataclass(frozen=True, slots=True)
class SlotCopies:
    """Slots, of KV or of recurrent states, that are copied to others."""

    sources: list[int]
    targets: list[int]

    @staticmethod
    def of(pairs: Iterable[tuple[int | None, int | None]]) -> "SlotCopies":
        """The pairs (source, target) that have both."""
        copies = [(source, target) for source, target in pairs if source is not None and target is not None]
        return SlotCopies([source for source, _ in copies], [target for _, target in copies])


@dataclass(frozen=True, slots=True)
class BatchArrays:
    """A batch as arrays: B rows, T tokens, R draws, M blocks of the longest row."""

    token_ids: Ints  # [T]; 0 where the token is still in flight
    token_sources: Ints  # [T] index into concat(token_ids, tokens of the step before)
    awaits_previous: bool  # some token is still in flight
    positions: Ints  # [T]
    slot_mapping: Ints  # [T] block * block_size + offset: where the token's KV goes
    block_tables: Ints  # [B, M]
    query_lens: list[int]  # B
    context_lens: list[int]  # B: tokens in the cache once this step has written its own
    copied: SlotCopies  # KV to copy in each layer when the step's own is written, which may be what is copied
    slots: Ints  # [B] of the recurrent states
    fresh: list[bool]  # B: the request's first tokens, its states begin as zeros
    restored: SlotCopies  # recurrent states to copy before the step
    kept: SlotCopies  # and then, still before it
    saved: SlotCopies  # and after it
    sampled: Ints  # [R] index on T of the token after which the next one is drawn
    sampling: SamplingArrays  # of R draws
    num_scored: list[int]  # B: prompt tokens that the row scores
    scored: Ints  # [P] index on T of the tokens before those, row after row
    scored_ids: Ints  # [P] the scored tokens

    @staticmethod
    def build(batch: Batch, previous: Batch | None, block_size: int) -> "BatchArrays":
        """`previous` is the step before, whose tokens may still be in flight."""
        rows = batch.rows
        total = batch.num_tokens
        previous_index = previous.first_draws() if previous else {}
        token_ids = np.zeros(total, np.int32)
        token_sources = np.arange(total, dtype=np.int32)
        start = 0
        draws: list[Draw] = []
        for row in rows:
            source = None
            known = row.request.known_tokens(row.start_pos, row.end_pos)
            token_ids[start : start + len(known)] = known
            if row.draft_token_ids:
                token_ids[start + len(known) : start + row.num_tokens] = row.draft_token_ids
            elif len(known) < row.num_tokens:  # at most one: the newest
                source = previous_index[row.request]
                token_sources[start + len(known)] = total + source
            start += row.num_tokens
            if row.samples:
                draws.append(Draw(row.request.sampling_state, row.certain_end_pos, source, row.draft_token_ids))

        positions = np.concatenate([np.arange(row.start_pos, row.end_pos, dtype=np.int32) for row in rows])
        block_tables = _pad([row.request.block_table for row in rows])
        row_of_token = np.repeat(np.arange(len(rows)), [row.num_tokens for row in rows])
        slot_mapping = block_tables[row_of_token, positions // block_size] * block_size + positions % block_size
        ends = np.cumsum([row.num_tokens for row in rows], dtype=np.int32)
        scored, scored_ids = _scored(rows, ends)
        return BatchArrays(
            token_ids=token_ids,
            token_sources=token_sources,
            awaits_previous=bool(total and token_sources.max() >= total),
            positions=positions,
            slot_mapping=slot_mapping.astype(np.int32),
            block_tables=block_tables,
            query_lens=[row.num_tokens for row in rows],
            context_lens=[row.end_pos for row in rows],
            copied=_copied(rows, block_size),
            slots=np.array([row.request.slot for row in rows], np.int32),
            fresh=[row.start_pos == 0 for row in rows],
            restored=SlotCopies.of((row.restore_from, row.request.slot) for row in rows),
            kept=SlotCopies.of((row.request.slot, row.keep_to) for row in rows),
            saved=SlotCopies.of((row.request.slot, row.save_to) for row in rows),
            sampled=_last_tokens(ends, [row.num_draws for row in rows]),
            sampling=SamplingArrays.build(draws),
            num_scored=[row.num_scored for row in rows],
            scored=scored,
            scored_ids=scored_ids,
        )


def _last_tokens(ends: Ints, counts: list[int]) -> Ints:
    """Indices on T of the last tokens of each row, so many of each."""
    indices = [np.arange(end - count, end, dtype=np.int32) for end, count in zip(ends.tolist(), counts, strict=True)]
    return np.concatenate(indices)


def _copied(rows: list[BatchRow], block_size: int) -> SlotCopies:
    """All at once: what is copied from a slot that is itself filled so comes from where that one's comes from."""
    source_of: dict[int, int] = {}
    for row in rows:
        if row.copy is not None:
            source = row.copy.source * block_size
            target = row.request.block_table[row.copy.index] * block_size
            for offset in range(row.copy.num_tokens):
                source_of[target + offset] = source_of.get(source + offset, source + offset)
    return SlotCopies(list(source_of.values()), list(source_of))


def _pad(block_tables: list[list[int]]) -> Ints:
    padded = np.zeros((len(block_tables), max(map(len, block_tables))), np.int32)
    for i, table in enumerate(block_tables):
        padded[i, : len(table)] = table
    return padded


def _scored(rows: list[BatchRow], ends: Ints) -> tuple[Ints, Ints]:
    """`scored` and `scored_ids`; `ends` [B] is where each row ends on T."""
    scored: list[int] = []
    token_ids: list[int] = []
    for row, end in zip(rows, ends.tolist(), strict=True):
        if count := row.num_scored:
            scored += range(end - row.num_tokens, end - row.num_tokens + count)
            token_ids += row.request.prompt_token_ids[row.start_pos + 1 : row.start_pos + 1 + count]
    return np.array(scored, np.int32), np.array(token_ids, np.int32)
