"""The API process as the supervisor starts it, with a fake model and a fake engine, for tests on a real socket."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import openai
import zmq

from fake_engine import FakeEngine, until
from mlx_server.api.incoming import ClientLimits
from mlx_server.config import Launch, ResolvedModel, Settings

CHAT = "/v1/chat/completions"
TESTS = Path(__file__).parent
_LIMITS = ClientLimits()


class Process:
    """An API process and its engine. `max_files`: so many may be open in each process; 0: the usual number."""

    def __init__(self, run_dir: Path, limits: ClientLimits = _LIMITS, max_files: int = 0, **settings: Any) -> None:
        self.run_dir = run_dir
        self.log = run_dir / "log"
        self.engine = FakeEngine(f"ipc://{run_dir}/engine")
        model = ResolvedModel("org/tiny", "")
        Launch(Settings(model="tiny", **settings), model, self.engine.address).write(run_dir)
        with socket.create_server(("127.0.0.1", 0)) as listener, self.log.open("w") as log:
            self.port: int = listener.getsockname()[1]
            arguments = (str(listener.fileno()), msgspec.json.encode(limits), str(max_files))
            stdin, self.lifeline = os.pipe()
            self.process = subprocess.Popen(
                [sys.executable, TESTS / "api/fake_server.py", run_dir, *arguments],
                env=os.environ | {"PYTHONPATH": str(TESTS)},
                stdin=stdin,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
            os.close(stdin)
        self.clients: list[openai.OpenAI | http.client.HTTPConnection | socket.socket] = []
        until(lambda: self.log.read_text().count("connected to the engine") == 2, timeout_s=60)

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        self.clients.append(connection)
        return connection

    def get(self, path: str, **headers: str) -> int:
        connection = self.connect()
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as response:
            return response.status

    def send(self, **fields: Any) -> http.client.HTTPConnection:
        connection = self.connect()
        connection.request("POST", CHAT, json.dumps(request(**fields)), {"content-type": "application/json"})
        return connection

    def post(self, **fields: Any) -> http.client.HTTPResponse:
        return self.send(**fields).getresponse()

    def openai(self) -> openai.OpenAI:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=20, max_retries=0)
        self.clients.append(client)
        return client

    def restart_engine(self) -> None:
        count = self.log.read_text().count("connected to the engine")
        self.engine.stop()
        self.engine = FakeEngine(self.engine.address)
        until(lambda: self.log.read_text().count("connected to the engine") == count + 2)

    def disconnect(self) -> None:
        """Close all clients."""
        while self.clients:
            self.clients.pop().close()

    def close(self) -> None:
        self.disconnect()
        os.close(self.lifeline)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with suppress(zmq.ZMQError):  # a test may have stopped it
            self.engine.stop()


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields


@contextmanager
def running(run_dir: Path, limits: ClientLimits = _LIMITS, max_files: int = 0, **settings: Any) -> Iterator[Process]:
    process = Process(run_dir, limits, max_files, **settings)
    try:
        yield process
    finally:
        process.close()
