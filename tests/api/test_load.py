"""What the API tells the engine of a request's claim on it, and what of the engine's load it tells clients."""

import struct
import time
from pathlib import Path

import falcon.testing

from api.test_http import BODY, CHAT, check_error, make_client
from fake_engine import Backend, Post, failing
from mlx_server.pulse import Pulse


def test_metrics_are_the_engines(backend: Backend, client: falcon.testing.TestClient) -> None:
    result = client.simulate_get("/metrics")
    assert (result.status_code, result.text) == (200, "vllm:num_requests_running 0\n")
    assert result.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert make_client(backend, api_key="k").simulate_get("/metrics").status_code == 401
    backend.client.fail_streams("engine_died", "")
    check_error(client.simulate_get("/metrics"), 503, "engine_starting")


def test_the_engine_is_told_who_asks_and_until_when(backend: Backend) -> None:
    client = make_client(backend, timeout_s=20.0)
    assert client.simulate_post(CHAT, body=BODY, remote_addr="10.1.2.3").status_code == 200
    submit = backend.engine.submits[-1]
    assert (submit.client, submit.deadline_s) == ("10.1.2.3", 20.0)


def test_a_deadline_that_the_engine_sees_first_is_a_504(backend: Backend, post: Post) -> None:
    backend.engine.script = failing("deadline_exceeded")
    check_error(post(), 504, "request_timeout")


def test_health_is_red_while_the_engine_stands_still(backend: Backend, tmp_path: Path) -> None:
    pulse = Pulse(tmp_path)
    client = make_client(backend, pulse=pulse)
    assert client.simulate_get("/health").status_code == 200
    (tmp_path / "engine.pulse").write_bytes(struct.pack("=dd", time.monotonic() - 60, 0.1))
    check_error(client.simulate_get("/health"), 503, "engine_stuck")
    pulse.beat(0.1)
    assert client.simulate_get("/health").status_code == 200
