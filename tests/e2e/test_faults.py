"""A real server on the demo model when something dies, is cut or is stopped."""

import re
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import (
    APIError,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    InternalServerError,
    RateLimitError,
)

from e2e_server import PARIS, STORY, connect, metric, start
from server_process import ServerProcess, until

pytestmark = pytest.mark.model


def long_stream(client, max_tokens):
    """Chunks until `max_tokens`: at this temperature the model finds no end."""
    return client.chat.completions.create(
        model="default",
        messages=STORY,
        temperature=2,
        seed=1,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )


def begin(chunks):
    """Take what comes first, so that the model is at work."""
    assert next(chunks).choices[0].delta.role == "assistant"
    assert next(chunks).choices[0].delta.content


def refusal(client) -> InternalServerError | None:
    """Ask for a token; None: it came."""
    try:
        client.chat.completions.create(model="default", messages=PARIS, max_tokens=1)
    except InternalServerError as error:
        return error
    return None


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def health(server: ServerProcess) -> int:
    return status_of(f"{server.url()}/health")


def kv_tokens(text: str) -> int:
    """How many the cache holds, as the first line with a budget says; 0: there is none."""
    found = re.search(r"KV .*\(([\d,]+) tokens\)", text)
    return int(found[1].replace(",", "")) if found else 0


