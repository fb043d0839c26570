"""The engine's bookkeeping under random load: whatever happens, every request ends once and gets the tokens that it
gets alone, nothing leaks, and nobody starves. Seeded and without a clock: a seed that fails is a test case."""

import random

import pytest

from engine.guesses import Guesses
from engine.test_fairness import Clock
from engine.test_scheduler import API, Collector, alone, make_core, make_submit
from fakes import FAKE_VOCAB_SIZE, fake_next_token
from mlx_server import wire
from mlx_server.engine.pacing import PrefillPacer
from mlx_server.engine.queue import QueueLimits
from mlx_server.engine.request import Request


class World:
    """An engine of random size, and random clients of it."""

    def __init__(self, seed: int, *, speculates: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.block_size = rng.choice([1, 2, 4, 16])
        self.context = rng.randint(20, 60)
        self.window = rng.choice([None, None, 1, 5, 16])
        self.num_snapshots = None if self.window else rng.choice([None, 0, 1, 3, 20])
        self.clock = Clock()
        self.core, self.runner = make_core(
            num_blocks=-(-self.context // self.block_size) + rng.randint(0, 10),
            window=self.window,
            num_snapshots=self.num_snapshots,
            block_size=self.block_size,
            max_batch_tokens=rng.choice([1, 3, 8, 64]),
            max_running=rng.choice([1, 2, 8]),
            context=self.context,
            limits=rng.choice([None, QueueLimits(6, 200)]),
            pacer=rng.choice([None, PrefillPacer()]),
            speculator=Guesses(rng, self.next_token, FAKE_VOCAB_SIZE) if speculates else None,
            clock=self.clock,
        )
        self.num_priorities = rng.choice([1, 1, 3])
        self.clients = [f"client-{i}" for i in range(rng.choice([1, 2, 5]))]
        self.collector = Collector(self.window, recurrent=self.num_snapshots is not None)
        self.conversations: list[list[int]] = [[]]
        self.taken: dict[str, wire.Submit] = {}
        self.cancelled: set[str] = set()

    def next_token(self, request: Request, token_ids: list[int]) -> int:
        recurrent = self.num_snapshots is not None
        return fake_next_token(token_ids, request.sampling.seed, self.window, recurrent=recurrent)

    def arrive(self, request_id: str) -> None:
        rng = self.rng
        prompt = self._begin()
        prompt += [rng.randrange(FAKE_VOCAB_SIZE) for _ in range(rng.randint(1, self.context - 1 - len(prompt)))]
        message = make_submit(
            request_id,
            prompt,
            rng.randint(1, self.context - len(prompt)),
            seed=rng.randrange(3),
            end=tuple(rng.randrange(FAKE_VOCAB_SIZE) for _ in range(rng.choice([0, 0, 100]))),
            priority=rng.randrange(self.num_priorities),
            client=rng.choice(self.clients),
            deadline_s=rng.choice([None, None, None, 50.0]),
            cache_salt=rng.choice(["", "", "", "salt"]),
        )
        failed = self.core.submit(API, message)
        if failed is None:
            self.taken[request_id] = message
            answer, _, _ = alone(message, self.window, recurrent=self.num_snapshots is not None)
            self.conversations = [*self.conversations[-5:], prompt + answer]
        else:
            assert failed.code in ("queue_full", "client_queue_full")

    def _begin(self) -> list[int]:
        """Of a prompt: it may go on from an earlier conversation, or branch off from it."""
        conversation = self.rng.choice(self.conversations)
        return conversation[: self.rng.randint(0, min(len(conversation), self.context - 2))]

    def step(self) -> None:
        self.clock.now_s += self.rng.random()
        try:
            self.collector.take(self.core.step())
        except RuntimeError:
            self.collector.take(self.core.fail_step(out_of_memory=self.rng.random() < 0.5))
        self.core.check_integrity()

    def lose_connection(self) -> None:
        """Of the API process, which all requests are of."""
        open_requests = set(self.taken) - set(self.collector.ends) - self.cancelled
        assert self.core.cancel_connection(API) == len(open_requests)
        self.cancelled |= open_requests

    def check_ends(self) -> None:
        ends = self.collector.ends
        assert set(ends) | self.cancelled == set(self.taken)
        assert not set(ends) & self.cancelled
        for request_id, end in ends.items():
            if isinstance(end, wire.Finished):
                self.collector.check(self.taken[request_id])
            else:
                assert end.code in ("deadline_exceeded", "engine_error")


@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_every_request_ends_once_with_its_own_tokens(seed: int, speculates: bool) -> None:
    world = World(seed, speculates=speculates)
    world.runner.fails_when_read = seed % 2 == 1
    rng = world.rng
    for step in range(250):
        if rng.random() < 0.25:
            world.arrive(f"r{step}")
        if rng.random() < 0.03 and world.taken:
            request_id = rng.choice(list(world.taken))
            if world.core.cancel(API, request_id):
                world.cancelled.add(request_id)
        if rng.random() < 0.005:
            world.lose_connection()
        if rng.random() < 0.01:
            world.runner.fail_at.add(world.runner.num_steps + 1)
        if rng.random() < 0.01 and world.taken:
            world.runner.poison.add(rng.choice(list(world.taken)))
        world.step()
    for _ in range(20_000):
        if not world.core.has_work:
            break
        world.step()
    world.core.check_integrity()
    world.check_ends()


@pytest.mark.parametrize("seed", range(20))
def test_nobody_starves(seed: int) -> None:
    """Requests keep arriving, more than can be served; one of a client of its own ends nevertheless."""
    world = World(seed)
    world.num_priorities = 1
    for i in range(20):
        world.arrive(f"early{i}")
    mine = make_submit("mine", [1] * (world.context // 2), world.context // 2, client="mine")
    while world.core.submit(API, mine) is not None:
        world.step()
    for i in range(5000):
        world.arrive(f"late{i}")
        world.step()
        if "mine" in world.collector.ends:
            world.collector.check(mine)
            return
    raise AssertionError("starved")
