"""Each place of the engine where something can fail, memory or a library, fails once: at its first call, at its second,
and so on until a run ends without. No request gets a wrong token or no end, no block is lost, the next one is served.

What gives blocks back is not among them: if that fails, the engine's own integrity check ends it, and it is replaced.
"""

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from engine.guesses import Guesses
from engine.test_scheduler import API, Collector, make_core, make_submit
from fail_once import InjectedError, failing
from fakes import FAKE_VOCAB_SIZE, FakeRunner, fake_next_token
from mlx_server import wire
from mlx_server.engine import core, transport
from mlx_server.engine.batch import BatchArrays
from mlx_server.engine.kv_cache import KVCacheManager
from mlx_server.engine.pacing import PrefillPacer
from mlx_server.engine.queue import WaitingQueue
from mlx_server.engine.request import Request
from mlx_server.engine.scheduler import Scheduler
from mlx_server.engine.state_snapshots import StateSnapshots
from mlx_server.engine.stats import EngineStats
from mlx_server.engine.step_builder import StepBuilder
from mlx_server.ops.block_pool import BlockPool
from mlx_server.ops.prefix_tree import PrefixTree

POINTS: list[tuple[Any, str]] = [
    # A request comes in.
    (core, "_to_request"),
    (WaitingQueue, "refusal"),
    # A step is put together.
    (Scheduler, "schedule"),
    (Guesses, "plan"),
    (PrefillPacer, "max_prefill_tokens"),
    (KVCacheManager, "next_chunk"),
    (PrefixTree, "match"),
    (PrefixTree, "evict"),
    (BlockPool, "allocate"),
    (StateSnapshots, "keep"),
    (StateSnapshots, "reserve"),
    (KVCacheManager, "launch"),
    (StepBuilder, "add"),
    # It is computed.
    (BatchArrays, "build"),
    (FakeRunner, "run"),
    (FakeRunner, "_compute"),
    (EngineStats, "on_step"),
    (PrefillPacer, "observe"),
    # Its tokens are taken in.
    (Scheduler, "update"),
    (KVCacheManager, "judge"),
    (Request, "continuation"),
    (Request, "timings"),
    (EngineStats, "on_tokens"),
]


class Server(transport.EngineServer):
    """The engine's loop without a socket: blocks are short, prompts share, drafts are tried, states are kept."""

    def __init__(self) -> None:
        guesses = Guesses(random.Random(3), self._next_token, FAKE_VOCAB_SIZE)
        self._core, _ = make_core(
            num_blocks=8,
            block_size=2,
            max_batch_tokens=7,
            max_running=3,
            context=16,
            num_snapshots=3,
            pacer=PrefillPacer(),
            speculator=guesses,
        )
        self._decoder = msgspec.msgpack.Decoder(wire.ClientMessage)
        self.collector = Collector(recurrent=True)

    def tell(self, message: wire.ClientMessage) -> None:
        self._handle(API, msgspec.msgpack.encode(message))

    def steps(self) -> Iterator[int]:
        """One after the other, until nothing is left to do."""
        for i in range(100):
            if not self._core.has_work:
                self._core.check_integrity()
                return
            yield i
            self._send_outputs(self._step())
        raise AssertionError("it does not end")

    def _send(self, connection: bytes, message: wire.EngineMessage) -> None:
        assert isinstance(message, wire.StepOutput)
        self.collector.take([(connection, output) for output in message.outputs])

    @staticmethod
    def _next_token(request: Request, token_ids: list[int]) -> int:
        return fake_next_token(token_ids, request.sampling.seed, recurrent=True)


EARLY = [make_submit("a", [1, 2, 3, 4, 5], 5), make_submit("b", [1, 2, 3, 9], 6), make_submit("c", [1, 2, 3, 4, 7], 2)]
LATE = [make_submit("d", [1, 2, 3, 4, 5], 2), make_submit("e", [5] * 5, 4)]


def serve() -> tuple[Server, dict[str, str]]:
    """Requests together, one of them cancelled; the errors of those that failed, by request."""
    server = Server()
    for message in EARLY:
        server.tell(message)
    for i in server.steps():
        if i == 2:
            for message in LATE:
                server.tell(message)
            server.tell(wire.Cancel("b"))
    ends = server.collector.ends
    assert ends.keys() - {"b"} == {"a", "c", "d", "e"}
    for message in (*EARLY, *LATE):
        if isinstance(ends.get(message.request_id), wire.Finished):
            server.collector.check(message)
    return server, {name: end.code for name, end in ends.items() if isinstance(end, wire.Failed)}


def test_the_run_without_a_fault() -> None:
    """It passes by every point at least once."""
    for owner, name in POINTS:
        with failing(owner, name, at=10_000) as fault:
            _, failed = serve()
        assert fault.num_calls > 0, name
        assert failed == {}


@pytest.mark.parametrize("owner, name", POINTS, ids=[f"{owner.__name__}.{name}" for owner, name in POINTS])
def test_one_fault(owner: Any, name: str) -> None:
    at = 0
    has_happened = True
    while has_happened:
        at += 1
        with failing(owner, name, at) as fault:
            server, failed = serve()
            has_happened = fault.has_happened
        assert set(failed.values()) <= {"engine_error"}
        assert len(failed) <= 1  # a step can be repeated, taking its tokens can't
        after = make_submit("after", [1, 2, 3, 4, 5], 2)
        server.tell(after)
        list(server.steps())
        server.collector.check(after)


@pytest.mark.parametrize("owner, name", [(KVCacheManager, "next_chunk"), (Request, "continuation")])
def test_a_request_that_fails_each_time_ends_and_no_other_one(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    original = getattr(owner, name)

    def fails_for_c(*args: Any) -> Any:
        if any(isinstance(arg, Request) and arg.request_id == "c" for arg in args):
            raise InjectedError
        return original(*args)

    monkeypatch.setattr(owner, name, fails_for_c)
    _, failed = serve()
    assert failed == {"c": "engine_error"}
