"""A real server with more requests than it can run."""

import contextlib
import threading

import pytest
from openai import RateLimitError

from e2e_server import PARIS, STORY, connect, metric, start
from server_process import until

pytestmark = pytest.mark.model

NUM_SLOTS = 32


def test_a_client_that_fills_its_share_of_the_queue_is_told_to_wait():
    with start("--max-queue", "2", "--timeout", "200") as server, connect(server) as client:
        with contextlib.ExitStack() as streams:
            for _ in range(NUM_SLOTS):
                chunks = client.chat.completions.create(
                    model="default", messages=STORY, temperature=2, max_tokens=4000, stream=True
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
        waiting.join()
        assert answers[0].usage.completion_tokens == 1
        until(lambda: metric(server, "vllm:num_requests_running") == 0, "the end of all", 60)
        assert metric(server, "vllm:kv_cache_usage_perc") == 0
