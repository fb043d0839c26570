"""The demo model behind HTTP: what streaming clients see, and what the HTTP path costs.

Clients are coroutines that read server-sent events off plain sockets, so that they take little of the machine from the
server.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
import numpy as np
import pytest

from e2e_server import start
from mlx_server import wire
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

VOCAB_SIZE = 49152
NUM_STREAMS = 8
SEED = 7
ARRIVALS_PER_S = 2.0
NUM_ARRIVALS = 40


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    max_tokens: int
    start_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    sent_s: float
    arrived_s: list[float]  # of each event that carries text

    @property
    def ttft_s(self) -> float:
        return self.arrived_s[0] - self.sent_s


def jobs(num_jobs: int, prompt_tokens: int, answer_tokens: int) -> Iterator[list[Job]]:
    """New prompts each time, so that no cache helps."""
    rng = np.random.default_rng(SEED)
    while True:
        yield [Job(rng.integers(1000, VOCAB_SIZE, prompt_tokens).tolist(), answer_tokens) for _ in range(num_jobs)]


def poisson_jobs() -> list[Job]:
    rng = np.random.default_rng(SEED)
    starts_s = np.cumsum(rng.exponential(1 / ARRIVALS_PER_S, NUM_ARRIVALS))
    return [
        Job(rng.integers(1000, VOCAB_SIZE, rng.integers(16, 256)).tolist(), int(rng.integers(16, 64)), float(start_s))
        for start_s in starts_s
    ]


async def answer(url: str, job: Job) -> Answer:
    await asyncio.sleep(job.start_s)
    address = urlsplit(url)
    body = msgspec.json.encode(
        {
            "model": "default",
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    )
    sent_s = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    status = await reader.readline()
    assert b" 200 " in status, status
    arrived_s = []
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            arrived_s.append(time.perf_counter())
    writer.close()
    assert arrived_s
    return Answer(sent_s, arrived_s)


def over_http(url: str) -> Callable[[Sequence[Job]], list[Answer]]:
    async def run(all_jobs: Sequence[Job]) -> list[Answer]:
        return await asyncio.gather(*(answer(url, job) for job in all_jobs))

    return lambda all_jobs: asyncio.run(run(all_jobs))


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with start("--log-level", "warning") as server:
        yield server.url()


@pytest.fixture(scope="module", params=["engine", "http"])
def complete(request, demo_gguf) -> Callable[[Sequence[Job]], object]:
    """Answers all jobs at once: the engine alone, in this process, or the whole server."""
    if request.param == "http":
        return over_http(request.getfixturevalue("server_url"))
    model = load_model(str(demo_gguf))
    core = make_engine_core(model, plan_memory(model))

    def run(all_jobs: Sequence[Job]) -> None:
        for i, job in enumerate(all_jobs):
            greedy = SamplingParams(temperature=0.0)
            assert core.submit(b"", wire.Submit(str(i), job.prompt, job.max_tokens, [], greedy)) is None
        while core.has_work:
            core.step()

    return run


def bench_http_cost(benchmark, complete):
    """The same prompts, all at once, with and without HTTP around the engine."""
    prompt_tokens, answer_tokens = 32, 64
    benchmark.group = f"{NUM_STREAMS} at once: {prompt_tokens} prompt tokens, {answer_tokens} answer tokens"
    rounds = jobs(NUM_STREAMS, prompt_tokens, answer_tokens)
    benchmark.pedantic(complete, setup=lambda: ((next(rounds),), {}), rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = round(NUM_STREAMS * answer_tokens / benchmark.stats.stats.min, 1)


def bench_arrivals(benchmark, server_url):
    """Requests that arrive as a Poisson process, 16 to 256 prompt tokens and 16 to 64 answer tokens each."""
    benchmark.group = f"{NUM_ARRIVALS} requests, {ARRIVALS_PER_S} a second, seed {SEED}"
    answers = benchmark.pedantic(over_http(server_url), args=(poisson_jobs(),), rounds=1, warmup_rounds=0)
    gaps_s = np.concatenate([np.diff(one.arrived_s) for one in answers])
    ttft_s = np.array([one.ttft_s for one in answers])
    num_tokens = sum(job.max_tokens for job in poisson_jobs())
    benchmark.extra_info |= {
        "ttft_ms": {f"p{p}": round(1e3 * float(np.percentile(ttft_s, p)), 1) for p in (50, 90, 99)},
        "inter_token_ms": {f"p{p}": round(1e3 * float(np.percentile(gaps_s, p)), 1) for p in (50, 90, 99)},
        "tokens_per_s": round(num_tokens / benchmark.stats.stats.max, 1),
    }
