"""What the engine counts, and the same as text for Prometheus.

Counting costs well under a microsecond: plain numbers, which prometheus_client turns into text when it is asked.
Names and buckets are vLLM's, so that its dashboards work; what it does not have begins with `mlx_server:`.
"""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from mlx_server.engine.batch import Batch
from mlx_server.engine.request import Request

EndReason = Literal["stop", "length", "abort", "error"]

_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_COUNTS = tuple(2**i for i in range(20))


class Histogram:
    """Counts of values in buckets; a value on a bound is in the bucket below it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, number of values up to it), as Prometheus writes them."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), float(total)))
        return buckets

    @property
    def sum(self) -> float:
        return self._sum


@dataclass(frozen=True, slots=True)
class Gauges:
    """The engine at this moment."""

    num_running: int
    num_waiting: int
    cache_usage: float  # 0 to 1
    block_size: int
    num_blocks: int


class EngineStats(Collector):
    """Counters and histograms of one engine since its start."""

    def __init__(self, model_name: str = "") -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.gauges = Gauges(0, 0, 0.0, 0, 0)
        self.reset()

    def reset(self) -> None:
        """Begin at zero again."""
        self.num_preemptions = 0
        self._num_prefix_queries = 0  # prompt tokens that were looked up
        self._num_prefix_hits = 0  # of these, found
        self._num_failed_steps = 0
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._num_output_tokens = 0
        self._num_drafts = 0  # rows with drafts
        self._num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._num_prompt_tokens = 0
        self._ends: Counter[EndReason] = Counter()
        self._refusals: Counter[str] = Counter()
        self._ttft, self._inter_token = Histogram(_TTFT_S), Histogram(_TOKEN_S)
        self._e2e, self._queue, self._prefill, self._decode, self._inference = (Histogram(_REQUEST_S) for _ in range(5))
        self._prompt_tokens, self._generation_tokens, self._max_tokens = (Histogram(_COUNTS) for _ in range(3))
        self._step_tokens, self._step_rows, self._step_s = Histogram(_COUNTS), Histogram(_COUNTS), Histogram(_TTFT_S)

    def on_refusal(self, code: str) -> None:
        """A request was not taken."""
        self._refusals[code] += 1

    def on_start(self, request: Request) -> None:
        """A request's first tokens are scheduled."""
        assert request.started_s is not None
        self._queue.observe(request.started_s - request.arrived_s)

    def on_tokens(self, request: Request, num_tokens: int, now_s: float) -> None:
        """A request's newest tokens, all of one step, are known; stamps the request."""
        self._num_output_tokens += num_tokens
        if request.last_token_s is None:
            request.first_token_s = now_s
            self._ttft.observe(now_s - request.arrived_s)
            self._num_prompt_tokens += len(request.prompt_token_ids)
            self._num_prefix_queries += len(request.prompt_token_ids)
            self._num_prefix_hits += request.num_cached_tokens
        else:
            self._inter_token.observe(now_s - request.last_token_s)
        request.last_token_s = now_s

    def on_step(self, batch: Batch, duration_s: float) -> None:
        """A step has been computed."""
        self._num_decode_tokens += batch.num_decodes
        self._num_prefill_tokens += batch.num_prefill_tokens
        self._num_drafts += sum(bool(row.draft_token_ids) for row in batch.rows)
        self._num_draft_tokens += batch.num_drafts
        self._step_tokens.observe(batch.num_tokens)
        self._step_rows.observe(len(batch.rows))
        self._step_s.observe(duration_s)

    def on_failed_step(self) -> None:
        self._num_failed_steps += 1

    def on_end(self, request: Request, reason: EndReason, now_s: float) -> None:
        """A request has ended, however it did."""
        self._ends[reason] += 1
        if reason not in ("stop", "length"):
            return
        timings = request.timings()
        self._e2e.observe(now_s - request.arrived_s)
        self._prefill.observe(timings.prefill_s)
        self._decode.observe(timings.decode_s)
        self._inference.observe(timings.prefill_s + timings.decode_s)
        self._prompt_tokens.observe(len(request.prompt_token_ids))
        self._generation_tokens.observe(len(request.output_token_ids))
        self._max_tokens.observe(request.max_tokens)

    def text(self, gauges: Gauges) -> str:
        """All of it in Prometheus's text format."""
        self.gauges = gauges
        return generate_latest(self._registry).decode()

    # --- for prometheus_client ---

    def collect(self) -> Iterator[Metric]:
        now = self.gauges
        yield self._gauge("vllm:num_requests_running", "Requests that take part in steps.", now.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", now.num_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", now.cache_usage)
        yield self._info("vllm:cache_config_info", block_size=now.block_size, num_gpu_blocks=now.num_blocks)
        for name, text, count in self._counts():
            yield self._counter(name, text, {"": count})
        ended: dict[str, int] = {reason: self._ends[reason] for reason in ("stop", "length", "abort")}
        yield self._counter("vllm:request_success", "Requests that ended, by why.", ended, "finished_reason")
        refusals = dict(self._refusals)
        yield self._counter("mlx_server:request_refusals", "Requests not taken, by why.", refusals, "code")
        for name, text, histogram in self._histograms():
            family = HistogramMetricFamily(name, text, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), histogram.cumulative(), histogram.sum)
            yield family

    def _counts(self) -> list[tuple[str, str, int]]:
        return [
            ("vllm:prompt_tokens", "Prompt tokens of requests that gave a token.", self._num_prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", self._num_output_tokens),
            ("vllm:num_preemptions", "Times a request gave way to another.", self.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", self._num_prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", self._num_prefix_hits),
            ("vllm:spec_decode_num_drafts", "Times that tokens were guessed.", self._num_drafts),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", self._num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Of these, right and sent.", self.num_accepted_tokens),
            ("mlx_server:prefill_tokens", "Tokens computed as part of a prompt.", self._num_prefill_tokens),
            ("mlx_server:decode_tokens", "Tokens computed one a step.", self._num_decode_tokens),
            ("mlx_server:failed_steps", "Steps that could not be computed.", self._num_failed_steps),
            ("mlx_server:request_errors", "Requests that failed in the engine.", self._ends["error"]),
        ]

    def _histograms(self) -> list[tuple[str, str, Histogram]]:
        return [
            ("vllm:time_to_first_token_seconds", "From arrival in the engine.", self._ttft),
            ("vllm:inter_token_latency_seconds", "Between two tokens of a request.", self._inter_token),
            ("vllm:time_per_output_token_seconds", "The same, by its older name.", self._inter_token),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", self._e2e),
            ("vllm:request_queue_time_seconds", "From arrival to the first step.", self._queue),
            ("vllm:request_prefill_time_seconds", "From there to the first token.", self._prefill),
            ("vllm:request_decode_time_seconds", "From there to the last token.", self._decode),
            ("vllm:request_inference_time_seconds", "Prefill and decode.", self._inference),
            ("vllm:iteration_tokens_total", "Tokens of a step.", self._step_tokens),
            ("vllm:request_prompt_tokens", "Prompt tokens of a request.", self._prompt_tokens),
            ("vllm:request_generation_tokens", "Tokens generated for a request.", self._generation_tokens),
            ("vllm:request_max_num_generation_tokens", "The same: each choice is a request.", self._generation_tokens),
            ("vllm:request_params_max_tokens", "What requests asked for at most.", self._max_tokens),
            ("mlx_server:step_rows", "Requests of a step.", self._step_rows),
            ("mlx_server:step_time_seconds", "A step, from the end of the one before.", self._step_s),
        ]

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _info(self, name: str, **facts: object) -> Metric:
        family = GaugeMetricFamily(name, "Facts, as labels.", labels=[*self._labels, *facts])
        family.add_metric([*self._labels.values(), *map(str, facts.values())], 1)
        return family

    def _counter(self, name: str, text: str, values: dict[str, int], label: str = "") -> Metric:
        """`values` by the value of `label`; without one there is one value."""
        family = CounterMetricFamily(name, text, labels=[*self._labels, *([label] if label else [])])
        for value, count in values.items():
            family.add_metric([*self._labels.values(), *([value] if label else [])], count)
        return family
