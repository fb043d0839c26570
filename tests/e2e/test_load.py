"""A real server with more requests than it can run."""

import asyncio
import contextlib
import random
import threading

import pytest
from openai import RateLimitError

from crowd import CHAT, Reply, any_request, ask, chat, crowd, leave_together, text_of
from e2e_server import PARIS, STORY, connect, metric, start, wait_until_idle
from server_process import until

pytestmark = pytest.mark.model

NUM_SLOTS = 32


def test_a_client_that_fills_its_share_of_the_queue_is_told_to_wait():
    with start("--max-queue", "2", "--timeout", "200") as server, connect(server) as client:
        with contextlib.ExitStack() as streams:
            for _ in range(NUM_SLOTS):
                chunks = client.chat.completions.create(
                    model="default", messages=STORY, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
                )
                streams.callback(chunks.close)
            assert metric(server, "vllm:num_requests_running") == NUM_SLOTS
            answers = []
            waiting = threading.Thread(
                target=lambda: answers.append(
                    client.chat.completions.create(model="default", messages=PARIS, max_tokens=1)
                )
            )
            waiting.start()
            until(lambda: metric(server, "vllm:num_requests_waiting") == 1, "a request in the queue", 60)
            with pytest.raises(RateLimitError) as error:
                client.chat.completions.create(model="default", messages=PARIS, max_tokens=1)
            assert error.value.code == "client_queue_full"
            assert int(error.value.response.headers["retry-after"]) >= 1
            refusals = asyncio.run(at_once(server.url(), 100))
            assert {reply.status for reply in refusals} <= {429, 503}  # 503 if the API knows before the engine is asked
            assert all(int(reply.headers["retry-after"]) >= 1 for reply in refusals)
        waiting.join()
        assert answers[0].usage.completion_tokens == 1
        wait_until_idle(server)


async def at_once(url: str, count: int) -> list[Reply]:
    return await asyncio.gather(*(ask(url, CHAT, chat()) for _ in range(count)))


def test_clients_that_leave_together_are_forgotten(server):
    asyncio.run(leave_together(server, 20))
    assert text_of(asyncio.run(ask(server.url(), CHAT, chat()))).startswith("The capital")
    wait_until_idle(server)


def test_a_crowd_changes_no_answer_and_leaves_nothing_behind(server):
    """The full size of it is in `tests/soak`."""
    url, rng = server.url(), random.Random(1)
    bodies = [chat(messages=[{"role": "user", "content": f"Describe {city}."}]) for city in ("Paris", "Rome", "Oslo")]

    async def beside_a_crowd() -> list[str]:
        others = asyncio.create_task(crowd(60, 8, lambda: any_request(url, rng)))
        texts = [text_of(await ask(url, CHAT, body)) for body in bodies]
        await others
        return texts

    alone = [text_of(asyncio.run(ask(url, CHAT, body))) for body in bodies]
    usages = []
    for _ in range(2):
        assert asyncio.run(beside_a_crowd()) == alone
        wait_until_idle(server)
        usages.append(server.usage())
    early, late = usages
    assert early.keys() == late.keys()
    for pid, (_, num_files, num_threads) in late.items():
        assert num_files <= early[pid][1] + 5
        assert num_threads <= early[pid][2] + 8