def test_processes_that_are_killed_come_back():
    with start() as server, connect(server) as client:
        engine, api = server.child("mlx_server.engine"), server.child("mlx_server.api")
        chunks = long_stream(client, 4000)
        begin(chunks)
        engine.kill()
        with pytest.raises(APIError) as error:
            list(chunks)
        assert error.value.code == "engine_died"

        error_meanwhile = refusal(client)
        assert error_meanwhile is not None
        assert error_meanwhile.status_code == 503
        assert error_meanwhile.code == "engine_starting"
        assert int(error_meanwhile.response.headers["retry-after"]) >= 1
        assert health(server) == 503
        until(lambda: refusal(client) is None, "an answer after the engine's restart", 60)
        assert health(server) == 200
        assert server.child("mlx_server.engine") != engine
        # For all that is known, it was killed because memory ran out.
        until(lambda: kv_tokens(server.err) == kv_tokens(server.out) // 2, "half of the cache")
        assert server.child("mlx_server.api") == api  # it has not noticed

        worker = api.children()[0]
        worker.kill()
        until(lambda: not worker.is_running() and len(api.children()) == 2, "a new worker")
        assert refusal(client) is None

        api.kill()
        server.child("mlx_server.api", other_than=api)
        until(lambda: health(server) == 200, "health after the API's restart")
        assert refusal(client) is None

        # No process outlives the supervisor, and the run directory, which holds the key, does not stay either.
        server.processes()
        server.process.kill()
        server.assert_nothing_left()


def test_an_engine_that_stands_still_is_replaced():
    with start() as server, connect(server) as client:
        engine = server.child("mlx_server.engine")
        chunks = long_stream(client, 4000)
        begin(chunks)
        engine.suspend()
        until(lambda: health(server) == 503, "health says so", 15)
        with pytest.raises(APIError):
            list(chunks)
        assert refusal(client) is not None
        server.child("mlx_server.engine", other_than=engine, deadline_s=90)
        until(lambda: refusal(client) is None, "an answer of the new engine", 60)


def test_ctrl_c_lets_a_stream_finish():
    with start() as server, connect(server) as client:
        server.url()
        server.processes()
        chunks = long_stream(client, 60)
        begin(chunks)
        server.signal(signal.SIGINT)
        until(lambda: not accepts(server), "new connections are refused")
        assert server.process.poll() is None
        assert list(chunks)[-1].usage.completion_tokens == 60
        assert server.wait() == 0
        server.assert_nothing_left()
        assert "Traceback" not in server.err


def accepts(server: ServerProcess) -> bool:
    try:
        return health(server) == 200
    except OSError:
        return False


def test_a_second_ctrl_c_ends_a_stream():
    with start() as server, connect(server) as client:
        server.url()
        server.processes()
        chunks = long_stream(client, 4000)
        begin(chunks)
        server.signal(signal.SIGINT)
        until(lambda: "a second signal" in server.err, "the drain")
        server.signal(signal.SIGINT)
        assert server.wait() == 130
        server.assert_nothing_left()
        chunks.close()


def test_ctrl_c_during_the_load():
    with start() as server:
        until(lambda: "Loading" in server.out, "the load")
        server.processes()
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        server.assert_nothing_left()
        assert "Ready" not in server.out
        assert server.err.count("Traceback") == 0


def test_a_port_in_use_is_said_before_the_model_is_loaded(server):
    port = server.url().rpartition(":")[2]
    with start("--port", port) as second:
        assert second.wait() == 1
        assert second.out == ""
        assert second.err.startswith(f"mlx-server: port {port} is in use")


def test_a_broken_model_directory_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with start("--model", str(tmp_path)) as server:
        assert server.wait() == 2
        assert server.err.startswith("mlx-server: ")
        assert "config.json" in server.err
        assert server.err.count("\n") == 1
        assert server.run_dirs == []


def test_a_wrong_key_is_refused():
    with start("--api-key", "sk-right") as server:
        with connect(server, "sk-wrong") as client, pytest.raises(AuthenticationError):
            client.models.list()
        with connect(server, "sk-right") as client:
            assert client.models.list().data
        assert health(server) == 200
        assert "sk-right" not in server.out + server.err


def list_models_often(client):
    for _ in range(7):
        client.models.list()


def test_the_rate_limit_holds_across_workers():
    with start("--rate-limit", "5") as server:
        url = server.url()
        begin_s = time.monotonic()
        with ThreadPoolExecutor(16) as pool:  # a connection each: they spread over the workers
            codes = list(pool.map(lambda _: status_of(f"{url}/v1/models"), range(16)))
            elapsed_s = time.monotonic() - begin_s
        assert 5 <= codes.count(200) <= 5 + elapsed_s / 12  # one more is allowed each 12 s
        assert codes.count(200) + codes.count(429) == 16
        with connect(server) as client, pytest.raises(RateLimitError) as error:
            list_models_often(client)
        assert int(error.value.response.headers["retry-after"]) >= 1
        assert health(server) == 200


def test_a_request_beyond_the_timeout_is_ended_and_its_work_cancelled():
    with start("--timeout", "1") as server, connect(server) as client:
        with pytest.raises(APIError) as error:
            list(long_stream(client, 4000))
        assert error.value.code == "request_timeout"
        until(lambda: metric(server, "vllm:num_requests_running") == 0, "the end of its work")
        with pytest.raises(APIStatusError) as status_error:
            client.chat.completions.create(model="default", messages=STORY, max_tokens=4000, temperature=2, seed=1)
        assert status_error.value.status_code == 504
        until(lambda: metric(server, "vllm:num_requests_running") == 0, "the end of the second one's work")


def test_a_small_memory_limit_bounds_the_context_and_says_so():
    with start("--memory-limit", "230MB") as server, connect(server) as client:
        server.url()
        assert re.search(r"Memory +weights .* KV .* tokens\).* of 230\.0 MB", server.out)
        num_tokens = kv_tokens(server.out)
        with pytest.raises(BadRequestError) as error:
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "word " * 1500}])
        assert error.value.code == "context_length_exceeded"
        for part in (f"{num_tokens} tokens", "--memory-limit", re.compile(r"are 15\d\d tokens")):
            assert re.search(part, error.value.message)
        assert client.chat.completions.create(model="default", messages=PARIS, max_tokens=1).choices


def test_a_memory_limit_that_the_model_does_not_fit_is_one_sentence():
    with start("--memory-limit", "50MB") as server:
        assert server.wait(60) == 2
        assert "--memory-limit" in server.err
        assert server.err.count("mlx-server: ") == 1
        assert "Traceback" not in server.err
