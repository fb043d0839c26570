"""A real server on the demo model, as a user starts it."""

import re
import sys
import urllib.request
from pathlib import Path

from openai import OpenAI

from server_process import ServerProcess, until

MLX_SERVER = [str(Path(sys.executable).with_name("mlx-server"))]

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]


def start(*args: str) -> ServerProcess:
    """`mlx-server` on the demo model and a free port; `args` win."""
    return ServerProcess(MLX_SERVER, ["--model", "demo", "--host", "127.0.0.1", "--port", "0", *args])


def connect(server: ServerProcess, api_key: str = "none") -> OpenAI:
    """openai's client, once the server is ready. It does not repeat what fails."""
    return OpenAI(base_url=f"{server.url()}/v1", api_key=api_key, max_retries=0, timeout=60)


def metric(server: ServerProcess, name: str) -> float:
    """A gauge or counter of /metrics."""
    with urllib.request.urlopen(f"{server.url()}/metrics", timeout=60) as response:
        text = response.read().decode()
    found = re.search(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def num_requests(server: ServerProcess) -> float:
    """That the engine has, running or waiting."""
    return sum(metric(server, f"vllm:num_requests_{state}") for state in ("running", "waiting"))


def wait_until_idle(server: ServerProcess, deadline_s: float = 60.0) -> None:
    """Until no request is left; then no block is either."""
    until(lambda: num_requests(server) == 0, "the end of all requests", deadline_s)
    assert metric(server, "vllm:kv_cache_usage_perc") == 0
