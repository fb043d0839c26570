"""A request inside the engine, and the tokens of it that are known, in flight and computed.

```
token_ids (known on the host)          in flight (sampled on the device, not read back yet)
[ prompt ........ | outputs ........ ] [ 0 to 2 tokens ]
[ computed: KV written or being written ...... )
                                       ^ num_computed_tokens <= num_tokens
```
"""

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_server import wire
from mlx_server.engine.pooling import PooledStates
from mlx_server.engine.prompt_lookup import PromptLookup
from mlx_server.engine.sampling_state import SamplingState
from mlx_server.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlx_server.engine.grammar import OutputGrammar


class RequestState(enum.Enum):
    WAITING = enum.auto()  # in the queue: new, or preempted
    RUNNING = enum.auto()  # owns blocks, takes part in steps
    ENDED = enum.auto()  # finished, failed or cancelled; results still in flight are dropped


@dataclass(frozen=True, slots=True)
class PendingSnapshot:
    """A recurrent state that a step in the works saves: to which slot, and after which block of the table."""

    slot: int
    index: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """What a request's next step copies into a block of its own before it writes there: the first `num_tokens` of the
    block `source`."""

    source: int
    index: int  # in the table, of the block that they are copied to
    num_tokens: int
    resumes_from: int  # num_computed_tokens without it


@dataclass(slots=True, eq=False)
class Request:
    request_id: str
    connection: bytes  # identity of the API process that asked
    prompt_token_ids: list[int]
    max_tokens: int
    end_token_ids: frozenset[int]
    sampling: SamplingParams
    grammar: "OutputGrammar | None" = None  # what the output must match
    num_prompt_logprobs: int | None = None  # scores the prompt, with that many alternatives
    pooled: PooledStates | None = None  # of a request for an embedding, which generates nothing
    priority: int = 0  # lower ones are served first
    client: str = ""  # whose fair share it is
    progress: bool = False  # its owner wants to know how much of the prompt is computed
    cache_salt: str = ""  # shares cached prefixes with requests of the same salt only
    arrived_s: float = 0.0  # this and the other times: seconds of the engine's monotonic clock
    deadline_s: float = math.inf
    arrival: int = 0  # the scheduler's running number
    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_in_flight_tokens: int = 0
    num_forced_tokens: int = 0  # by the grammar, after the newest token that was drawn
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_freed_blocks: int = 0  # at the table's begin: behind the attention's window, no longer ours
    num_published_blocks: int = 0  # at the table's begin: others may use them
    num_cached_tokens: int = 0  # of the prompt: never computed for this request
    copy: BlockCopy | None = None  # of the step that is being scheduled; owns the source
    copied_block: int | None = None  # the source of the newest step, owned until the next one
    slot: int | None = None  # of the recurrent states, while running
    restore_from: int | None = None  # slot of the state from which the next step goes on
    shared_pos: int = 0  # end of what others have computed too; models with recurrent states only, like the next ones
    saved_pos: int = 0  # of the newest state that is saved, or that it began with
    pending_snapshot: PendingSnapshot | None = None
    kept_slot: int | None = None  # of its state before the drafts, until they are judged and it has gone on from there
    num_redone_tokens: int = 0  # computed before, but its recurrent state went back to before them
    answer_snapshot: int | None = None  # block after which the newest state of the answer is saved
    num_served_tokens: int = 0  # ever computed, and so counted against the client's share: recomputing them is not
    num_failed_steps: int = 0
    retry_until_pos: int = 0  # where it was in a step that failed: it computes alone up to there
    started_s: float | None = None  # when its first tokens were scheduled
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_logprobs: list[wire.TokenLogprobs] = field(default_factory=list)  # of positions 1…, as far as scored
    lookup: PromptLookup = field(default_factory=PromptLookup)
    sampling_state: SamplingState = field(init=False)

    def __post_init__(self) -> None:
        self.sampling_state = SamplingState(
            self.sampling, self.prompt_token_ids, self.output_token_ids, self.end_token_ids
        )

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known_tokens + self.num_in_flight_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def scores_prompt(self) -> bool:
        """Log-probabilities of its prompt are still to be sent."""
        return self.num_prompt_logprobs is not None and not self.output_token_ids

    @property
    def needs_every_state(self) -> bool:
        """Its prompt must be computed, all of it: what is read from the cache has neither logits nor hidden states."""
        return self.scores_prompt or self.pooled is not None

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is still to compute, or some before it that its grammar has forced or that were
        computed before some drafts were wrong."""
        num_more = self.num_redone_tokens or max(self.num_forced_tokens - 1, 0)
        return self.num_computed_tokens > 0 and self.num_uncomputed_tokens <= 1 + num_more

    @property
    def is_ready(self) -> bool:
        """It may run: its grammar is compiled, if it has one."""
        return self.grammar is None or self.grammar.is_ready

    @property
    def awaits_last_token(self) -> bool:
        """All tokens that it may generate are known or in flight: nothing is left to compute."""
        return len(self.output_token_ids) + self.num_in_flight_tokens >= max(self.max_tokens, 1)

    def known_tokens(self, start_pos: int, end_pos: int) -> list[int]:
        """Token ids of positions [start_pos, end_pos), as far as they are known."""
        prompt_end = len(self.prompt_token_ids)
        prompt = self.prompt_token_ids[start_pos:end_pos]
        return prompt + self.output_token_ids[max(start_pos - prompt_end, 0) : max(end_pos - prompt_end, 0)]

    def failure(self, now_s: float) -> wire.Failed | None:
        """Why it can't go on, or nobody waits for it any more; None: it goes on."""
        if self.deadline_s <= now_s:
            message = "The request took longer than its deadline allows."
            return wire.Failed(self.request_id, "deadline_exceeded", message)
        if self.grammar is not None and self.grammar.fault:
            return wire.Failed(self.request_id, "invalid_grammar", self.grammar.fault)
        return None

    def continuation(self, drawn: list[int]) -> tuple[list[int], bool]:
        """The new tokens once some are drawn, with a grammar one: these, and what the grammar forces after them; and
        whether it allows no more."""
        num_known = len(self.output_token_ids)
        if self.grammar is None or not self.max_tokens:
            return drawn if self.max_tokens else [], False
        (token_id,) = drawn
        if self.grammar.is_complete_after(num_known):
            return [], True
        if token_id in self.end_token_ids:
            return [token_id], False
        self.grammar.advance(self.output_token_ids, token_id)
        forced: list[int] = []
        if self.sampling.logprobs is None:  # else each is given to a draw of its own, which scores it
            forced = self.grammar.forced_after(num_known + 1)[: self.max_tokens - num_known - 1]
        self.num_forced_tokens = len(forced)
        if forced:
            self.num_in_flight_tokens = 0  # the token that is being drawn is the first of these
        return [token_id, *forced], self.grammar.is_complete_after(num_known + 1 + len(forced))

    def timings(self) -> wire.Timings:
        """Of a request that has all its tokens."""
        assert self.started_s is not None and self.first_token_s is not None and self.last_token_s is not None
        return wire.Timings(
            queue_s=self.started_s - self.arrived_s,
            prefill_s=self.first_token_s - self.started_s,
            decode_s=self.last_token_s - self.first_token_s,
        )
